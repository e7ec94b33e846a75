import math

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.dselect_k import LEAST_VALID_MASS, DSelectKGate

T, D = 17, 8


@pytest.fixture
def make_gate(moe_options):
    """A gate whose bits are partly hard, unless `scale` is given."""

    def make(experts=8, scale=8.0, **given):
        gate = DSelectKGate(LayerInfo(D, experts), moe_options(moe_gate="dselect_k", **given))
        with torch.no_grad():
            gate.weight.mul_(scale)
        return gate

    return make


def dense(plan, experts, tokens=T):
    weights = torch.zeros(tokens, experts, dtype=plan.weights_N.dtype)
    weights[plan.token_ids_N, plan.expert_ids_N] = plan.weights_N.detach()
    return weights


def by_hand(gate, x, width):
    """Weights of the experts, and both losses, a token, selector, expert and bit at a time."""
    E, K = gate.num_experts, gate.selectors
    bits = math.ceil(math.log2(E))
    logits = (x @ gate.weight.T).tolist()
    rows, entropy, invalid = [], 0.0, 0.0
    for row in logits:
        alpha = torch.tensor(row[:K]).softmax(0).tolist()
        weights = [0.0] * E
        for i in range(K):
            z = row[K + i * bits : K + (i + 1) * bits]
            steps = [
                1.0
                if v >= width / 2
                else 0.0
                if v <= -width / 2
                else -2 * v**3 / width**3 + 3 * v / (2 * width) + 0.5
                for v in z
            ]
            selected = [0.0] * E
            valid = 0.0
            for code in range(2**bits):
                r = 1.0
                for b in range(bits):
                    r *= steps[b] if code >> b & 1 else 1 - steps[b]
                expert = code
                if code < E:
                    valid += r
                else:  # the valid codes that differ in the fewest bits: the highest one is off
                    expert = code - 2 ** (bits - 1)
                    assert min((code ^ e).bit_count() for e in range(E)) == 1
                selected[expert] += r
            for e in range(E):
                weights[e] += alpha[i] * selected[e]
                if selected[e] > 0:
                    entropy -= selected[e] * math.log(selected[e])
            invalid += 1 / max(valid, LEAST_VALID_MASS) - 1
        rows.append(weights)
    return torch.tensor(rows), entropy / len(rows), invalid / len(rows)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("width", [0.5, 1.0])
def test_against_a_loop_over_selectors_codes_and_bits(make_gate, experts, width):
    gate = make_gate(experts, moe_top_k=min(3, experts), moe_smooth_step_width=width)
    x = torch.randn(T, D)
    plan = gate(x, GateContext())
    weights, entropy, invalid = by_hand(gate, x, width)
    assert torch.allclose(dense(plan, experts), weights, atol=1e-5)
    assert plan.num_pairs == (weights > 0).sum()
    assert torch.allclose(dense(plan, experts).sum(1), torch.ones(T))
    assert plan.aux["selector_entropy"].item() == pytest.approx(entropy, abs=1e-4)
    assert plan.aux["selector_validity"].item() == pytest.approx(invalid, abs=1e-4)


@pytest.mark.parametrize("experts", [2, 5, 8, 16, 60])
def test_every_token_reaches_every_expert_at_the_start(make_gate, experts):
    gate = make_gate(experts, scale=1.0)
    plan = gate(torch.randn(T, D), GateContext())
    assert plan.num_pairs == T * experts
    assert len(set(plan.weights_N.tolist())) > 1  # and not all alike, or they could not part


def test_pairs_fall_to_the_selectors_as_bits_harden(make_gate):
    x = torch.randn(T, D)
    pairs = [
        make_gate(16, scale=scale)(x, GateContext()).num_pairs / T for scale in (1, 5, 20, 1e4)
    ]
    assert pairs == sorted(pairs, reverse=True)
    assert pairs[0] == 16
    assert 1 <= pairs[-1] <= 2


def test_a_hard_selector_is_a_code(make_gate):
    gate = make_gate(8, moe_top_k=1)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[1:, :3] = torch.diag(torch.ones(3))  # bit b is the sign of x_b
    signs = torch.tensor([[1.0 if e >> b & 1 else -1.0 for b in range(3)] for e in range(8)])
    plan = gate(torch.cat([signs, torch.zeros(8, D - 3)], 1), GateContext())
    assert plan.token_ids_N.tolist() == plan.expert_ids_N.tolist() == list(range(8))
    assert plan.weights_N.tolist() == [1.0] * 8
    assert plan.aux["selector_entropy"] == plan.aux["selector_validity"] == 0


