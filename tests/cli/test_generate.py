"""`evomoe generate`: what it prints, and what it says to bad input. A file that would run a program
is refused."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evomoe_plugin.cli import main
from tests.cli.checkpoints import malicious, save_checkpoint
from tests.export.conftest import make_trained, words  # noqa: F401  fixtures
from tests.models.conftest import make_config  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(make_trained, tmp_path):  # noqa: F811
    trained = make_trained(20, moe_gate="top_k")
    return save_checkpoint(trained, tmp_path / "checkpoint.pt")


def test_text_numbers_and_experts(checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w3\n\nw9 w30 w2 w2\n", encoding="utf-8-sig")  # as Windows marks it
    common = [
        "generate",
        "--path",
        str(checkpoint),
        "--prompts-file",
        str(prompts),
        "--prompt",
        "w1 w2",
        "--max-new-tokens",
        "6",
        "--cpu",
    ]
    assert main([*common, "--batch-size", "1"]) == 0
    out, err = capsys.readouterr()
    texts = re.split(r"^--- \d\n", out, flags=re.M)[1:]
    assert [
        text.startswith(prompt)
        for text, prompt in zip(texts, ("w1 w2", "w3", "w9 w30 w2 w2"), strict=True)
    ] == [True] * 3
    new = len(out.split()) - 3 * 2 - 7
    assert re.search(
        rf"^{new} new tokens in [\d.]+ s: [\d,.]+ tokens per second; [\d,.]+ with the "
        r"prompts$",
        err,
        re.M,
    )
    assert "2.00 of 5 experts per token were used in each MoE layer, on average" in err
    assert main([*common, "--batch-size", "8"]) == 0
    assert capsys.readouterr().out == out


def test_unknown_words_are_reported(checkpoint, capsys):
    assert (
        main(
            [
                "generate",
                "--path",
                str(checkpoint),
                "--prompt",
                "w1 x",
                "--max-new-tokens",
                "1",
                "--cpu",
            ]
        )
        == 0
    )
    assert "warning: 1 tokens of the prompts are not in" in capsys.readouterr().err


BAD = [
    ([], "--prompt (not given): give --prompt TEXT, or --prompts-file FILE"),
    (["--prompts-file", "absent.txt"], "--prompts-file absent.txt: cannot be read: No such file"),
    (["--prompt", "w1", "--data", "absent"], "--data absent: has no dict.txt"),
    (["--prompt", "w1", "--beam", "0"], "--beam 0: give 1 or more"),
    (["--prompt", "w1", "--path", "absent.pt"], "--path absent.pt: there is no such file"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_one_line(checkpoint, capsys, given, message):
    assert main(["generate", "--path", str(checkpoint), "--cpu", *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("latin.txt", b"w1 \xe9\n", "is not UTF-8"),
        ("empty.txt", b"\n\n", "--prompt (not given)"),
    ],
)
def test_bad_files_of_prompts(checkpoint, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert (
        main(["generate", "--path", str(checkpoint), "--prompts-file", str(tmp_path / name)]) == 2
    )
    assert message in capsys.readouterr().err


def test_another_dictionary(checkpoint, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/dict.txt").write_text("w1 1\nw2 1\n")
    assert (
        main(
            [
                "generate",
                "--path",
                str(checkpoint),
                "--prompt",
                "w1",
                "--data",
                str(tmp_path / "other"),
            ]
        )
        == 2
    )
    assert "has 6 token ids, the checkpoint has 40" in capsys.readouterr().err


def test_a_file_cut_short(checkpoint, capsys):
    checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
    assert main(["generate", "--path", str(checkpoint), "--prompt", "w1"]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "cut short" in err


def test_a_checkpoint_of_another_task(checkpoint, capsys):
    state = torch.load(checkpoint, weights_only=False)
    state["cfg"]["task"]["_name"] = "translation"
    torch.save(state, checkpoint)
    assert main(["generate", "--path", str(checkpoint), "--prompt", "w1"]) == 2
    assert (
        "was trained with the task translation: give a checkpoint of a language model"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("verb", ["generate", "export"])
def test_a_malicious_pickle_is_refused(tmp_path, capsys, verb, is_plain):
    path = malicious(tmp_path / "evil.pt", tmp_path / "ran", is_plain)
    arguments = ["--path", str(path), "--prompt", "a"]
    if verb == "export":
        arguments = [str(path), str(tmp_path / "out")]
    assert main([verb, *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert ("cannot be read" in err) if is_plain else ("could run a program: refused" in err)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_every_option_has_a_flag():
    import dataclasses

    from evomoe_plugin.cli import generate
    from evomoe_plugin.generation.options import GenerationOptions

    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    args = vars(parser.parse_args(["--path", "p"]))
    for field in dataclasses.fields(GenerationOptions):
        assert args[field.name] == field.default


@pytest.mark.slow
def test_as_fairseq_interactive(checkpoint):
    """The same greedy tokens as fairseq's own command, where that is right: one prompt a batch."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    data = checkpoint.parent / "data"
    theirs = subprocess.run(
        [
            sys.executable,
            "-m",
            "fairseq_cli.interactive",
            str(data),
            "--user-dir",
            "evomoe_plugin",
            "--task",
            "language_modeling",
            "--path",
            str(checkpoint),
            "--beam",
            "1",
            "--max-len-b",
            "9",
            "--cpu",
        ],
        cwd=ROOT,
        env=environment,
        input="w1 w2 w30\n",
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert theirs.returncode == 0, theirs.stderr[-3000:]
    (line,) = [line for line in theirs.stdout.splitlines() if line.startswith("H-")]
    ours = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from evomoe_plugin.cli import main; sys.exit(main())",
            "generate",
            "--path",
            str(checkpoint),
            "--prompt",
            "w1 w2 w30",
            "--max-new-tokens",
            "6",
        ],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout.split() == line.split("\t")[2].split()


# Under torchrun another process may be the one that prints first.
LAUNCHERS = {
    "its own": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher, search", [("its own", ["--beam", "3"]), ("torchrun", [])])
def test_experts_sharded_over_processes(
    make_trained,  # noqa: F811
    tmp_path,
    capsys,
    launcher,
    search,
):
    """All texts are printed once, in the order of the prompts."""
    trained = make_trained(20, moe_gate="top_k", moe_expert_count="4")
    path = save_checkpoint(trained, tmp_path / "checkpoint.pt")
    prompts = [word for text in ("w1 w2", "w3", "w9 w30") for word in ("--prompt", text)]
    common = ["generate", "--path", str(path), *prompts, "--max-new-tokens", "6", "--cpu"]
    common += search
    assert main(common) == 0
    wanted = capsys.readouterr()
    script = tmp_path / "evomoe.py"
    script.write_text(
        "import sys\nfrom evomoe_plugin.cli import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    sharded = ["--moe-expert-parallel-size", "2"]
    found = subprocess.run(
        [sys.executable, *LAUNCHERS[launcher], str(script), *common, *sharded],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        },
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == wanted.out
    assert found.stderr.count("tokens per second") == 1
    assert "2.00 of 4 experts per token were used" in found.stderr
