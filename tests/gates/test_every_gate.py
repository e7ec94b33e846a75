"""What must hold for every gate, whichever way it chooses (design invariants 1 to 3, 5 and 10)."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.experts.reference import loop_moe, one_expert
from evomoe_plugin.gates import gate_class, gate_names
from evomoe_plugin.gates.auxiliary import LOSSES
from evomoe_plugin.routing import noise
from evomoe_plugin.routing import stats as st

T, D, F, E, V = 19, 6, 10, 5, 40

# What a gate needs to be used at all, and its ways that route differently.
NEEDED = {"expert_choice": {"moe_allow_noncausal": True}}
WAYS = {
    "base": [{}],
    "dense": [{}],
    "dense_to_sparse": [
        {"moe_temperature_start": 100.0},
        {"moe_temperature_start": 0.6, "moe_gate_threshold": 0.05},
        {
            "moe_temperature_start": 0.3,
            "moe_gate_threshold": 0.3,
            "moe_gate_noise": "none",
            "moe_temperature_scope": "token",
            "moe_bias_update_rate": 0.1,
            "moe_lexical": "hash:2",
        },
        {"moe_hard_updates": 0, "moe_combine_weights": "softmax", "moe_weight_scale": "unit"},
    ],
    "dselect_k": [{}, {"moe_smooth_step_width": 0.2}],
    "expert_choice": [{}],
    "gshard": [{"moe_second_expert_policy": policy} for policy in ("all", "random", "sampling")],
    "hash": [
        {"moe_hash": "random", "moe_weight_scale": "learned"},
        {"moe_hash": "balanced"},
        {"moe_hash": "clustered"},
    ],
    "relu": [{}],
    "stable": [{"moe_stable_updates": 50}, {"moe_stable_updates": 0}],
    "switch": [{}, {"moe_lexical": "normal:2", "moe_gate_centre": 0.9, "moe_gate_lr_factor": 3.0}],
    "top_any": [{}, {"moe_top_any_weights": "score", "moe_top_any_ste": "active"}],
    "top_k": [
        {},
        {"moe_top_k": 1},
        {"moe_top_k": 3, "moe_top_k_weights": "renormalized"},
        {"moe_sample_top_k": 1},
        {"moe_bias_update_rate": 0.1, "moe_weight_scale": "mean"},
    ],
    "top_p": [{"moe_top_p_weights": kind} for kind in ("softmax", "uniform", "sparsemixer")]
    + [{"moe_top_p": 0.0}, {"moe_top_p": 1.0}],
}
GATES = [name for name in gate_names() if name in WAYS]


# Gates whose every scorer, drop policy and kind of shared experts is tried. What differs there does
# not know which gate it belongs to, so the other gates take turns.
THOROUGH = ("dense_to_sparse", "top_k")


def scorers(name):
    """All of a gate with a choice, or one by turns, but for the linear one, which WAYS have."""
    cls = gate_class(name)
    if not hasattr(cls.Options, "moe_scorer"):
        return []
    others = [scorer for scorer in cls.capabilities.scorers if scorer != "linear"]
    return others if name in THOROUGH else [others[GATES.index(name) % len(others)]]


def extras(name):
    """What a layer of this gate may have beside the gate's own options."""
    can = gate_class(name).capabilities
    shared = [
        {"moe_shared_experts": 2, "moe_expert_gated": True},
        {"moe_shared_experts": 1, "moe_shared_combine": "mix", "moe_shared_ffn_dim": 3},
    ]
    if name == "top_k":
        shared.append({"moe_shared_experts": 2, "moe_shared_combine": "sigmoid"})
    softmax = {"moe_shared_experts": 2, "moe_shared_combine": "softmax"}
    capacities = [
        {
            "moe_capacity_factor": 0.7,
            "moe_drop_policy": policy,
            "moe_min_capacity": 1,
            "moe_eval_capacity_factor": 0.7,
            "moe_renormalize_after_drop": policy == "probs",
        }
        for policy in ("position", "probs", "random")
    ]
    if name in THOROUGH:
        return [
            *shared,
            softmax,
            {"moe_null_experts": 3},
            {"moe_null_experts": 2, **softmax},
            *capacities,
        ]
    turn = GATES.index(name)
    found = [shared[turn % 2]]
    if can.null_experts and can.logits:
        found.append({"moe_null_experts": 2, **softmax})
    elif can.logits:
        found.append(softmax)
    elif can.null_experts:
        found.append({"moe_null_experts": 3})
    if can.capacity:
        found.append(capacities[turn % 3])
    return found


