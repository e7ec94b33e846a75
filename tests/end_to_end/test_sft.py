"""Fine-tuning with fairseq's own commands."""

import json
import random
import re
import sys

import pytest
from fairseq_cli import train as fairseq_train

from tests.end_to_end.conftest import TINY
from tests.end_to_end.runs import assert_same_weights, evaluate
from tests.tasks.conftest import CHAT, chat, lines, pair, write_tokenizer

SAME = ("--dropout", "0", "--attention-dropout", "0", "--moe-aux-balance-weight", "10")
EXACT = ("loss", "inner_loss", "ppl", "gate_loss_balance", "gnorm", "experts_per_token", "lr")
SFT = ("--task", "language_modeling_sft", "--tokens-per-sample", "48")


def talk(draw):
    """A prompt of some letters, and an answer of 1 to 12."""
    letters = [draw.choice("abcdef") for _ in range(draw.randint(1, 12))]
    return pair(f"Say {draw.choice('abc')}.", " " + " ".join(letters))


@pytest.fixture(scope="session")
def talks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talks")
    write_tokenizer(folder)
    draw = random.Random(2)
    for split, count in (("train", 48), ("valid", 12), ("test", 5)):
        records = [talk(draw) for _ in range(count)]
        if split != "test":
            records.append(chat(*CHAT[1:]))
        (folder / f"{split}.jsonl").write_text(lines(*records))
    return folder


ANNEALED = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.1")


def options(data, save_dir, *given, gate=ANNEALED):
    return (
        data,
        "--user-dir",
        "evomoe_plugin",
        *SFT,
        *TINY,
        *gate,
        "--criterion",
        "moe_cross_entropy",
        "--moe-gate-loss-wt",
        "0.1",
        "--batch-size",
        "3",
        "--optimizer",
        "adam",
        "--lr",
        "0.003",
        "--clip-norm",
        "1.0",
        "--max-update",
        "8",
        "--log-format",
        "json",
        "--log-interval",
        "1",
        "--num-workers",
        "0",
        "--no-epoch-checkpoints",
        "--save-dir",
        save_dir,
        "--seed",
        "7",
        *given,
    )


@pytest.fixture(scope="module")
def tune(run_command, talks):
    """Fine-tune a tiny model from random weights."""
    return lambda save_dir, *given, gate=ANNEALED: run_command(
        "train", *options(talks, save_dir, *given, gate=gate)
    )


@pytest.fixture(scope="module")
def one_process(tune, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, tune(folder, *SAME, "--update-freq", "2")


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_twice_the_update_frequency(one_process, tune, tmp_path):
    """Answers differ in length, so a mean of the ranks' means would differ."""
    folder, one = one_process
    two = tune(
        tmp_path,
        *SAME,
        "--distributed-world-size",
        "2",
        "--ddp-backend",
        "fully_sharded",
        "--min-params-to-wrap",
        "0",
    )
    for a, b in zip(one.logged("train_inner"), two.logged("train_inner"), strict=True):
        for key in EXACT:
            assert a[key] == pytest.approx(b[key], abs=2e-3, rel=2e-3), key
    assert_same_weights(folder / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt", atol=1e-4)


PACKED = ("--pack-examples", "--dropout", "0.1", "--moe-aux-balance-weight", "10")


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        (),
        ("--distributed-world-size", "2", "--ddp-backend", "fully_sharded"),
    ],
    ids=["one process", "two ranks"],
)
def test_a_resumed_run_is_bit_equal(tune, tmp_path, layout):
    given = (*PACKED, *layout)
    whole = tune(tmp_path / "whole", *given)
    tune(tmp_path / "stopped", *given, "--max-update", "5")
    resumed = tune(tmp_path / "stopped", *given)
    records = whole.logged("train_inner")
    assert records[-1]["epoch"] > records[0]["epoch"]
    got = resumed.logged("train_inner")
    assert len(got) == 3
    for a, b in zip(got, records[5:], strict=True):
        assert {key: a[key] for key in EXACT} == {key: b[key] for key in EXACT}
    assert_same_weights(
        tmp_path / "whole/checkpoint_last.pt", tmp_path / "stopped/checkpoint_last.pt"
    )


def test_eval_lm_gives_the_perplexity_of_answers(one_process, talks):
    """That of the validation of training, chats of several answers among the examples."""
    folder, run = one_process
    wanted = run.logged("valid")[-1]["valid_inner_loss"]
    path = folder / "checkpoint_last.pt"
    losses = [
        evaluate(talks, path, *SFT, "--batch-size", "4", *given)["loss"].item()
        for given in ((), ("--pack-examples",))
    ]
    assert losses == pytest.approx([wanted] * 2, abs=6e-4)
    whole = evaluate(talks, path, *SFT, "--batch-size", "4", "--train-on-prompt")["loss"].item()
    assert abs(whole - wanted) > 0.05


