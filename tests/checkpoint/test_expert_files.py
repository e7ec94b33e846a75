"""Experts beside a checkpoint go where it goes; killed at any moment, it is the old or the new."""

import argparse
import os
import shutil

import pytest
import torch

from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
from evomoe_plugin.checkpoint.checkpoint_files import copy, remove, remove_leftovers
from evomoe_plugin.checkpoint.reshard import consolidate, reshard
from tests.checkpoint.expert_states import assert_same, assert_same_state, save, whole_state


def write(path, size=2, seed=0, update=10):
    """Write a checkpoint with divided experts, as a run of `size` processes."""
    whole = path.parent / "elsewhere" / f"whole{seed}.pt"
    whole.parent.mkdir(exist_ok=True)
    if not whole.exists():
        save(whole, seed=seed, update=update)
    reshard(read_main_file("CKPT", str(whole)), str(path), size)


STATES = {update: whole_state(seed=seed, update=update) for seed, update in ((0, 10), (1, 20))}
OLD = STATES[10]


@pytest.fixture
def last(tmp_path):
    write(tmp_path / "checkpoint_last.pt")
    return tmp_path / "checkpoint_last.pt"


def names(folder):
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if "elsewhere" not in path.parts
    )


def test_a_copy_has_the_same_experts(last, tmp_path):
    best = tmp_path / "checkpoint_best.pt"
    write(best, size=4, seed=1, update=20)
    copy(str(last), str(best))
    assert best.read_bytes() == last.read_bytes()
    (own,), (others,) = (list(p.with_suffix(".experts").iterdir()) for p in (last, best))
    assert own.name == others.name
    for file in own.iterdir():  # they take no room
        assert os.path.samefile(file, others / file.name)
    remove(str(last))
    assert names(tmp_path)[0] == "checkpoint_best.experts"
    assert_same_state(best, OLD)


