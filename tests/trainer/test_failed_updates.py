"""What is said of a failed update."""

import types

import pytest
import torch

from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.trainer import failed_updates
from evomoe_plugin.trainer.failed_updates import log_overflowed_parameters


def test_overflowed_parameters_are_named_on_request(caplog):
    good, bad = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    good.grad, bad.grad = torch.ones(1), torch.full((1,), float("inf"))
    masters = types.SimpleNamespace(params=[good, bad])
    trainer = types.SimpleNamespace(optimizer=types.SimpleNamespace(fp32_optimizer=masters))
    with caplog.at_level("INFO"):
        log_overflowed_parameters(trainer)
        assert not caplog.messages
        trainer.param_names = ["good", "bad"]
        log_overflowed_parameters(trainer)
    assert caplog.messages == ["overflow in param bad"]


@pytest.mark.parametrize(
    ("first", "ranks", "message", "waits"),
    [
        ("the output of a", 1, "update 8: NaN, first in the output of a; ", 0),
        ("the output of a", 2, "rank 1: update 8: NaN, first in the output of a; ", 0),
        (None, 2, "rank 1: update 8: NaN, but not when the same batches are run again; ", 1),
        (None, 1, "update 8: NaN, but not when the same batches are run again; ", 0),
        (RunFailed("a is NaN"), 2, "rank 1: a is NaN", 0),
    ],
)
def test_the_rank_on_which_nan_begins_is_the_one_to_say_so(
    monkeypatch, first, ranks, message, waits
):
    def find(_model, _run):
        if isinstance(first, Exception):
            raise first
        return first

    waited = []
    monkeypatch.setattr(failed_updates, "first_not_finite", find)
    monkeypatch.setattr(failed_updates.time, "sleep", waited.append)
    monkeypatch.setattr(failed_updates.distributed_utils, "get_global_rank", lambda: 1)
    distributed = types.SimpleNamespace(distributed_world_size=ranks)
    trainer = types.SimpleNamespace(
        cfg=types.SimpleNamespace(distributed_training=distributed),
        zero_grad=lambda: None,
        get_model=lambda: None,
        get_num_updates=lambda: 7,
    )
    error = failed_updates.not_finite(trainer, FloatingPointError("NaN"), [])
    assert str(error).startswith(message) and len(waited) == waits
    assert str(error).count("; several ranks write no crash.pt") == ranks - 1
