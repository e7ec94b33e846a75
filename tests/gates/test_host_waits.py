"""A layer's forward and backward pass as on a GPU: what the host waits for."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.routing import waits
from evomoe_plugin.routing.stability import token_routing
from tests.gates.test_every_gate import cases, label, tokens
from tests.host_waits import HostWaits, pretend_a_gpu

INTERPRETED = not torch.cuda.is_available()
COUNTED = (
    "_local_scalar_dense at routing/kernels/pairs.py"
    if INTERPRETED
    else "nonzero at routing/plan.py"
)
"""The number of pairs, which follows from the gate's choices."""
VARYING = ("dselect_k", "relu", "top_any", "top_p")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    pretend_a_gpu(monkeypatch)


def needed(given, is_large):
    """The waits that there are, at most once each; the assignment of `base` is the host's."""
    name = given["moe_gate"]
    if name == "base":
        yield "routing/assignment.py"
    if given.get("moe_top_p_weights") == "sparsemixer":
        yield "_local_scalar_dense at gates/top_p.py"  # steps of its loop
    is_soft = name == "dense_to_sparse" and "moe_hard_updates" not in given
    if is_large and (name in VARYING or is_soft):
        yield COUNTED


@pytest.mark.parametrize("given", list(cases(also_of_the_layer=True)), ids=label)
def test_a_training_step_waits_for_nothing_else(make_layer, given, as_on_a_gpu, monkeypatch):
    layer = make_layer(**given, dtype=torch.float32)
    # The gate stable freezes its table in the first of two steps.
    for is_large in (True, False):
        allowed = set(needed(given, is_large))
        monkeypatch.setattr(waits, "MOST_UNCOUNTED", 0 if is_large else 2**16)
        x, known = tokens(dtype=torch.float32)
        with HostWaits(allowed) as found:
            y, aux, _ = layer(x, **known)
            (y.sum() + aux.sum()).backward()
        if given["moe_gate"] != "base":
            assert sorted(found.found) == sorted(allowed)
        assert x.grad is not None


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("given", list(cases(also_of_the_layer=True)), ids=label)
def test_a_plan_without_a_wait_is_the_same(make_layer, given, training, monkeypatch):
    """Outputs, gradients and where tokens go too: rows of no pair count for nothing."""
    layer = make_layer(**given).train(training)
    results = []
    for waiting_costs in (True, False):
        monkeypatch.setattr(waits, "waiting_costs", lambda _, costs=waiting_costs: costs)
        torch.manual_seed(0)
        x, known = tokens()
        if not training:
            known["token_keys_T"] = None
        plan = layer._within_capacity(layer.gate(x, layer.context(**known)))
        size = int(plan.tokens_per_expert_E.sum())
        y = layer.experts(x, plan)
        layer.zero_grad()
        sum([y.square().sum(), *plan.aux.values()]).backward()
        assert plan.weights_N[size:].eq(0).all() and plan.token_ids_N[size:].eq(-1).all()
        routing = token_routing(plan)
        plan = plan.first(size)
        fields = plan.token_ids_N, plan.expert_ids_N, plan.weights_N, plan.tokens_per_expert_E
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        results.append([*fields, *routing.values(), y, x.grad, *grads])
    for on_a_gpu, on_a_cpu in zip(*results, strict=True):
        assert torch.equal(on_a_gpu, on_a_cpu)


def test_the_dense_phase_waits_for_nothing(make_layer, as_on_a_gpu):
    layer = make_layer(moe_gate="top_k", moe_spawn_updates=5, dtype=torch.float32)
    x, known = tokens(dtype=torch.float32)
    with HostWaits():
        y, aux, _ = layer(x, **known)
        (y.sum() + aux.sum()).backward()


def test_waits_are_seen():
    x = torch.randn(3, requires_grad=True)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 0).any()),
        lambda: x[x > 0],
        lambda: (x > 0).nonzero(),
        lambda: torch.tensor(1.0, device=x.device),
        lambda: torch.repeat_interleave(x, torch.ones(3, dtype=torch.int64)),
        lambda: torch.equal(x, x),
        lambda: x.detach().tolist(),
        lambda: x.detach().cpu(),
        lambda: x.detach().numpy(),
        lambda: x.detach().to("cpu"),
    ):
        with pytest.raises(AssertionError, match="the host waits"), HostWaits():
            wait()
