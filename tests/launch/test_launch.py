"""How runs start on CPUs, and how they end: together, with a status and a line."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.end_to_end.forks import Forked
from tests.tiny_runs import ROOT

FSDP = ("--ddp-backend", "fully_sharded")
LONG = 100_000

FAILS_ON_RANK_1 = """
import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig

@register_criterion("fails_on_rank_1", dataclass=CrossEntropyCriterionConfig)
class FailsOnRank1(CrossEntropyCriterion):
    steps = 0

    def forward(self, model, sample, reduce=True):
        FailsOnRank1.steps += model.training
        if self.steps == 4 and torch.distributed.get_rank() == 1:
            raise KeyError("only here")
        return super().forward(model, sample, reduce)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def children(pid):
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def is_rank(pid):
    try:
        return "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return False


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.fixture
def training(request, runs, tmp_path):
    """A run of two ranks in the midst of training, with a checkpoint; and its ranks' ids.

    Address and rank are given as in the published command. The parameter is how it starts:
    `forked` as its ranks are, in a `background` where SIGINT is ignored, as the background jobs of
    a shell do; otherwise as users' do.
    """
    how = getattr(request, "param", "")
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = runs.arguments(
        folder,
        *FSDP,
        "--save-interval-updates",
        "2",
        "--keep-interval-updates",
        "2",
        "--distributed-rank",
        "0",
        "--distributed-init-method",
        f"tcp://127.0.0.1:{free_port()}",
        world=2,
        updates=LONG,
    )
    if how == "forked":
        process = Forked("train", arguments, ROOT, dict(os.environ), tmp_path / "output")
    else:
        ignoring = ignore_interrupts if how == "background" else None
        process = runs.start("train", *arguments, preexec_fn=ignoring)
    try:
        wait_for(lambda: process.poll() is not None or list(folder.glob("checkpoint_last.pt")))
        assert process.poll() is None, process.communicate()
        yield process, [pid for pid in children(process.pid) if is_rank(pid)], folder
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_torchrun(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    arguments = runs.arguments(folder, *FSDP, updates=2)
    status, _, err = runs.output(
        "train",
        *arguments,
        launcher=[
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            str(free_port()),
        ],
    )
    assert status == 0, err
    state = torch.load(folder / "checkpoint_last.pt", weights_only=False)
    assert state["cfg"]["distributed_training"]["distributed_world_size"] == 2
    assert state["optimizer_history"][-1]["num_updates"] == 2


@pytest.mark.parametrize(
    "training", ["forked", pytest.param("started", marks=pytest.mark.slow)], indirect=True
)
def test_a_killed_rank_ends_the_run(training):
    process, ranks, folder = training
    assert len(ranks) == 2
    state = torch.load(folder / "checkpoint_last.pt", weights_only=False)
    assert state["cfg"]["distributed_training"]["distributed_world_size"] == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: rank 1 was ended by SIGKILL" in err.splitlines()[-1]
    assert not is_running(ranks[0])


@pytest.mark.parametrize(
    "number, status",
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_parent_ends_all(training, number, status):
    process, ranks, folder = training
    assert len(ranks) == 2
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert not any(is_running(pid) for pid in ranks)
    if number == signal.SIGINT:
        assert err.splitlines()[-1].startswith("interrupted: a run with the same --save-dir")


@pytest.mark.slow
@pytest.mark.parametrize("training", ["started", "background"], indirect=True)
def test_the_ranks_follow_a_killed_parent(training):
    process, ranks, _ = training
    process.kill()
    wait_for(lambda: not any(is_running(pid) for pid in ranks))


def test_an_error_in_one_rank_ends_all_and_is_the_one_told(runs, tmp_path, capsys):
    plugin = tmp_path / "failing_plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text("import evomoe_plugin\n" + FAILS_ON_RANK_1)
    options = ("--user-dir", plugin, "--criterion", "fails_on_rank_1")
    run = runs.train("run", *FSDP, *options, "--save-interval-updates", "2", world=2)
    err = capsys.readouterr().err
    assert run.status == 1
    assert err.splitlines()[-1] == "error: rank 1 stopped with KeyError: 'only here'"
    assert "raise KeyError" in err
    assert not (run.folder / "crash.pt").exists()
    assert run.checkpoint()["optimizer_history"][-1]["num_updates"] == 2


@pytest.mark.slow
def test_bad_options_end_before_anything_starts(runs, tmp_path):
    status, _, err = runs.output(
        "train",
        *runs.arguments(
            tmp_path,
            *FSDP,
            "--bf16",
            world=2,
        ),
    )
    assert status == 2
    assert err.splitlines()[-1].startswith("error: --bf16 with --ddp-backend fully_sharded")
    assert "Traceback" not in err


def test_threads_are_shared_out_unless_the_user_did(monkeypatch):
    from evomoe_plugin.launch import call_main

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert call_main._threads_per_rank(2) == 4
    assert call_main._threads_per_rank(16) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert call_main._threads_per_rank(2) is None


@pytest.mark.slow
def test_workers_that_load_data_leave_no_warning(runs):
    """Of semaphores, one of each, which the end of their rank leaves to multiprocessing."""
    folder = runs.folder / "run"
    folder.mkdir()
    arguments = runs.arguments(folder, "--num-workers", 1, world=2, updates=1)
    status, _, err = runs.output("train", *arguments, env={"PYTHONWARNINGS": ""})
    assert status == 0 and "leaked" not in err
