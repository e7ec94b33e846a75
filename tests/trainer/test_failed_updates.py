"""What is said of a failed update."""

import types

import torch

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
