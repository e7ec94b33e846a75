"""A run that is killed around the spawn goes on as if nothing had happened, bit for bit."""

import signal

import pytest

from tests.end_to_end.runs import assert_same_weights, load
from tests.end_to_end.test_spawn import EXACT, SHARDED, SPAWN, N, spawns

# A plugin of the user's, which kills the process that it stands in: a kill from outside would
# come at any time.
KILLING = """
import os, signal
import torch.distributed as dist
import evomoe_plugin
from evomoe_plugin.trainer.hooks import after_update
from evomoe_plugin.trainer.moe_trainer import MoETrainer
from evomoe_plugin.evolve import spawn

N, WHERE = 3, os.environ.get("KILLED_WHERE")

def kill():
    last = dist.get_world_size() - 1 if dist.is_initialized() else 0
    if not last or dist.get_rank() == last:
        os.kill(os.getpid(), signal.SIGKILL)

def train_step(trainer, *args, upstream=MoETrainer.train_step, **kwargs):
    if WHERE == {N - 1: "before", N: "saved"}.get(trainer.get_num_updates(), ""):
        kill()
    return upstream(trainer, *args, **kwargs)

def edit_parameters(trainer, edits, moment_edits, upstream=spawn.edit_parameters):
    if WHERE == "during":
        upstream(trainer, dict(list(edits.items())[:1]), moment_edits)
        kill()
    return upstream(trainer, edits, moment_edits)

def after(trainer):
    if WHERE == "after" and trainer.get_num_updates() == N:
        kill()

MoETrainer.train_step = train_step
spawn.edit_parameters = edit_parameters
after_update(after)
"""
EVERY = ("--save-interval-updates", "1", "--disable-validation", "--max-update", "5")
LAYOUTS = {"one process": (), "fully sharded": SHARDED}


@pytest.fixture(scope="module")
def killing(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user") / "killing"
    folder.mkdir()
    (folder / "__init__.py").write_text(KILLING)
    return folder


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Layout -> the folder and the log of a run that nobody killed."""
    runs = {}

    def run(layout):
        if layout not in runs:
            folder = tmp_path_factory.mktemp("whole")
            runs[layout] = folder, train(folder, *SPAWN, *LAYOUTS[layout], *EVERY)
        return runs[layout]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "where", "saved"),
    [
        ("one process", "before", N - 1),
        ("one process", "during", N - 1),
        ("one process", "after", N - 1),
        ("one process", "saved", N),
        ("fully sharded", "during", N - 1),
        ("fully sharded", "after", N - 1),
    ],
)
def test_killed_around_the_spawn(train, whole, killing, tmp_path, layout, where, saved):
    given = (*SPAWN, *LAYOUTS[layout], *EVERY, "--user-dir", killing)
    killed = train(tmp_path, *given, check=False, KILLED_WHERE=where)
    assert killed.status not in (0, 2)
    if layout == "one process":
        assert killed.status == -signal.SIGKILL
    last = tmp_path / "checkpoint_last.pt"
    assert load(last)["optimizer_history"][-1]["num_updates"] == saved

    resumed = train(tmp_path, *given)
    folder, unbroken = whole(layout)
    assert len(spawns(resumed)) == (saved < N)
    wanted = unbroken.logged("train_inner")[saved:]
    got = resumed.logged("train_inner")
    assert len(got) == 5 - saved
    for a, b in zip(got, wanted, strict=True):
        assert {key: a[key] for key in EXACT} == {key: b[key] for key in EXACT}
    assert_same_weights(last, folder / "checkpoint_last.pt")
