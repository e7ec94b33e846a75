"""The Triton kernels of routing against torch's operators, on a GPU or in Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.experts.kernels.cuda import why_not_fused
from evomoe_plugin.experts.kernels.cuda.combine import sort_by_token
from evomoe_plugin.gates.topk_common import best
from evomoe_plugin.routing import kernels, noise, stats, waits
from evomoe_plugin.routing.choice import Choice
from evomoe_plugin.routing.kernels import tiles
from evomoe_plugin.routing.kernels.best import best_mask
from evomoe_plugin.routing.kernels.pairs import sorted_pairs
from evomoe_plugin.routing.kernels.sums import sums
from evomoe_plugin.routing.plan import plan_from_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def both(monkeypatch):
    """Call a function with the kernels, and without."""

    def call(function):
        results = []
        for usable in (True, False):
            monkeypatch.setattr(kernels, "usable", lambda _, usable=usable: usable)
            results.append(function())
        return results

    return call


def test_they_can_be_turned_off_and_the_log_says_so_once(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setenv("EVOMOE_TRITON", "0")
    cached = kernels.why_not, kernels._usable_on_gpu
    for function in cached:
        function.cache_clear()
    try:
        assert [kernels.usable(torch.device("cuda")) for _ in range(2)] == [False, False]
        assert why_not_fused(torch.device("cuda"), torch.bfloat16, "gelu") == "EVOMOE_TRITON is 0"
    finally:
        for function in cached:
            function.cache_clear()
    (line,) = caplog.messages
    assert line.endswith("the kernels of routing: EVOMOE_TRITON is 0")


def test_noise_has_the_same_bits(both):
    keys = torch.randint(-(2**63), 2**63 - 1, (1030,), device=DEVICE)
    for values in [(0,), (-1, 2**62), (1, 10**6, 3), (7, 0, 2, 5)]:
        assert torch.equal(*both(lambda values=values: noise.fold_all(keys, *values)))
    assert torch.equal(*both(lambda: noise.uniform(keys, 3)))
    with_kernels, without = both(lambda: noise.gumbel(keys[:400], 5))
    assert torch.allclose(with_kernels, without, rtol=2e-6, atol=2e-7)
    assert noise.gumbel(keys[:0], 5).shape == (0, 5)


@pytest.fixture(params=["a tile", "many programs", "many tiles"])
def divided(request, monkeypatch):
    if request.param != "a tile":
        monkeypatch.setattr(tiles, "ELEMENTS", 32)
    if request.param == "many tiles":
        monkeypatch.setattr(tiles, "MOST_PROGRAMS", 2)


@pytest.mark.parametrize("T, E, spare", [(19, 5, 7), (1, 1, 0), (0, 3, 0), (13, 3, None)])
def test_pairs_are_the_same_plan(both, divided, monkeypatch, T, E, spare):
    monkeypatch.setattr(waits, "waiting_costs", lambda _: True)
    monkeypatch.setattr(waits, "MOST_UNCOUNTED", 0)
    mask = torch.rand(T, E + 1, device=DEVICE)[:, :E] < 0.4
    weights = torch.rand(E, T, device=DEVICE).t().requires_grad_()
    most = None if spare is None else int(mask.sum()) + spare
    with_kernels, plan = both(lambda: plan_from_mask(mask, weights, most))
    for name in ("token_ids_N", "expert_ids_N", "weights_N", "tokens_per_expert_E"):
        assert torch.equal(getattr(with_kernels, name), getattr(plan, name))
    seed = torch.randn(plan.num_pairs, device=DEVICE)
    gradients = [torch.autograd.grad(p.weights_N, weights, seed)[0] for p in (with_kernels, plan)]
    assert torch.equal(*gradients)
    order, starts = with_kernels.by_token
    wanted, ends = sort_by_token(plan.token_ids_N[: mask.sum()], T)
    assert torch.equal(order[: mask.sum()], wanted) and torch.equal(starts, ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_best_are_the_same(both, divided, dtype):
    scores = torch.randn(23, 7, device=DEVICE).to(dtype)
    scores[0], scores[1] = -torch.inf, torch.nan
    scores[2] = torch.tensor([1.0, 3, 3, 3, -3, 0, 0])
    scores[3, 2] = torch.nan
    got = best_mask(scores, 3)
    assert got.sum(1).eq(3).all()
    assert got[0, :3].all() and got[1, :3].all() and got[2, 1:4].all() and got[3, 2]
    for k in (0, 1, 3, 7, 9):
        assert torch.equal(*both(lambda k=k: best(scores, k)))
    zeros = torch.tensor([[-0.0, 0.0], [0.0, -0.0]], dtype=dtype, device=DEVICE)
    assert best_mask(zeros, 1)[:, 0].all() and not best_mask(zeros, 0).any()


@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_the_first_of_equal_scores_are_taken_everywhere(both, monkeypatch, k):
    scores = torch.randint(-1, 3, (300, 6), device=DEVICE).double()
    scores[scores < 0] = torch.nan
    scores[0] = 0.0
    with_kernels, with_topk = both(lambda: best(scores, k))
    monkeypatch.setattr(waits, "waiting_costs", lambda _: True)
    for mask in with_kernels, with_topk, best(scores, k):
        for row, is_best in zip(scores.tolist(), mask.tolist(), strict=True):
            order = sorted(range(6), key=lambda c: -row[c] if row[c] == row[c] else -torch.inf)
            assert [c for c in range(6) if is_best[c]] == sorted(order[:k])


@pytest.mark.parametrize(
    "padded, dtype", [(False, torch.float32), (True, torch.float64), (True, torch.bfloat16)]
)
def test_statistics_are_the_same_sums(both, divided, padded, dtype):
    probs = torch.rand(5, 21, device=DEVICE, dtype=dtype).t().requires_grad_()
    logits = probs.detach().log().clone()
    logits[3, 2], logits[5, 0], logits[6, 1] = torch.nan, torch.inf, -torch.inf
    with torch.no_grad():
        probs[4, 1], probs[7, 0] = 0.0, torch.nan
    token_mask = torch.rand(21, device=DEVICE) < 0.7
    token_mask[4:8] = torch.tensor([True, True, False, False])
    mask = (torch.rand(21, 6, device=DEVICE) < 0.5)[:, :5] & token_mask.unsqueeze(1)
    choice = Choice(mask, probs, probs, logits)
    given = choice, token_mask if padded else None, 4
    with_kernels, without = both(lambda: stats.routing_stats(*given))
    assert with_kernels.keys() == without.keys()
    for name, value in without.items():
        got = with_kernels[name]
        assert got.dtype == value.dtype and got.shape == value.shape
        rtol = 5e-3 if name == stats.ENTROPY and dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(got, value, rtol=rtol, atol=0, equal_nan=True)
    assert without[stats.ENTROPY].isnan() != padded


def far_apart(values: torch.Tensor) -> torch.Tensor:
    """The values, in columns 2^30 elements apart; what lies between takes no memory."""
    T, C = values.shape
    memory = torch.empty((C - 1) * 2**30 + T, dtype=values.dtype, device=DEVICE)
    return memory.as_strided((T, C), (1, 2**30)).copy_(values)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it takes the memory")
def test_tables_of_more_than_2_31_elements():
    scores, mask = torch.randn(2, 3).bfloat16(), torch.rand(2, 3) < 0.7
    far, far_mask, N = far_apart(scores), far_apart(mask), int(mask.sum())
    assert torch.equal(best_mask(far, 2), best_mask(scores, 2))
    for given, wanted in [
        (sorted_pairs(far_mask, far, N), sorted_pairs(mask, scores, N)),
        (sums(far_mask, scores, far, None, 2), sums(mask, scores, scores, None, 2)),
    ]:
        assert all(map(torch.equal, given, wanted))
