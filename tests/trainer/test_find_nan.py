"""NaN ends a run in one line that names the module in which it begins, and leaves crash.pt."""

import pytest
import torch
from torch import nn

from evomoe_plugin.experts.ffn import ExpertFFN
from evomoe_plugin.routing import waits
from evomoe_plugin.trainer.find_nan import first_not_finite
from evomoe_plugin.trainer.moe_trainer import MoETrainer
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


def in_the_forward_pass(output):
    return output * NAN


def in_the_backward_pass(output):
    output.register_hook(lambda gradient: gradient * NAN)
    return output


IN_GRADIENT = "update 1: gradients are Nan/Inf, first in the gradient of "
IN_FORWARD = "the output of decoder.layers.1 is NaN/Inf; stopped before the optimizer step"


@pytest.mark.parametrize("backend", ["legacy_ddp", "fully_sharded", "fsdp2"])
@pytest.mark.parametrize("waits_later", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"), [(in_the_forward_pass, IN_FORWARD), (in_the_backward_pass, IN_GRADIENT)]
)
def test_a_run_ends_in_one_line_and_leaves_what_it_was_at(
    runs, monkeypatch, capsys, spoil, message, waits_later, backend
):
    """Wherever NaN begins, and whether the host waits for the forward pass or, as on GPUs, not."""
    forward = ExpertFFN.forward
    monkeypatch.setattr(ExpertFFN, "forward", lambda *args, **kw: spoil(forward(*args, **kw)))
    monkeypatch.setattr(waits, "waiting_costs", lambda _: waits_later)
    options = "--ddp-backend", backend, "--no-save"
    run = runs.train("run", *MOE, *options, updates=1)
    assert run.status == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert message in line
    weights = run.checkpoint("crash.pt")["model"]
    assert all(value.isfinite().all() for value in weights.values())
    assert weights["decoder.embed_tokens.weight"].shape[1] == 32


def test_crash_pt_of_half_precision_has_the_weights_that_are_trained(runs, monkeypatch):
    forward = ExpertFFN.forward
    monkeypatch.setattr(ExpertFFN, "forward", lambda *args, **kw: forward(*args, **kw) * NAN)
    options = *MOE, "--ddp-backend", "fully_sharded", "--no-save"
    exact, *others = (
        runs.train(name, *options, *precision, updates=1).checkpoint("crash.pt")["model"]
        for name, *precision in (["fp32"], ["bf16", "--bf16"], ["fp16", "--fp16"])
    )
    for weights in others:
        torch.testing.assert_close(weights, exact, rtol=0, atol=0)


def test_a_run_begins_from_crash_pt(runs, monkeypatch, capsys):
    clip = MoETrainer.clip_grad_norm

    def clip_grad_norm(trainer, clip_norm):
        return clip(trainer, clip_norm) * (NAN if trainer.get_num_updates() == 1 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(MoETrainer, "clip_grad_norm", clip_grad_norm)
        run = runs.train("failed", *MOE, updates=2)
    crashed = run.folder / "crash.pt"
    began = run.checkpoint("crash.pt")["model"]
    restored = *MOE, "--restore-file", crashed
    assert runs.train("on", *restored, updates=2).status == 2
    assert f"--restore-file {crashed}: does not say how far the run was" in capsys.readouterr().err

    first = *restored, "--reset-dataloader", "--lr", "1e-30"
    anew = runs.train("first batch", *first, updates=2)
    assert anew.status == 0 and sorted(anew.losses()) == [2]
    assert is_same(anew.checkpoint()["model"], began)
    moments = anew.checkpoint()["last_optimizer_state"]["state"]
    assert {entry["step"] for entry in moments.values()} == {2}

    # Another seed: its own initial weights differ.
    given = ("--finetune-from-model", crashed, "--lr", "1e-30", "--seed", 5)
    anew = runs.train("anew", *MOE, *given, updates=1)
    assert anew.status == 0 and sorted(anew.losses()) == [1]
    assert is_same(anew.checkpoint()["model"], began)


def is_same(weights, began):
    name = "decoder.embed_tokens.weight"
    return torch.allclose(weights[name], began[name], rtol=1e-6)
