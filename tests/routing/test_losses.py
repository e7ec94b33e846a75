"""Every loss against its formula written out by hand, values and gradients, and without padding."""

import math

import pytest
import torch

from evomoe_plugin.routing import losses

T, C = 9, 4


def dense(name, logits, mask, weight):
    """The loss, token by token and candidate by candidate, in plain Python on fp64 scalars."""
    tokens = [t for t in range(len(logits)) if weight is None or weight[t] > 0]
    share = [1.0 if weight is None else float(weight[t]) for t in tokens]
    total = sum(share)
    columns = range(logits.size(1))
    z = [[logits[t, c] for c in columns] for t in tokens]
    p = []
    for row in z:
        top = max(float(v.detach()) for v in row)
        powers = [(v - top).exp() for v in row]
        p.append([v / sum(powers) for v in powers])
    mean_p = [sum(w * row[c] for w, row in zip(share, p, strict=True)) / total for c in columns]
    load = [
        sum(w * float(mask[t, c]) for w, t in zip(share, tokens, strict=True)) / total
        for c in columns
    ]
    entropy = (
        sum(w * -sum(v * v.log() for v in row) for w, row in zip(share, p, strict=True)) / total
    )
    if name == "balance":
        return len(columns) * sum(a * b for a, b in zip(mean_p, load, strict=True))
    if name == "switch":
        return len(columns) * sum(a * b for a, b in zip(mean_p, load, strict=True)) / sum(load)
    if name == "entropy":
        return entropy
    if name == "mi":
        return sum(v * v.log() for v in mean_p) + entropy
    if name == "importance":
        mean = sum(mean_p) / len(mean_p)
        return sum((v - mean) ** 2 for v in mean_p) / len(mean_p) / mean**2
    if name == "z":
        return (
            sum(w * sum(v.exp() for v in row).log() ** 2 for w, row in zip(share, z, strict=True))
            / total
        )
    if name == "null":
        return (mean_p[-2] + mean_p[-1] - 0.3) ** 2
    if name == "load":
        smooth = []
        for c in columns:
            chance = 0
            for w, t in zip(share, tokens, strict=True):
                others = [logits[t, o] for o in columns if o != c]
                others.sort(key=lambda z: z.item(), reverse=True)
                k = int(mask[t].sum())
                if k == len(columns):
                    chance = chance + w
                elif k > 0:
                    x = (logits[t, c] - others[k - 1]) / 0.25
                    chance = chance + w * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
            smooth.append(chance / total)
        mean = sum(smooth) / len(smooth)
        return sum((v - mean) ** 2 for v in smooth) / len(smooth) / mean**2
    raise AssertionError(name)


def ours(name, logits, mask, weight):
    probs = logits.softmax(1)
    return {
        "balance": lambda: losses.balance_loss(probs_TC=probs, mask_TC=mask, weight_T=weight),
        "switch": lambda: losses.switch_loss(probs_TC=probs, mask_TC=mask, weight_T=weight),
        "entropy": lambda: losses.entropy_loss(probs_TC=probs, weight_T=weight),
        "mi": lambda: losses.mutual_information_loss(probs_TC=probs, weight_T=weight),
        "importance": lambda: losses.importance_loss(probs_TC=probs, weight_T=weight),
        "z": lambda: losses.z_loss(logits_TC=logits, weight_T=weight),
        "load": lambda: losses.load_loss(
            logits_TC=logits, mask_TC=mask, noise=0.25, weight_T=weight
        ),
        "null": lambda: losses.null_rate_loss(
            probs_TC=probs, num_null=2, target=0.3, weight_T=weight
        ),
    }[name]()


