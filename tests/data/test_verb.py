"""`evomoe prepare`: its flags, and its output on a terminal and in a pipe."""

import argparse
import dataclasses
import io

import pytest

from evomoe_plugin.cli import main
from evomoe_plugin.cli import prepare as verb
from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.data import DataCard, PrepareOptions
from evomoe_plugin.data import options as data_options
from evomoe_plugin.data.progress import Progress


def run(*arguments):
    parser = argparse.ArgumentParser(prog="evomoe prepare")
    verb.add_arguments(parser)
    return verb.run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def given(monkeypatch):
    """The options that the verb passes to `prepare`, which does nothing."""
    seen = []

    def prepare(options):
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr("evomoe_plugin.data.prepare", prepare)
    return seen


def test_prepares(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(folder, "--out", out, "--vocab-size", 400, "--source", "made up") == 0
    printed = capsys.readouterr()
    card = DataCard.load(out)
    assert card.options["source"] == "made up"
    assert f"{card.splits['train']['tokens']:,} tokens to train on" in printed.out
    assert f"next: fairseq-train {out} --user-dir evomoe_plugin" in printed.out
    assert "\x1b" not in printed.err
    assert run(folder, "--out", out, "--vocab-size", 400, "--source", "made up") == 0
    assert "already prepared" in capsys.readouterr().err


def test_defaults_are_those_of_the_options(given):
    run("a", "b", "--out", "c")
    assert given == [PrepareOptions(inputs=("a", "b"), out="c")]


FLAGS = {
    "overwrite": (["--overwrite"], True),
    "workers": (["--workers", "3"], 3),
    "source": (["--source", "x y"], "x y"),
    "text_suffix": (["--text-suffix", ".py", "--text-suffix", ".md"], (".py", ".md")),
    "exclude": (["--exclude", "a*", "--exclude", "b"], ("a*", "b")),
    "text_field": (["--text-field", "body"], "body"),
    "rows": (["--rows", "chat"], "chat"),
    "documents_by": (["--documents-by", "blank-line"], "blank-line"),
    "document_start": (["--document-start", "^ = "], "^ = "),
    "encoding_errors": (["--encoding-errors", "replace"], "replace"),
    "max_bytes": (["--max-bytes", "5M"], 5_000_000),
    "valid_fraction": (["--valid-fraction", ".2"], 0.2),
    "test_fraction": (["--test-fraction", ".3"], 0.3),
    "valid": (["--valid", "v"], ("v",)),
    "test": (["--test", "t", "--test", "u"], ("t", "u")),
    "seed": (["--seed", "7"], 7),
    "vocab_size": (["--vocab-size", "512"], 512),
    "sample_bytes": (["--sample-bytes", "1.5K"], 1500),
    "sentencepiece_model": (["--sentencepiece-model", "m"], "m"),
    "gpt2_bpe": (["--gpt2-bpe", "e", "v"], ("e", "v")),
    "tokenizer": (["--tokenizer", "t"], "t"),
}


def test_every_option_has_a_flag():
    fields = {field.name for field in dataclasses.fields(PrepareOptions)}
    assert fields == {*FLAGS, "inputs", "out"}


@pytest.mark.parametrize("name", FLAGS)
def test_flag(given, name):
    arguments, value = FLAGS[name]
    run("a", "--out", "c", *arguments)
    assert given == [PrepareOptions(inputs=("a",), out="c", **{name: value})]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12", 12),
        ("5k", 5000),
        ("5MB", 5_000_000),
        ("0.5G", 500_000_000),
        (" 7 ", 7),
    ],
)
def test_sizes(text, size):
    assert verb._size(text) == size


@pytest.mark.parametrize("text", ["", "M", "5T", "-5", "five", "1e6"])
def test_invalid_sizes(text, capsys):
    with pytest.raises(SystemExit) as status:
        run("a", "--out", "b", f"--max-bytes={text}")
    assert status.value.code == 2
    assert "is not a size such as 500K" in capsys.readouterr().err


def test_interrupted(given, capsys):
    assert run("a", "--out", "c") == 130
    assert capsys.readouterr().err == ("interrupted: c is unchanged; the same command resumes\n")


def test_errors_are_one_line(monkeypatch, tmp_path, capsys):
    assert main(["prepare", str(tmp_path / "no"), "--out", "c"]) == 2
    assert capsys.readouterr().err == (f"error: INPUT {tmp_path / 'no'}: no such file or folder\n")

    def fail(options):
        raise RunFailed("the disk is full")

    monkeypatch.setattr("evomoe_plugin.data.prepare", fail)
    assert main(["prepare", "a", "--out", "c"]) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_and_the_same_lines(make, tmp_path, monkeypatch):
    from evomoe_plugin.data import prepare
    from tests.data.texts import options_for

    monkeypatch.setattr("evomoe_plugin.data.progress.REFRESH_SECONDS", 0.0)
    screen = Terminal()
    prepare(options_for(tmp_path, tmp_path / "text"), Progress(screen))
    assert "\x1b" in screen.getvalue() and "100%" in screen.getvalue()
    for stage in ("read", "tokenizer", "binarise"):
        assert f"\n{stage:<10} " in screen.getvalue().replace("\x1b[2K", "\n")


def test_long_stages_report_progress_in_a_pipe(monkeypatch):
    monkeypatch.setattr("evomoe_plugin.data.progress.REMIND_SECONDS", 0.0)
    log = io.StringIO()
    progress = Progress(log)
    with progress.stage("read", 4) as message:
        progress.advance(1)
        message.append("done")
    assert log.getvalue().startswith("read       … 25%\nread       done  [")


def test_processes_default_to_the_usable_cores(monkeypatch):
    monkeypatch.setattr(data_options.os, "sched_getaffinity", lambda _: {0, 5, 7}, raising=False)
    assert PrepareOptions(inputs=("a",), out="b").processes == 3
    assert PrepareOptions(inputs=("a",), out="b", workers=2).processes == 2
