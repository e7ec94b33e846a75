"""NaN ends a run in one line that names the module in which it begins."""

import torch
from torch import nn

from evomoe_plugin.experts.ffn import ExpertFFN
from evomoe_plugin.trainer.find_nan import first_not_finite
from tests.patches.test_commands import MOE

NAN = float("nan")


class Inner(nn.Module):
    """As gates do, it returns what is no tensor."""

    def __init__(self, output):
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(1)), output

    def forward(self, x):
        return {"plan": object(), "outputs": [x * self.weight, torch.tensor(self.output)]}


def test_the_first_module_is_named_then_the_first_gradient():
    x = torch.ones(1)
    model = nn.ModuleDict({"good": Inner(1.0), "bad": Inner(NAN), "later": Inner(NAN)})
    run = lambda: [module(x) for module in model.values()]  # noqa: E731
    assert first_not_finite(model, run) == "the output of bad"
    assert not any(module._forward_hooks for module in model.modules())
    model = nn.ModuleDict({"good": Inner(1.0), "bad": Inner(1.0)})

    def backward(factor):
        for module in model.values():
            module.weight.grad = None
        (model["bad"](x)["outputs"][0] * factor).sum().backward()

    assert first_not_finite(model, lambda: backward(NAN)) == "the gradient of bad.weight"
    assert first_not_finite(model, lambda: backward(1.0)) is None


def test_a_run_of_a_moe_model_ends_in_one_line(runs, monkeypatch, capsys):
    forward = ExpertFFN.forward

    def broken(experts, *args, **kwargs):
        output = forward(experts, *args, **kwargs)
        output.register_hook(lambda gradient: gradient * NAN)
        return output

    monkeypatch.setattr(ExpertFFN, "forward", broken)
    assert runs.train("run", *MOE, updates=1).status == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "update 1: gradients are Nan/Inf, first in the gradient of decoder." in line