NAMES = ["balance", "switch", "entropy", "mi", "importance", "z", "load", "null"]
WEIGHTS = {
    "none": None,
    "padding": torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]).bool(),
    "response tokens": torch.tensor([1.0, 1, 10, 10, 0, 1, 10, 1, 0]),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("picks", [1, 2, C])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_by_hand(name, picks, weight):
    logits = torch.randn(T, C, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(T, C, dtype=torch.bool)
    mask.scatter_(1, logits.topk(picks).indices, True)
    if weight is not None:
        mask &= weight.bool().unsqueeze(1)
    loss, oracle = ours(name, logits, mask, weight), dense(name, logits, mask, weight)
    assert loss.item() == pytest.approx(float(oracle), abs=1e-12)
    (got,) = torch.autograd.grad(loss, logits)
    wanted = torch.zeros_like(logits)  # of the load if every candidate is selected: a constant
    if (name, picks) != ("load", C):
        (wanted,) = torch.autograd.grad(oracle, logits)
        assert wanted.any()
    assert torch.allclose(got, wanted, atol=1e-12)


def selection(logits, k_T):
    """The k largest logits of each token, k its own."""
    return logits.argsort(1, descending=True).argsort(1) < k_T.unsqueeze(1)


def test_the_load_only_sees_differences_of_logits():
    """Numbers of candidates that differ, as with top-p and top-any."""
    logits = torch.randn(T, C, dtype=torch.float64, requires_grad=True)
    mask = selection(logits.detach(), torch.arange(T) % (C + 1))

    def load(z):
        return losses.load_loss(logits_TC=z, mask_TC=mask, noise=1.0)

    assert torch.autograd.gradcheck(load, logits)
    (grad,) = torch.autograd.grad(load(logits), logits)
    assert torch.allclose(grad.sum(1), torch.zeros(T, dtype=torch.float64), atol=1e-15)
    assert grad.any(1).tolist() == [0 < t % (C + 1) < C for t in range(T)]


def test_of_equal_logits_each_is_the_others_threshold():
    logits = torch.tensor([[0, 0, -5.0], [0, 0.1, -6]], dtype=torch.float64, requires_grad=True)
    mask = selection(logits.detach(), torch.tensor([1, 1]))
    loss, oracle = ours("load", logits, mask, None), dense("load", logits, mask, None)
    assert loss.item() == pytest.approx(oracle.item())
    (got,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(oracle, logits)
    assert torch.allclose(got, wanted, atol=1e-15)
    assert wanted[0, :2].abs().min() > 1e-3


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(3, dtype=torch.bool)])
@pytest.mark.parametrize("name", NAMES)
def test_no_token_that_counts_gives_a_number_not_nan(name, weight):
    logits = torch.tensor([[float("nan")] * C, [float("inf")] * C, [0.0] * C])
    mask = torch.zeros(3, C, dtype=torch.bool)
    if name in ("z", "load"):
        logits = logits.nan_to_num()
    assert ours(name, logits, mask, weight).isfinite()
    empty = torch.zeros(0, C)
    assert ours(name, empty, empty.bool(), None).isfinite()


@pytest.mark.parametrize("scale", [1e4, 1e18])
@pytest.mark.parametrize("name", NAMES)
def test_huge_logits_and_certain_gates_stay_finite(name, scale):
    logits = (torch.randn(T, C) * scale).requires_grad_()
    mask = torch.zeros(T, C, dtype=torch.bool).scatter_(1, logits.argmax(1, keepdim=True), True)
    loss = ours(name, logits, mask, None)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_balance_of_even_routing():
    probs = torch.full((12, C), 1 / C)
    for k in (1, 2, C):
        mask = torch.stack([torch.arange(t, t + k) % C for t in range(12)])
        mask = torch.zeros(12, C, dtype=torch.bool).scatter_(1, mask, True)
        assert losses.balance_loss(probs_TC=probs, mask_TC=mask).item() == pytest.approx(k)
        assert losses.switch_loss(probs_TC=probs, mask_TC=mask).item() == pytest.approx(1)


def test_mutual_information_is_between_minus_ln_c_and_0():
    certain = torch.eye(C, dtype=torch.float64)
    assert losses.mutual_information_loss(probs_TC=certain).item() == pytest.approx(-math.log(C))
    same = torch.full((T, C), 1 / C)
    assert losses.mutual_information_loss(probs_TC=same).item() == pytest.approx(0, abs=1e-6)


def test_importance_and_load_do_not_grow_with_the_batch():
    """Published sums of squares did, and swamped the task."""
    logits = torch.randn(T, C, dtype=torch.float64)
    mask = torch.zeros(T, C, dtype=torch.bool).scatter_(1, logits.topk(2).indices, True)
    for name in ("importance", "load"):
        once, often = (ours(name, logits.repeat(n, 1), mask.repeat(n, 1), None) for n in (1, 50))
        assert once.item() == pytest.approx(often.item())


class TestVectors:
    def test_diversity_by_hand(self):
        vectors = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]], dtype=torch.float64)
        # cosines: 0, 1/sqrt 2, 1/sqrt 2; each stands twice in the matrix
        wanted = math.sqrt(4 * 0.5)
        assert losses.diversity_loss(vectors_CD=vectors).item() == pytest.approx(wanted)
        first_two = torch.tensor([True, True, False])
        loss = losses.diversity_loss(vectors_CD=vectors.requires_grad_(), active_C=first_two)
        assert loss.item() == pytest.approx(0, abs=1e-9)
        loss.backward()
        assert vectors.grad.isfinite().all()

    def test_simplicity_is_over_active_experts_only(self):
        vectors = torch.tensor([[3.0, 4.0], [0.0, 2.0], [100.0, 0.0]])
        active = torch.tensor([True, True, False])
        loss = losses.simplicity_loss(vectors_CD=vectors, active_C=active)
        assert loss.item() == pytest.approx(3.5)

    def test_gradients(self):
        vectors = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        active = torch.tensor([True, False, True, True, True])
        for loss in (losses.diversity_loss, losses.simplicity_loss):
            assert torch.autograd.gradcheck(
                lambda v, loss=loss: loss(vectors_CD=v, active_C=active), vectors
            )


@pytest.mark.parametrize("name", ["entropy", "mi"])
def test_what_was_given_no_probability_has_no_say(name):
    """A straight-through gradient may reach zeros, where that of p log p is infinite."""
    probs = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = {"entropy": losses.entropy_loss, "mi": losses.mutual_information_loss}[name]
    loss(probs_TC=probs).backward()
    assert probs.grad.abs().max() < 3
