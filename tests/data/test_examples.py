"""The recipes in examples/: their commands are understood, and their files are read as meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from fairseq import options
from pyarrow import parquet

from evomoe_plugin.cli import main
from evomoe_plugin.data import DataCard
from tests.data.texts import PreparedText, words

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = ("hf", "curl", "evomoe", "fairseq-train", "fairseq-eval-lm")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Runs a recipe's script in `tmp_path`; returns the commands it would have run."""
    monkeypatch.chdir(tmp_path)
    binaries, log = tmp_path / "bin", tmp_path / "commands.jsonl"
    binaries.mkdir()
    for name in COMMANDS:
        (binaries / name).write_text(
            f"#!{sys.executable} -S\nimport json, sys\n"
            f"open({str(log)!r}, 'a').write(json.dumps(['{name}', *sys.argv[1:]]) + '\\n')\n"
        )
        (binaries / name).chmod(0o755)

    def run(script, *arguments, **environment):
        log.unlink(missing_ok=True)
        paths = os.pathsep.join([str(binaries), os.environ["PATH"]])
        subprocess.run(
            ["bash", EXAMPLES / script, *arguments],
            check=True,
            env={**os.environ, "PATH": paths, **environment},
        )
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


@pytest.mark.parametrize("recipe", ["wikitext103", "openwebtext"])
def test_only_the_download_needs_the_network(commands, recipe):
    assert {command[0] for command in commands(f"{recipe}/download.sh")} <= {"hf", "curl"}
    for step, command in (
        ("prepare", "evomoe"),
        ("train", "fairseq-train"),
        ("evaluate", "fairseq-eval-lm"),
    ):
        script = EXAMPLES / recipe / f"{step}.sh"
        assert [argv[0] for argv in commands(f"{recipe}/{step}.sh")] == [command]
        assert "://" not in script.read_text()


@pytest.mark.parametrize("recipe", ["wikitext103", "openwebtext"])
def test_fairseq_understands_training_and_evaluation(commands, recipe):
    """Parsed as fairseq's commands do; options that are added override the script's."""

    def parsed(get_parser, script, *arguments, **environment):
        [command] = commands(f"{recipe}/{script}", *arguments, **environment)
        return options.parse_args_and_arch(get_parser(), command[1:])

    training, evaluation = options.get_training_parser, options.get_eval_lm_parser
    args = parsed(training, "train.sh", "--max-update", "7", DATA="d", CHECKPOINTS="c")
    assert (args.data, args.save_dir, args.arch) == ("d", "c", "transformer_lm_gptsmall_moe")
    assert (args.max_update, args.fp16) == (7, True)
    assert args.criterion == "moe_cross_entropy" and args.ddp_backend == "fully_sharded"
    assert not parsed(training, "train.sh", PRECISION="").fp16
    args = parsed(evaluation, "evaluate.sh", DATA="d", CHECKPOINTS="c")
    assert (args.data, args.path, args.gen_subset) == ("d", "c/checkpoint_best.pt", "test")


def article(number):
    """The rows of an article, in WikiText's manner."""
    text = words(number, 100).replace("\n", " ")
    return [f" = Title {number} = \n", "", " = = Part = = \n", "", f" {text} \n", f" = {text}\n"]


def test_wikitext_rows_become_articles(commands, tmp_path, capsys):
    folder = tmp_path / "wikitext-103/wikitext-103-raw-v1"
    folder.mkdir(parents=True)
    for name, articles in (
        ("train-0", range(9)),
        ("train-1", range(9, 20)),
        ("validation-0", range(20, 22)),
        ("test-0", range(22, 25)),
    ):
        rows = [row for number in articles for row in article(number)]
        parquet.write_table(pa.table({"text": rows}), folder / f"{name}.parquet")
    [command] = commands("wikitext103/prepare.sh", "--vocab-size", "400", "--workers", "1")
    assert main(command[1:]) == 0
    prepared = PreparedText("data-bin/wikitext103")
    expected = ["".join(row or "\n" for row in article(number)) for number in range(25)]
    assert prepared.documents("train") == expected[:20]
    assert prepared.documents("valid") == expected[20:22]
    assert prepared.documents("test") == expected[22:]


def test_openwebtext_rows_are_documents(commands, tmp_path, gpt2_files, capsys):
    folder = tmp_path / "openwebtext"
    (folder / "plain_text").mkdir(parents=True)
    for file in gpt2_files:
        (folder / Path(file).name).write_bytes(Path(file).read_bytes())
    texts = [words(number, 50) for number in range(40)]
    for part in range(2):
        parquet.write_table(
            pa.table({"text": texts[part::2]}), folder / f"plain_text/train-{part}.parquet"
        )
    [command] = commands("openwebtext/prepare.sh", "--workers", "1")
    assert main(command[1:]) == 0
    card = DataCard.load(Path("data-bin/openwebtext"))
    assert card.tokenizer["kind"] == "gpt2"
    assert sum(split["documents"] for split in card.splits.values()) == 40
    assert "CC0" in card.options["source"]