def cases(of_the_gate=True, also_of_the_layer=False):
    """A set of options for each way of each gate, and for what their layers may have."""
    for name in GATES:
        ways = [*WAYS[name], *({"moe_scorer": scorer} for scorer in scorers(name))]
        for given in [*(ways if of_the_gate else []), *(extras(name) if also_of_the_layer else [])]:
            yield {"moe_gate": name, **NEEDED.get(name, {}), **given}


def label(given):
    return "-".join(
        str(value) if key in ("moe_gate", "moe_scorer") else f"{key[4:]}={value}"
        for key, value in given.items()
        if key != "moe_allow_noncausal"
    )


def every(**kwargs):
    return pytest.mark.parametrize("given", list(cases(**kwargs)), ids=label)


def tokens(count=T, scale=1.0, dtype=torch.float64):
    x = (torch.randn(count, D, dtype=dtype) * scale).requires_grad_()
    ids = torch.randint(0, V, (count,))
    return x, {"token_keys_T": noise.sequence_keys(ids.unsqueeze(0))[0], "token_ids_T": ids}


def slow(layer, x, plan):
    """The layer, pair by pair."""
    y = loop_moe(x, plan, layer.experts)
    if layer.shared is None:
        return y
    stack, weights = layer.shared.experts, plan.shared_weights_TS
    rows = []
    for t in range(x.size(0)):
        parts = [
            one_expert(x[t], stack, s) * (1 if weights is None else weights[t, s])
            for s in range(stack.num_experts)
        ]
        rows.append(sum(parts))
    return y + torch.stack(rows)


def test_every_registered_gate_is_here():
    """A gate of the package that is missing in WAYS would go untested."""
    ours = [
        name for name in gate_names() if gate_class(name).__module__.startswith("evomoe_plugin.")
    ]
    assert sorted(WAYS) == ours


@pytest.mark.parametrize(
    "given, training, padding",
    [
        pytest.param(
            given,
            training,
            padding,
            id="-".join(
                [label(given), "training" if training else "evaluation", *["padding"] * padding]
            ),
        )
        for i, given in enumerate(cases(also_of_the_layer=True))
        for training, padding in [(True, i % 2 == 0), (False, i % 2 == 1)]
    ],
)
def test_fast_path_equals_the_loop_oracle(make_layer, given, padding, training):
    layer = make_layer(**given).train(training)
    x, known = tokens()
    mask = torch.rand(T) < 0.7 if padding else None
    if not training:
        known["token_keys_T"] = None
    y, aux, _ = layer(x, mask, **known)
    plan = layer._within_capacity(layer.gate(x, layer.context(mask, **known)))
    oracle = slow(layer, x, plan)
    assert torch.allclose(y, oracle, atol=1e-9)
    wanted = [x, *layer.parameters()]
    seed = torch.randn_like(y)
    got = torch.autograd.grad(y, wanted, seed, retain_graph=True, allow_unused=True)
    slowly = torch.autograd.grad(oracle, wanted, seed, allow_unused=True)
    for value, *grads in zip(wanted, got, slowly, strict=True):
        a, b = (torch.zeros_like(value) if grad is None else grad for grad in grads)
        assert torch.allclose(a, b, atol=1e-9)


@every(also_of_the_layer=True)
def test_pairs_are_conserved(make_layer, given):
    layer = make_layer(**given)
    x, known = tokens()
    mask = torch.rand(T) < 0.8
    asked = layer.gate(x, layer.context(mask, **known))
    plan = layer._within_capacity(asked)
    for p in (asked, plan):
        pairs = list(zip(p.expert_ids_N.tolist(), p.token_ids_N.tolist(), strict=True))
        assert pairs == sorted(set(pairs))  # by expert, then token, none twice
        assert p.tokens_per_expert_E.tolist() == p.expert_ids_N.bincount(minlength=E).tolist()
        assert mask[p.token_ids_N].all()
        assert p.weights_N.isfinite().all()
    dropped = plan.stats.get(st.DROPPED, torch.zeros(()))
    assert plan.num_pairs + int(dropped) == asked.num_pairs
    if layer.capacity:
        most = layer.capacity.capacity(
            num_pairs=asked.tokens_per_expert_E.sum(), num_tokens=mask.sum().double(), num_experts=E
        )
        assert plan.tokens_per_expert_E.max() <= most
        assert int(dropped) > 0
    assert plan.stats[st.PAIRS] == plan.num_pairs
    assert plan.stats[st.TOKENS] == mask.sum()


