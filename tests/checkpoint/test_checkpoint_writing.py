"""Saving during real runs: in the background, by links, on a full disk, and killed midway."""

from __future__ import annotations

import contextlib
import math
import os
import resource
import signal
import time
import types

import pytest
import torch
from fairseq import checkpoint_utils

from tests.end_to_end.forks import Forked
from tests.tiny_runs import ROOT

FSDP = ("--ddp-backend", "fully_sharded")
ASYNC = ("--write-checkpoints-asynchronously",)
EVERY_2 = ("--save-interval-updates", "2", "--keep-interval-updates", "1")


def updates(path):
    return torch.load(path, weights_only=False)["optimizer_history"][-1]["num_updates"]


def same(left, right):
    if torch.is_tensor(left):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    return left == right


@contextlib.contextmanager
def files_of_at_most(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "options", [(), pytest.param(FSDP, marks=pytest.mark.slow)], ids=["plain", "fully_sharded"]
)
def test_written_in_the_background_is_what_was_trained(runs, options):
    """Each file is of its own update, although training goes on while it is written."""
    direct = runs.train("direct", *options, "--save-interval-updates", "1", validate=True)
    behind = runs.train("behind", *options, *ASYNC, "--save-interval-updates", "1", validate=True)
    assert behind.status == 0
    names = sorted(path.name for path in direct.folder.glob("*.pt"))
    assert sorted(path.name for path in behind.folder.glob("*.pt")) == names
    assert {"checkpoint_best.pt", "checkpoint_last.pt", "checkpoint_1_3.pt"} <= set(names)
    for name in names:
        one, other = direct.checkpoint(name), behind.checkpoint(name)
        for part in ("model", "last_optimizer_state", "optimizer_history"):
            assert same(one[part], other[part]), (name, part)
        assert one["extra_state"]["train_iterator"] == other["extra_state"]["train_iterator"]
        assert one["extra_state"]["best"] == other["extra_state"]["best"]


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.slow), ASYNC], ids=["", "async"]
)
def test_links_are_never_dangling(runs, options):
    result = runs.train("run", "--symlink", *EVERY_2, *options, validate=True)
    assert result.status == 0
    assert os.readlink(result.folder / "checkpoint_last.pt") == "checkpoint_1_6.pt"
    assert updates(result.folder / "checkpoint_last.pt") == 6
    assert updates(result.folder / "checkpoint_best.pt") > 0
    assert not (result.folder / "checkpoint_1_2.pt").exists()
    resumed = runs.train("run", "--symlink", *EVERY_2, *options, updates=8, validate=True)
    assert sorted(resumed.losses()) == [7, 8]


def test_the_best_outlives_its_numbered_file(runs):
    """Training that gets worse: the best is an early update, whose file is not kept."""
    result = runs.train(
        "run", "--symlink", *EVERY_2, "--maximize-best-checkpoint-metric", validate=True
    )
    assert result.status == 0
    assert updates(result.folder / "checkpoint_best.pt") == 2
    assert updates(result.folder / "checkpoint_last.pt") == 6


@pytest.mark.parametrize(
    "options", [pytest.param((), marks=pytest.mark.slow), ASYNC], ids=["", "async"]
)
def test_a_full_disk_ends_the_run_in_one_line(runs, capsys, options):
    first = runs.train("run", *options, updates=3)
    with files_of_at_most(100_000):
        second = runs.train("run", *options, "--save-interval-updates", "1", updates=8)
    error = capsys.readouterr().err
    assert second.status == 1
    assert "error: cannot write" in error and "File too large" in error
    assert "Traceback" not in error
    assert sorted(p.name for p in first.folder.glob("*.pt*")) == ["checkpoint_last.pt"]
    assert updates(first.folder / "checkpoint_last.pt") == 3
    third = runs.train("run", *options, updates=5)
    assert third.status == 0 and sorted(third.losses()) == [4, 5]


@pytest.mark.parametrize(
    ("options", "how"),
    [
        pytest.param((), "started", marks=pytest.mark.slow),
        (ASYNC, "forked"),
        pytest.param(ASYNC, "started", marks=pytest.mark.slow),
    ],
)
def test_killed_while_saving(runs, tmp_path, options, how):
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = runs.arguments(
        folder,
        *options,
        "--save-interval-updates",
        "1",
        "--keep-interval-updates",
        "3",
        updates=100_000,
    )
    if how == "forked":
        process = Forked("train", arguments, ROOT, dict(os.environ), tmp_path / "output")
    else:
        process = runs.start("train", *arguments)
    try:
        while process.poll() is None and not list(folder.glob("checkpoint_1_9.pt")):
            time.sleep(0.02)
        # A process that does nothing but train and save is mostly within a save.
        while process.poll() is None and not list(folder.glob("*.pt.tmp")):
            time.sleep(0.0005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    found = {path.name: updates(path) for path in folder.glob("*.pt")}
    assert found["checkpoint_last.pt"] >= 8
    resumed = runs.train("run", *options, updates=found["checkpoint_last.pt"] + 2)
    assert resumed.status == 0 and len(resumed.losses()) == 2
    assert not list(folder.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_named(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    status = runs.run("train", *runs.arguments(tmp_path / "file", "--log-file", tmp_path / "log"))
    assert status == 2
    assert f"error: --save-dir {tmp_path / 'file'}: cannot be written" in capsys.readouterr().err


def test_nan_is_no_score(tmp_path, monkeypatch):
    """Neither the best one, nor one that makes the best one forgotten."""
    cfg = types.SimpleNamespace(
        save_dir=str(tmp_path), no_save=True, maximize_best_checkpoint_metric=False
    )
    trainer = types.SimpleNamespace(data_parallel_rank=0)
    monkeypatch.setattr(checkpoint_utils.save_checkpoint, "best", 2.0, raising=False)
    for score in (math.nan, 2.5, math.nan):
        checkpoint_utils.save_checkpoint(cfg, trainer, None, score)
        assert checkpoint_utils.save_checkpoint.best == 2.0
