"""What is said of a failed update."""

import types

import pytest
import torch

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
    ("found", "message"),
    [
        ([None], "but not when the same batches are run again"),
        (["the output of a"], "first in the output of a"),
        ([None, "the output of a"], "first in the output of a on rank 1"),
        ([None, None], "but not when the same batches are run again"),
    ],
)
def test_the_rank_on_which_nan_begins_is_named(monkeypatch, found, message):
    trainer = types.SimpleNamespace(
        data_parallel_world_size=len(found), data_parallel_process_group=None
    )
    gathered = lambda own, _group: found  # noqa: E731
    monkeypatch.setattr(failed_updates.distributed_utils, "all_gather_list", gathered)
    assert failed_updates._of_ranks(trainer, found[0]) == message
