"""When the trainer calls the hooks of other packages."""

import inspect

import fairseq_cli.train
import pytest
from fairseq.trainer import Trainer

from evomoe_plugin.trainer import hooks, install
from evomoe_plugin.trainer.moe_trainer import MoETrainer


@pytest.fixture
def called(monkeypatch):
    """What hooks were called with, in order."""
    seen = []
    monkeypatch.setattr(
        hooks,
        "LOADING",
        [
            lambda trainer, state, path, resets: seen.append(
                ("loading", "model" in state, path, resets)
            )
        ],
    )
    monkeypatch.setattr(hooks, "TRAIN_START", [lambda trainer: seen.append("start")])
    monkeypatch.setattr(
        hooks, "UPDATE_END", [lambda trainer: seen.append(trainer.get_num_updates())]
    )
    return seen


MOE = (
    "--arch",
    "transformer_lm_gpttiny_moe",
    "--decoder-layers",
    "1",
    "--moe-freq",
    "1",
    "--moe-expert-count",
    "2",
    "--decoder-normalize-before",
)


def test_hooks_are_called_by_training_alone(runs, called):
    first = runs.train("run", *MOE, updates=2)
    assert first.status == 0
    assert called == ["start", 1, 2]
    called.clear()
    last = str(first.folder / "checkpoint_last.pt")
    assert runs.train("run", *MOE, updates=3).status == 0
    assert called == [("loading", True, last, False), 3]
    called.clear()
    restore = ("--restore-file", last, "--reset-optimizer")
    assert runs.train("other", *MOE, *restore, updates=1).status == 0
    assert called == [("loading", True, last, True), 1]
    called.clear()
    options = ("--gen-subset", "valid", "--batch-size", "4", "--tokens-per-sample", "32")
    assert runs.run("eval_lm", runs.data, "--path", last, *options) == 0
    assert called == []


def test_no_method_of_the_trainer_is_patched_from_outside():
    for name, member in vars(Trainer).items():
        function = inspect.unwrap(member) if callable(member) else None
        if inspect.isfunction(function):
            assert function.__module__ == "fairseq.trainer", name
            # metrics.aggregate is the only decorator that fairseq itself gives them.
            assert member is function or name in ("train_step", "valid_step"), name


def test_commands_train_with_it(runs, monkeypatch):
    seen = []
    monkeypatch.setattr(MoETrainer, "begin_epoch", lambda self, epoch: seen.append(type(self)))
    runs.train("run", updates=1)
    assert seen[0] is MoETrainer


def test_so_does_a_program_that_calls_main_itself(monkeypatch):
    monkeypatch.setattr(fairseq_cli.train, "Trainer", Trainer)
    install.install()
    assert fairseq_cli.train.Trainer is MoETrainer
