"""Checkpoints are whole or absent, whatever name they go by and whoever removes it."""

from __future__ import annotations

import json
import os

import pytest
import torch

from evomoe_plugin.checkpoint import atomic_files, checkpoint_files
from evomoe_plugin.checkpoint.atomic_files import write_atomically, write_files
from evomoe_plugin.config.errors import RunFailed


def test_an_error_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    path.write_text("good")

    def fail(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunFailed, match="No space left on device .*nothing is changed"):
        write_files({str(path): fail})
    assert path.read_text() == "good"
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]


def test_a_limit_of_the_system_is_named(tmp_path):
    """The error reaches us through torch's writer, which wraps it."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "checkpoint_last.pt"
    checkpoint_files.save({"weights": torch.zeros(10)}, str(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunFailed, match="File too large .*earlier checkpoints are intact"):
            checkpoint_files.save({"weights": torch.zeros(1_000_000)}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["checkpoint_last.pt"]
    assert torch.load(path)["weights"].numel() == 10


def test_a_small_file_that_fails_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.html"
    path.write_text("good")

    def fail(_path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic_files, "sync", fail)
    with pytest.raises(OSError, match="Input/output error") as error:
        write_atomically(path, "new")
    assert error.value.filename == str(path)
    assert path.read_text() == "good" and os.listdir(tmp_path) == ["a.html"]


def test_a_file_that_is_there_is_not_called_unchanged(tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    monkeypatch.setattr(atomic_files, "sync", lambda _path: (_ for _ in ()).throw(OSError(5, "x")))
    with pytest.raises(RunFailed, match="the new file is whole"):
        write_files({str(path): lambda file: file.write(b"new")})
    assert path.read_bytes() == b"new"


def test_bytes_of_file_names_that_are_no_text_are_written_as_escapes(tmp_path):
    path = tmp_path / "card.json"
    name = os.fsdecode(b"caf\xe9")
    write_atomically(path, json.dumps({"name": name}, ensure_ascii=False))
    assert json.loads(path.read_text()) == {"name": name}


def test_copies_do_not_share_their_content(tmp_path):
    first, last = str(tmp_path / "checkpoint_1_2.pt"), str(tmp_path / "checkpoint_last.pt")
    checkpoint_files.save({"update": 2}, first)
    checkpoint_files.copy(first, last)
    os.truncate(first, 0)
    assert torch.load(last) == {"update": 2}


def test_links_are_relative(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    first, last = str(folder / "checkpoint_1_2.pt"), str(folder / "checkpoint_last.pt")
    checkpoint_files.save({"update": 2}, first)
    checkpoint_files.copy(first, last, symlink=True)
    assert os.readlink(last) == "checkpoint_1_2.pt"
    folder.rename(tmp_path / "there")
    assert torch.load(tmp_path / "there/checkpoint_last.pt") == {"update": 2}


def test_removing_a_target_leaves_its_links_whole(tmp_path):
    first = str(tmp_path / "checkpoint_1_2.pt")
    names = [str(tmp_path / f"checkpoint_{name}.pt") for name in ("best", "last")]
    checkpoint_files.save({"update": 2}, first)
    for name in names:
        checkpoint_files.copy(first, name, symlink=True)
    checkpoint_files.remove(first)
    assert not os.path.lexists(first)
    assert [torch.load(name) for name in names] == [{"update": 2}] * 2
    assert sum(os.path.islink(name) for name in names) == 1  # still one copy on the disk


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in ("checkpoint_1_2.pt", "checkpoint_1_4.pt.tmp", "notes.tmp"):
        (tmp_path / name).write_text("")
    checkpoint_files.remove_leftovers(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1_2.pt", "notes.tmp"]
