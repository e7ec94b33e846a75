"""A layer's forward and backward pass as on a GPU: what the host waits for."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.routing import capacity, plan
from tests.gates.test_every_gate import cases, label, tokens
from tests.host_waits import HostWaits, pretend_a_gpu


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    pretend_a_gpu(monkeypatch)


PAIRS = "nonzero at routing/plan.py"
"""The number of pairs follows from the gate's choices."""
VARYING = ("dselect_k", "relu", "top_any", "top_p")


def needed(given):
    """The waits that there are, at most once each; the assignment of `base` is the host's."""
    name = given["moe_gate"]
    if name == "base":
        yield "routing/assignment.py"
    if (
        name in VARYING
        or given.get("moe_null_experts")
        or given.get("moe_second_expert_policy") == "random"
        or (name == "dense_to_sparse" and "moe_hard_updates" not in given)
    ):
        yield PAIRS
    if given.get("moe_capacity_factor"):
        yield "nonzero at routing/capacity.py"
        if name == "top_any":
            yield "_local_scalar_dense at layer.py"  # experts that are active
    if given.get("moe_top_p_weights") == "sparsemixer":
        yield "_local_scalar_dense at gates/top_p.py"  # steps of its loop


@pytest.mark.parametrize("given", list(cases(also_of_the_layer=True)), ids=label)
def test_a_training_step_waits_for_nothing_else(make_layer, given, as_on_a_gpu):
    layer = make_layer(**given, dtype=torch.float32)
    allowed = set(needed(given))
    for _ in range(2):  # the gate stable freezes its table in the first
        x, known = tokens(dtype=torch.float32)
        with HostWaits(allowed) as waits:
            y, aux, _ = layer(x, **known)
            (y.sum() + aux.sum()).backward()
        if given["moe_gate"] != "base":
            assert sorted(waits.found) == sorted(allowed)
        assert x.grad is not None


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("given", list(cases()), ids=label)
def test_a_plan_without_a_wait_is_the_same(make_layer, given, training, monkeypatch):
    layer = make_layer(**given).train(training)
    x, known = tokens()
    if not training:
        known["token_keys_T"] = None
    plans = []
    for waiting_costs in (True, False):
        for module in (plan, capacity):
            monkeypatch.setattr(module, "waiting_costs", lambda _, costs=waiting_costs: costs)
        plans.append(layer._within_capacity(layer.gate(x, layer.context(**known))))
    for name in ("token_ids_N", "expert_ids_N", "weights_N", "tokens_per_expert_E"):
        assert torch.equal(*(getattr(made, name) for made in plans)), name


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
    ):
        with pytest.raises(AssertionError, match="the host waits"), HostWaits():
            wait()