@every(also_of_the_layer=True)
def test_cost_follows_the_pairs(make_layer, given):
    layer = make_layer(dtype=torch.float32, **given)
    x, known = tokens(dtype=torch.float32)
    gate = copy.deepcopy(layer.gate)
    with FlopCounterMode(display=False) as alone:
        gate(x, layer.context(**known))
    with FlopCounterMode(display=False) as whole:
        _, _, stats = layer(x, **known)
    pairs = int(stats[st.PAIRS])
    experts = 2 * layer.experts.num_matrices(layer.experts.gated) * pairs * D * F
    if layer.shared is not None:
        stack = layer.shared.experts
        experts += 2 * stack.num_matrices(stack.gated) * T * stack.fc1_weight.numel()
        # counted per expert above: numel is S * F * D, and every expert sees T rows
    assert whole.get_total_flops() - alone.get_total_flops() == experts


@every()
def test_padding_is_routed_nowhere_and_changes_nothing(make_layer, given):
    layer = make_layer(**given)
    x, known = tokens()
    mask = torch.rand(T) < 0.6
    y, aux, stats = layer(x, mask, **known)
    assert not y[~mask].any()
    alone = {name: value[mask] for name, value in known.items()}
    y_alone, aux_alone, stats_alone = layer(x[mask], None, **alone)
    assert torch.allclose(y[mask], y_alone)
    assert torch.allclose(aux, aux_alone)
    torch.testing.assert_close(stats, stats_alone)
    wild = x.detach().clone()
    wild[~mask] = 1e6
    y_wild, aux_wild, _ = layer(wild, mask, **known)
    assert torch.allclose(y_wild[mask], y[mask])
    assert torch.allclose(aux_wild, aux)


@every(also_of_the_layer=False)
def test_evaluation_does_not_depend_on_the_batch(make_layer, given):
    layer = make_layer(**given).eval()
    x, known = tokens()
    ids = known["token_ids_T"]
    whole = layer(x, token_ids_T=ids)[0]
    for t in range(T):
        alone = layer(x[t : t + 1], token_ids_T=ids[t : t + 1])[0]
        assert torch.allclose(alone[0], whole[t], atol=1e-9)


@every(also_of_the_layer=True)
def test_the_same_again_in_the_second_forward_of_checkpointing(make_layer, given):
    layer = make_layer(**given)
    x, known = tokens()
    first, second = layer(x, **known), layer(x, **known)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    zeros, stats = layer.zero_stats(), first[2]  # of a layer that LayerDrop skips
    assert {name: value.shape for name, value in zeros.items()} == {
        name: value.shape for name, value in stats.items()
    }
    assert not any(value.any() for value in zeros.values())


def odd_batch(layer, kind):
    """The layer on a batch of this kind: nothing that leaves it, forward or back, is NaN."""
    count = {"no token": 0, "one token": 1}.get(kind, T)
    x, known = tokens(count, dtype=torch.float32)
    with torch.no_grad():
        if kind == "equal":
            x[:] = x[0]
        elif kind == "huge":
            x.mul_(1e6)
        elif kind == "zero":
            x.zero_()
    mask = torch.zeros(count, dtype=torch.bool) if kind == "only padding" else None
    if not layer.training:
        known["token_keys_T"] = None
    y, aux, stats = layer(x, mask, **known)
    (y.sum() * 1e-6 + aux.sum()).backward()
    assert y.isfinite().all()
    assert aux.isfinite().all()
    assert all(value.isfinite().all() for value in stats.values())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert x.grad is None or x.grad.isfinite().all()


@every()
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_odd_batches_give_numbers(make_layer, given, training):
    for kind in ("no token", "one token", "only padding", "equal", "huge", "zero"):
        odd_batch(make_layer(dtype=torch.float32, **given).train(training), kind)


@every(of_the_gate=False, also_of_the_layer=True)
def test_odd_batches_give_numbers_with_all_else_that_a_layer_may_have(make_layer, given):
    for kind in ("no token", "only padding", "huge"):
        odd_batch(make_layer(dtype=torch.float32, **given), kind)


@every()
def test_one_expert(make_layer, given):
    if given.get("moe_top_k", 2) > 1 and hasattr(
        gate_class(given["moe_gate"]).Options, "moe_top_k"
    ):
        given = {**given, "moe_top_k": 1, "moe_sample_top_k": 0}
        options = gate_class(given["moe_gate"]).Options
        given = {k: v for k, v in given.items() if k != "moe_sample_top_k" or hasattr(options, k)}
    try:
        layer = make_layer(num_experts=1, **given)
    except OptionError as refusal:
        assert "moe-expert-count" in str(refusal)
        return
    x, known = tokens()
    y, aux, _ = layer(x, **known)
    assert y.isfinite().all()
    assert aux.isfinite().all()