def hypotheses(run) -> dict[str, str]:
    return dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", run.output, re.M))


def test_generation_goes_on_from_prompts(one_process, talks, run_command, tmp_path):
    """Stock fairseq-interactive on typed prompts, and fairseq-generate on those of test.jsonl."""
    records = [json.loads(line) for line in (talks / "test.jsonl").read_text().splitlines()]
    typed = tmp_path / "prompts.txt"
    typed.write_text("".join(record["prompt"] + "\n" for record in records))
    common = (
        talks,
        "--user-dir",
        "evomoe_plugin",
        "--path",
        one_process[0] / "checkpoint_last.pt",
        "--beam",
        "1",
        "--max-len-b",
        "9",
    )
    interactive = run_command(
        "interactive",
        *common,
        "--task",
        "language_modeling",
        "--input",
        typed,
        "--bpe",
        "sentencepiece",
        "--sentencepiece-model",
        talks / "sentencepiece.model",
    )
    generated = run_command("generate", *common, *SFT, "--gen-subset", "test", "--batch-size", "3")
    assert hypotheses(interactive) == hypotheses(generated)
    assert len(hypotheses(generated)) == 5
    for number, record in enumerate(records):
        text = hypotheses(generated)[str(number)].replace(" ", "").replace("\u2581", " ")
        assert text.startswith(record["prompt"])
        assert len(text) > len(record["prompt"])


NULL = ("--moe-null-experts", "2", "--moe-top-k", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "gate",
    [
        (
            "--moe-gate",
            "top_k",
            *NULL,
            "--moe-null-rate-target",
            "0.3",
            "--moe-aux",
            "balance=0.1,null=0.1",
        ),
        ("--moe-gate", "top_p", *NULL, "--moe-top-p", "0"),
    ],
    ids=["top_k", "top_p"],
)
def test_null_experts_in_fp16(tune, talks, run_command, tmp_path, gate):
    """From training with a resume to evaluation and generation."""
    given = (*PACKED, "--fp16", "--fp16-init-scale", "4")
    whole = tune(tmp_path / "whole", *given, gate=gate)
    tune(tmp_path / "stopped", *given, "--max-update", "5", gate=gate)
    resumed = tune(tmp_path / "stopped", *given, gate=gate)
    records = whole.logged("train_inner")
    assert len(records) == 8
    assert all(0 < float(record["null_mass"]) < 1 for record in records)
    for a, b in zip(resumed.logged("train_inner"), records[5:], strict=True):
        for key in ("loss", "inner_loss", "null_mass", "experts_per_token"):
            # fp32 masters are in no checkpoint of fairseq.
            assert a[key] == pytest.approx(b[key], rel=5e-3), key
    path = tmp_path / "whole/checkpoint_last.pt"
    loss = evaluate(talks, path, *SFT, "--batch-size", "4")["loss"].item()
    assert loss == pytest.approx(float(whole.logged("valid")[-1]["valid_inner_loss"]), abs=5e-3)
    generated = run_command(
        "generate",
        talks,
        "--user-dir",
        "evomoe_plugin",
        "--path",
        path,
        "--beam",
        "1",
        "--max-len-b",
        "9",
        *SFT,
        "--gen-subset",
        "test",
        "--batch-size",
        "3",
    )
    assert len(hypotheses(generated)) == 5


def fails(monkeypatch, capsys, *arguments) -> str:
    """The one line of a training run that cannot begin."""
    monkeypatch.setattr(sys, "argv", ["fairseq-train", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        fairseq_train.cli_main()
    error = capsys.readouterr().err
    assert end.value.code == 2 and "Traceback" not in error
    return next(line for line in error.splitlines() if line.startswith("error: "))


def copied(talks, folder):
    folder.mkdir()
    for path in talks.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_bad_line_ends_the_run_before_anything_is_written(talks, monkeypatch, capsys, tmp_path):
    data = copied(talks, tmp_path / "data")
    with open(data / "valid.jsonl", "a") as stream:
        stream.write('{"prompt": "a", "response": ""}\n')
    line = fails(monkeypatch, capsys, *options(data, tmp_path / "save"))
    assert line.startswith(f"error: DATA {data}/valid.jsonl, line 14: response is empty")
    assert not list(tmp_path.glob("save/*.pt"))


def test_a_vocabulary_that_does_not_fit_the_checkpoint(
    one_process, talks, monkeypatch, capsys, tmp_path
):
    data = copied(talks, tmp_path / "data")
    with open(data / "dict.txt", "a") as stream:
        stream.write("".join(f"new{n} 1\n" for n in range(8)))
    line = fails(
        monkeypatch,
        capsys,
        *options(
            data, tmp_path / "save", "--finetune-from-model", one_process[0] / "checkpoint_last.pt"
        ),
    )
    assert re.search(r"DATA dict.txt: has \d+ token ids, the checkpoint has", line)