def test_a_copy_to_a_disk_without_links(last, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    best = tmp_path / "checkpoint_best.pt"
    copy(str(last), str(best))
    shutil.rmtree(last.with_suffix(".experts"))
    assert_same_state(best, OLD)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_links_lead_to_the_experts_of_what_they_name(tmp_path):
    first, last = tmp_path / "checkpoint_1_10.pt", tmp_path / "checkpoint_last.pt"
    write(last, seed=1, update=20)
    write(first)
    copy(str(first), str(last), symlink=True)
    assert last.is_symlink()
    assert not last.with_suffix(".experts").exists()
    assert_same_state(last, OLD)
    remove(str(first))  # the link becomes the file
    assert names(tmp_path)[0] == "checkpoint_last.experts"
    assert not last.is_symlink()
    assert not first.with_suffix(".experts").exists()
    assert_same_state(last, OLD)


def test_nothing_is_left_of_a_removed_one(last, tmp_path):
    remove(str(last))
    assert names(tmp_path) == ["elsewhere"][:0]


# Killing: from the n-th change of the disk on, none happens.


class Killed(BaseException):
    pass


CHANGES = [
    (os, "replace"),
    (os, "remove"),
    (os, "link"),
    (os, "symlink"),
    (os, "makedirs"),
    (os, "rmdir"),
    (os, "fsync"),
    (shutil, "rmtree"),
]


def killed_at(patch, step, action):
    """Whether `action` was cut off by a kill at its `step`-th change."""
    count = 0

    def guarded(original, name):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step and name == "rmtree":  # in the middle of it
                folder = os.fspath(args[0])
                os.unlink(os.path.join(folder, sorted(os.listdir(folder))[0]))
            if count >= step:
                raise Killed
            return original(*args, **kwargs)

        return call

    with patch.context() as context:
        for owner, name in CHANGES:
            context.setattr(owner, name, guarded(getattr(owner, name), name))
        try:
            action()
        except Killed:
            return True
    return False


def every_kill(monkeypatch, prepare, action, check):
    """Prepare, kill `action` at its first change, its second, …, and check each time."""
    for step in range(1, 200):
        prepare()
        was_killed = killed_at(monkeypatch, step, action)
        check(was_killed)
        if not was_killed:
            return step
    raise AssertionError("it never ends")


def matches(path):
    """The update of the checkpoint, which is whole: either of the two."""
    main = read_main_file("CKPT", str(path))
    assert_same(main.whole(), STATES[main.update])
    return main.update


@pytest.fixture
def clean(tmp_path):
    """A folder, emptied, with an old checkpoint in it."""
    folder = tmp_path / "run"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for source in ("checkpoint_last.pt", "checkpoint_last.experts"):
            where = tmp_path / source
            (shutil.copytree if where.is_dir() else shutil.copy)(where, folder / source)

    write(tmp_path / "checkpoint_last.pt")
    save(tmp_path / "new.pt", seed=1, update=20)
    return folder, prepare


def restart(folder):
    """As the next start of the run."""
    remove_leftovers(str(folder))


def test_what_a_killed_run_left_goes_at_the_next_start(last, tmp_path):
    state = torch.load(last, weights_only=True)
    # As fairseq keeps the options of adagrad.
    state["cfg"]["optimizer"] = argparse.Namespace(_name="adagrad")
    torch.save(state, last)
    experts = last.with_suffix(".experts")
    (experts / "u30-left").mkdir()
    alone, cut = tmp_path / "checkpoint_alone.experts/u1-a", tmp_path / "checkpoint_cut.pt"
    alone.mkdir(parents=True)  # it may be copied still
    cut.write_bytes(last.read_bytes()[:900])
    (tmp_path / "checkpoint_cut.experts/u1-b").mkdir(parents=True)
    restart(tmp_path)
    assert [path.name for path in experts.iterdir()] == [state["moe_experts"]["tag"]]
    assert alone.exists() and (tmp_path / "checkpoint_cut.experts/u1-b").exists()


@pytest.mark.parametrize("form", [pytest.param("sharded", marks=pytest.mark.slow), "consolidated"])
def test_killed_while_writing(clean, tmp_path, monkeypatch, form):
    folder, prepare = clean
    last, new = folder / "checkpoint_last.pt", read_main_file("CKPT", str(tmp_path / "new.pt"))
    seen = set()

    def action():
        if form == "sharded":
            reshard(new, str(last), 4)
        else:
            consolidate(new, str(last))

    def check(was_killed):
        seen.add(matches(last))
        restart(folder)
        seen.add(matches(last))
        is_divided = read_main_file("CKPT", str(last)).manifest is not None
        folders = list(last.parent.glob("checkpoint_last.experts/*"))
        assert len(folders) == is_divided
        assert not [name for name in names(folder) if name.endswith(".tmp")]

    assert every_kill(monkeypatch, prepare, action, check) > 5
    assert seen == {10, 20}


@pytest.mark.slow
def test_killed_while_copying(clean, tmp_path, monkeypatch):
    folder, prepare = clean
    write(tmp_path / "newer.pt", seed=1, update=20)
    best = folder / "checkpoint_best.pt"

    def prepared():
        prepare()
        copy(str(folder / "checkpoint_last.pt"), str(best))

    def check(was_killed):
        assert matches(best) in ((10, 20) if was_killed else (20,))
        restart(folder)
        matches(best)
        assert len(list(best.with_suffix(".experts").iterdir())) == 1

    assert (
        every_kill(
            monkeypatch, prepared, lambda: copy(str(tmp_path / "newer.pt"), str(best)), check
        )
        > 5
    )


@pytest.mark.parametrize("linked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_while_removing(clean, monkeypatch, linked):
    folder, prepare = clean
    last, other = folder / "checkpoint_last.pt", folder / "checkpoint_other.pt"

    def prepared():
        prepare()
        if linked:
            copy(str(last), str(other), symlink=True)

    def check(was_killed):
        if linked:
            assert matches(other) == 10
        if last.exists() and not last.is_symlink():
            assert matches(last) == 10
        restart(folder)
        if linked:
            assert matches(other) == 10
        elif not last.exists():
            assert names(folder) == []

    assert every_kill(monkeypatch, prepared, lambda: remove(str(last)), check) > 2
