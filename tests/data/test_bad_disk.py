"""`evomoe prepare --pairs` and `--glue` on a disk that is full, read-only or broken."""

import errno
import os
from pathlib import Path

import pytest
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

from evomoe_plugin.cli import main
from evomoe_plugin.data import folder as folder_module
from evomoe_plugin.data.folder import OutputFolder
from tests.data.texts import words


@pytest.fixture
def commands(make, tmp_path, capsys):
    """Of each kind, for the folder `made/data`; some of their words can be replaced."""
    make()  # the tokenizer of `--glue`
    (tmp_path / "cola").mkdir()
    for split in ("train", "dev"):
        (tmp_path / f"cola/{split}.tsv").write_text("gj04\t1\t\ta b\ngj04\t0\t\tc d\n")
    for lang in ("de", "en"):
        (tmp_path / f"text.{lang}").write_text("\n".join(words(0, 200).split()))
    (tmp_path / "made").mkdir()
    pairs = ["--pairs", tmp_path / "text.de", tmp_path / "text.en", "--vocab-size", 280]
    glue = ["--glue", "cola", tmp_path / "cola", "--tokenizer-of", tmp_path / "out"]
    given = {"pairs": pairs, "glue": glue}
    out = ["--out", tmp_path / "made/data"]
    return {name: ["prepare", *map(str, [*words, *out])] for name, words in given.items()}


def content(folder):
    """Of all files and folders below, hidden ones too."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def failing(number, path=None):
    """A function that ends in the system's error; with the path, if that is the first argument."""

    def fail(*args, **_):
        raise OSError(number, os.strerror(number), *([str(args[0])] if path else []))

    return fail


def only_of(name, number, function):
    """`function`, a method of paths, but for those of this name."""

    def fail(path, *args, **kwargs):
        if path.name == name:
            raise OSError(number, os.strerror(number), str(path))
        return function(path, *args, **kwargs)

    return fail


FAULTS = {
    "full": (
        (MMapIndexedDatasetBuilder, "add_item", failing(errno.ENOSPC)),
        "--out {out}: no space left on the disk; the partial output has been removed",
    ),
    "write": (
        (MMapIndexedDatasetBuilder, "add_item", failing(errno.EIO)),
        "--out {out}: Input/output error",
    ),
    "read-only": (
        (Path, "mkdir", only_of(".data.preparing", errno.EROFS, Path.mkdir)),
        "{out.parent}/.data.preparing: Read-only file system",
    ),
    "fsync": (
        (folder_module, "sync", failing(errno.EIO, path=True)),
        "{out.parent}/.data.preparing/data/",
    ),
    "rename": (
        (Path, "rename", only_of("data", errno.EIO, Path.rename)),
        "{out.parent}/",
    ),
    "second rename": (
        (Path, "rename", only_of("built", errno.EIO, Path.rename)),
        "{out.parent}/.data.preparing/built: Input/output error",
    ),
    "last fsync": (
        (folder_module, "sync", only_of("made", errno.EIO, folder_module.sync)),
        "{out.parent}: Input/output error",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["pairs", "glue"])
def test_one_line_and_nothing_is_changed(commands, tmp_path, monkeypatch, capsys, kind, fault):
    out, command = tmp_path / "made/data", commands[kind]
    place, message = FAULTS[fault]
    make_folder = OutputFolder.__init__

    def begin(folder, path):  # a name that differs from the final one
        make_folder(folder, path)
        folder.data = folder.work / "built"

    if fault == "second rename":
        monkeypatch.setattr(OutputFolder, "__init__", begin)
    for more in ([], ["--overwrite"]):  # in place of nothing, and of an older one
        before = content(out.parent)
        with monkeypatch.context() as patch:
            patch.setattr(*place)
            assert main([*command, *more]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: " + message.format(out=out)), error
        assert content(out.parent) == before
        assert main([*command, *more]) == 0
        assert {path.name for path in out.parent.iterdir()} == {"data"}


def test_every_file_is_flushed_before_the_folder_has_its_name(commands, monkeypatch):
    flushed = []
    monkeypatch.setattr(folder_module, "sync", lambda path: flushed.append(Path(path)))
    assert main(commands["glue"]) == 0
    out = Path(commands["glue"][-1])
    work = out.parent / ".data.preparing/data"
    wanted = {work / path.relative_to(out) for path in out.rglob("*")} | {work, out.parent}
    assert set(flushed) == wanted and flushed[-1] == out.parent
