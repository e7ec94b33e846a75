"""The operators of the namespace `evomoe`: what the compiler is told of their results is so."""

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.experts.kernels.cuda import combine, fused
from evomoe_plugin.routing.kernels import best, noise, pairs, sums  # noqa: F401 - make operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, BF16 = torch.float32, torch.bfloat16
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def of_routing(T, C, dtype=FP32):
    """Arguments of each operator of routing. Tables are transposed, vectors have strides."""
    scores = torch.randn(C, T, device=DEVICE).to(dtype).t()
    mask = (torch.rand(C, T, device=DEVICE) < 0.4).t()
    keys = torch.randint(-(2**62), 2**62, (2 * T,), device=DEVICE)[::2]
    counts, N = pairs._counts(mask), int(mask.sum())
    places = pairs._written(scores, mask, counts, N)[-1]
    return {
        "best_best_mask": (scores, min(C, 2)),
        "noise_fold": (keys, [3, -5, 7, 9]),
        "noise_draw": (keys, C, True),
        "pairs_counts": (mask,),
        "pairs_written": (scores, mask, counts, N),
        "pairs_spread_out": (torch.randn(2 * N, device=DEVICE)[::2], places),
        "sums_of_programs": (mask, scores.softmax(1), scores, mask[:, 0], max(C - 1, 1)),
    }


def of_experts(counts, D, F, dtype=FP32, gated=False, combines=True, dropout=0.0, keeps=True):
    """Arguments of each operator of the experts."""
    E, N, T = len(counts), sum(counts), sum(counts) + 1
    x = torch.randn(T if combines else N, 2 * D, device=DEVICE).to(dtype)[:, :D]
    ids = weights = None
    if combines:
        ids = torch.cat([torch.randperm(T)[:count] for count in counts]).to(DEVICE)
        weights = torch.rand(N, device=DEVICE)
    shapes = (E, F, D), (E, F), (E, F, D), (E, F, D), (E, D)
    stacks = [torch.randn(shape, device=DEVICE) for shape in shapes]
    for left_out in (1, 4) if gated else (2,):
        stacks[left_out] = None
    counts_E = torch.tensor(counts, device=DEVICE)
    given = counts_E, ids, *combine.sort_by_token(ids, T), x, weights, stacks
    numbers = N, "gelu", dropout, 1.0, dtype
    found = {"fused_forward": (*given, *numbers, keeps)}
    if keeps:
        y, *kept = fused._forward(*given, *numbers, True)
        need = [t is not None for t in (x, weights, *stacks)]
        found["fused_backward"] = (torch.randn_like(y), kept, need, *given, *numbers, True)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_routing(19, 5),
        lambda: of_routing(3, 1, BF16),
        lambda: of_experts([3, 0, 5], 8, 24),
        lambda: of_experts([0, 2], 8, 16, gated=True, combines=False, dropout=0.5),
        lambda: of_experts([1], 16, 8, BF16, keeps=False),
        pytest.param(lambda: of_routing(0, 3), marks=pytest.mark.slow),
        pytest.param(lambda: of_experts([17, 0], 16, 8, BF16, gated=True), marks=pytest.mark.slow),
        pytest.param(lambda: of_experts([0, 0], 8, 16), marks=pytest.mark.slow),
    ],
)
def test_the_compiler_knows_results(make):
    """Their shapes, dtypes and strides, those of symbolic sizes too; no input is changed."""
    for name, args in make().items():
        operator = getattr(torch.ops.evomoe, name)
        torch.library.opcheck(operator, args, test_utils=(*CHECKS, "test_aot_dispatch_dynamic"))


def test_none_is_left_out():
    names = torch._C._dispatch_get_all_op_names()
    ours = {name.removeprefix("evomoe::") for name in names if name.startswith("evomoe::")}
    assert ours == {*of_routing(1, 1), *of_experts([1], 8, 8)}


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Within a compiled graph too, and where a kernel is no operator."""
    entered = []

    def device_of(tensor):
        entered.append(tensor)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    scores = torch.randn(2, 3, device=DEVICE)
    best.best_mask(scores, 1)
    torch.ops.evomoe.best_best_mask(scores, 1)
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    combine.combine(scores, None, *combine.sort_by_token(ids, 1), scores.dtype)
    assert len(entered) == 3 and all(tensor is scores for tensor in entered)