@every()
def test_every_loss_that_the_gate_can_have(make_layer, given):
    can = gate_class(given["moe_gate"]).capabilities
    nulls = {"moe_null_experts": 2, "moe_null_rate_target": 0.3} if can.null_experts else {}
    possible = []
    for name in (*LOSSES, *can.losses):
        extra = nulls if name == "null" else {}
        try:
            layer = make_layer(**given, **extra, moe_aux=f"{name}=0.5")
        except OptionError as refusal:
            assert name in str(refusal)
            assert name not in ("balance", "switch", "mi", "importance", "entropy", *can.losses)
            continue
        possible.append(name)
        x, known = tokens()
        _, aux, _ = layer(x, torch.rand(T) < 0.8, **known)
        assert layer.gate.aux_names == (name,)
        assert aux.shape == (1,)
        assert aux.isfinite().all()
        if aux.requires_grad:
            parameters = [p for p in layer.gate.parameters() if p.requires_grad]
            for grad in torch.autograd.grad(aux.sum(), parameters, allow_unused=True):
                assert grad is None or grad.isfinite().all()
    both = "balance=0.1,entropy=0.2"
    layer = make_layer(**given, moe_aux=both)
    x, known = tokens()
    assert layer(x, **known)[1].shape == (2,)


@every()
def test_state_dict_brings_back_the_same_evaluation(make_layer, given):
    torch.manual_seed(1)
    layer = make_layer(**given)
    layer.set_num_updates(20)
    torch.manual_seed(2)
    other = make_layer(**given)
    other.load_state_dict(layer.state_dict())
    x, known = tokens()
    ids = known["token_ids_T"]
    ours, theirs = (m.eval()(x, token_ids_T=ids) for m in (layer, other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@every()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_compute_in_fp32_in_half_precision_models(make_layer, given, dtype):
    layer = make_layer(dtype=torch.float32, **given)
    layer.gate.to(dtype)
    x, known = tokens(dtype=torch.float32)
    x = x.detach().to(dtype)
    plan = layer.gate(x, layer.context(**known))
    assert plan.weights_N.dtype == torch.float32
    exact = copy.deepcopy(layer.gate).float()
    wanted = exact(x.float(), layer.context(**known))
    assert torch.equal(plan.expert_ids_N, wanted.expert_ids_N)
    assert torch.equal(plan.weights_N, wanted.weights_N)


@every()
def test_noise_comes_from_the_keys_alone(make_layer, given):
    """torch's generator is not touched, so that dropout is the same with noise or without."""
    layer = make_layer(**given)
    x, known = tokens()
    before = torch.get_rng_state()
    layer(x, **known)
    assert torch.equal(before, torch.get_rng_state())


@every()
def test_every_parameter_has_a_gradient_without_auxiliary_losses(make_layer, given):
    """DistributedDataParallel waits for one of each, in every step."""
    layer = make_layer(**given, moe_aux="none")
    x, known = tokens()
    layer(x, **known)[0].sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@every(also_of_the_layer=True)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_gpu_gives_the_same(make_layer, given, training):
    layer = make_layer(**given).train(training)
    x, known = tokens()
    if not training:
        known["token_keys_T"] = None
    mask = torch.rand(T) < 0.7
    there = copy.deepcopy(layer).cuda()
    x2 = x.detach().cuda().requires_grad_()
    known2 = {name: None if ids is None else ids.cuda() for name, ids in known.items()}
    y, aux, stats = layer(x, mask, **known)
    y2, aux2, stats2 = there(x2, mask.cuda(), **known2)
    atol = 1e-5 if training else 1e-9  # noise is drawn in fp32
    assert torch.allclose(y2.cpu(), y, atol=atol)
    assert torch.allclose(aux2.cpu(), aux, atol=1e-6)
    for name, value in stats.items():
        assert torch.allclose(stats2[name].cpu(), value, atol=1e-6), name
    seed = torch.randn_like(y)
    (y * seed).sum().backward()
    (y2 * seed.cuda()).sum().backward()
    for a, b in zip([x, *layer.parameters()], [x2, *there.parameters()], strict=True):
        assert torch.allclose(b.grad.cpu(), a.grad, atol=atol)