def test_a_token_without_valid_mass_goes_to_the_nearest_valid_code(make_gate):
    gate = make_gate(5, moe_top_k=1)
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[1:, :3] = torch.diag(torch.ones(3))
    x = torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])  # codes 5, 6, 7
    x = torch.cat([x, torch.zeros(3, D - 3)], 1).requires_grad_()
    plan = gate(x, GateContext())
    assert plan.expert_ids_N.tolist() == [1, 2, 3]
    assert plan.weights_N.tolist() == [1.0] * 3
    assert plan.aux["selector_validity"].item() == pytest.approx(1 / LEAST_VALID_MASS - 1)
    (plan.weights_N.sum() + sum(plan.aux.values())).backward()
    assert x.grad.isfinite().all()
    assert gate.weight.grad.isfinite().all()


def test_validity_pushes_mass_off_the_spare_codes(make_gate):
    gate = make_gate(5, scale=1.0, moe_top_k=1)
    x = torch.randn(T, D) + 1
    optimizer = torch.optim.SGD([gate.weight], lr=0.02)
    values = []
    for _ in range(20):
        loss = gate(x, GateContext()).aux["selector_validity"]
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("experts", [2, 4, 8])
def test_validity_is_nothing_for_powers_of_2(make_gate, experts):
    gate = make_gate(experts).double()
    loss = gate(torch.randn(T, D).double(), GateContext()).aux["selector_validity"]
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert gate.weight.grad.abs().max() < 1e-12


@pytest.mark.parametrize("experts", [5, 8])
def test_gradcheck(make_gate, experts):
    gate = make_gate(experts, scale=4.0).double()
    x = torch.randn(T, D, dtype=torch.float64, requires_grad=True)

    def outputs(x, weight):
        plan = torch.func.functional_call(gate, {"weight": weight}, (x, GateContext()))
        return plan.weights_N, *plan.aux.values()

    assert torch.autograd.gradcheck(outputs, (x, gate.weight), fast_mode=True)


def test_padding_and_token_weights(make_gate):
    gate = make_gate(6)
    x, mask, weight = torch.randn(T, D), torch.rand(T) < 0.6, torch.rand(T)
    alone = gate(x[mask], GateContext(token_weights_T=weight[mask]))
    x[~mask] = 1e30
    plan = gate(x, GateContext(token_mask_T=mask, token_weights_T=weight))
    assert torch.allclose(dense(plan, 6)[mask], dense(alone, 6, int(mask.sum())))
    assert not dense(plan, 6)[~mask].any()
    for name, loss in alone.aux.items():
        assert plan.aux[name].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e30, -1e30])
@pytest.mark.parametrize("experts, tokens", [(8, T), (5, T), (5, 1), (5, 0)])
def test_odd_batches(make_gate, training, scale, experts, tokens):
    gate = make_gate(experts).train(training)
    plan = gate(torch.full((tokens, D), scale), GateContext())
    assert torch.allclose(dense(plan, experts, tokens).sum(1), torch.ones(tokens))
    (plan.weights_N.sum() + sum(plan.aux.values())).backward()
    assert gate.weight.grad.isfinite().all()


def test_one_expert(make_gate):
    gate = make_gate(1, moe_top_k=1)
    plan = gate(torch.randn(T, D), GateContext())
    assert plan.weights_N.tolist() == [1.0] * T
    assert [loss.item() for loss in plan.aux.values()] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_have_an_fp32_gate(make_gate, dtype):
    gate = make_gate(6).to(dtype)
    x = torch.randn(T, D).to(dtype)
    plan = gate(x, GateContext())
    assert plan.weights_N.dtype == torch.float32
    exact = make_gate(6)
    exact.load_state_dict(gate.state_dict())
    assert torch.equal(dense(plan, 6), dense(exact(x.float(), GateContext()), 6))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_top_k": 0}, "--moe-top-k 0: give 1 or more"),
        ({"moe_top_k": 5, "moe_expert_count": "4"}, "--moe-top-k 5: an MoE layer has 4 candidates"),
        ({"moe_smooth_step_width": 0.0}, "--moe-smooth-step-width 0.0: give a width above 0"),
        ({"moe_smooth_step_width": -1.0}, "--moe-smooth-step-width -1.0"),
        ({"moe_smooth_step_width": float("inf")}, "--moe-smooth-step-width inf"),
        ({"moe_null_experts": 1}, "--moe-null-experts 1: the gate dselect_k cannot select"),
        ({"moe_scorer": "mlp"}, "--moe-scorer mlp: the gate dselect_k does not use it"),
        ({"moe_aux": "z=1"}, "the gate dselect_k has no logits"),
    ],
)
def test_bad_values(moe_options, given, message):
    with pytest.raises(OptionError) as error:
        validate(moe_options(moe_gate="dselect_k", **given))
    assert message in str(error.value)


def test_defaults_pass_without_a_word(moe_options, caplog):
    validate(moe_options(moe_gate="dselect_k"))
    assert not caplog.text
