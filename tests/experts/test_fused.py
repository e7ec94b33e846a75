"""The Triton kernels against fp64, on a GPU or in Triton's interpreter on a CPU."""

import dataclasses

import pytest
import torch
from fairseq.modules import gelu_accurate
from fairseq.utils import relu_squared
from torch import nn

pytest.importorskip("triton", reason="there is no Triton for this platform")

from evomoe_plugin.experts.activations import find_activation
from evomoe_plugin.experts.kernels import Call, cuda
from evomoe_plugin.experts.kernels.cuda import fused, grouped_mm
from evomoe_plugin.experts.kernels.cuda.fused import FusedFFN, Schedule, tile_rows
from tests.experts.one_by_one import oracle, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter rounds to bf16 by cutting off, which errs by twice as much.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
FP32, FP16, BF16 = TOLERANCE
UNEVEN, ONE, NONE, SINGLE, EVEN = [20, 0, 9, 1], [0, 0, 0, 20], [0] * 4, [0, 1, 0, 0], [8] * 4
NAMES = ("fc1_weight", "fc1_bias", "fc3_weight", "fc2_weight", "fc2_bias")
GELU, SILU, RELU = nn.functional.gelu, nn.functional.silu, nn.functional.relu


@dataclasses.dataclass
class Case:
    """Leaves of a call, and the tokens of its rows."""

    counts: list[int]
    dtype: torch.dtype = FP32
    gated: bool = False
    bias: bool = True
    combines: bool = True
    weighs: bool = True
    tokens: int = 22
    width: int = 24
    ffn: int = 40
    strided: bool = False

    def __post_init__(self):
        E, N = len(self.counts), sum(self.counts)
        made = tensors(E, self.width, self.ffn, self.gated, self.bias, self.dtype, DEVICE)
        self.weights = {name: (w.detach() / 3).requires_grad_() for name, w in made.items()}
        rows = self.tokens if self.combines else N
        x = torch.randn(rows, self.width * (1 + self.strided), device=DEVICE).to(self.dtype)
        self.x = x[:, : self.width].detach().requires_grad_()
        self.token_ids = self.row_weights = None
        if self.combines:
            ids = [torch.randperm(self.tokens)[:count] for count in self.counts]
            self.token_ids = torch.cat(ids).to(DEVICE)
            if self.weighs:
                self.row_weights = (torch.rand(N, device=DEVICE) - 0.2).requires_grad_()

    @property
    def leaves(self):
        given = [self.x, self.row_weights, *map(self.weights.get, NAMES)]
        return [leaf for leaf in given if leaf is not None]

    def run(self, function=GELU, kernels=FusedFFN, dropout=0.0, scale=1.0, dtype=None, keeps=True):
        call = Call(
            sum(self.counts), find_activation(function), dropout, scale, dtype or self.dtype, keeps
        )
        counts = torch.tensor(self.counts, device=DEVICE)
        given = self.x, self.row_weights, *map(self.weights.get, NAMES)
        return kernels.apply(call, counts, self.token_ids, None, *given)

    def exact(self, function=GELU):
        """The outputs in fp64, and their leaves."""
        exact = {
            id(leaf): leaf.detach().double().contiguous().requires_grad_() for leaf in self.leaves
        }
        weights = {name: exact[id(w)] for name, w in self.weights.items()}
        row_weights = None if self.row_weights is None else exact[id(self.row_weights)]
        x = exact[id(self.x)]
        y = oracle(x, weights, self.counts, function, self.token_ids, row_weights)
        return y, list(exact.values())

    def check(self, got, wanted, exact_leaves, most, seed=None):
        seed = torch.randn(got.shape, device=DEVICE).to(got.dtype) if seed is None else seed
        gradients = torch.autograd.grad(got, self.leaves, seed)
        expected = torch.autograd.grad(wanted, exact_leaves, seed.double())
        for a, b in zip([got, *gradients], [wanted, *expected], strict=True):
            assert a.shape == b.shape
            # Of all together: where ReLU bends, rounding changes single gradients by all.
            assert (a.double() - b).norm() <= most * (1e-3 + b.norm())


# Each pair of values of two columns appears at least once, but for what cannot be.
@pytest.mark.parametrize(
    "dtype, counts, gated, bias, combines",
    [
        (FP32, UNEVEN, False, True, True),
        (FP32, ONE, True, False, True),
        (FP32, NONE, False, True, False),
        (FP32, SINGLE, False, False, False),
        (FP32, EVEN, True, True, True),
        (FP16, UNEVEN, True, False, False),
        (FP16, ONE, False, True, False),
        (FP16, NONE, True, False, True),
        (FP16, SINGLE, True, True, True),
        (FP16, EVEN, False, False, True),
        (BF16, UNEVEN, False, False, True),
        (BF16, ONE, True, True, True),
        (BF16, NONE, False, False, True),
        (BF16, SINGLE, False, True, True),
        (BF16, EVEN, True, False, False),
    ],
)
def test_equals_fp64(dtype, counts, gated, bias, combines):
    case = Case(counts, dtype, gated, bias, combines)
    got = case.run()
    assert got.dtype == dtype
    case.check(got, *case.exact(), TOLERANCE[dtype])


@pytest.mark.parametrize("function", [SILU, RELU, torch.tanh, gelu_accurate, relu_squared])
def test_every_activation(function):
    case = Case([3, 1], width=16, ffn=16, tokens=4)
    case.check(case.run(function), *case.exact(function), 1e-6)


def test_not_a_number_stays_one():
    for function in (GELU, SILU, RELU, torch.tanh, gelu_accurate, relu_squared):
        case = Case([2], width=16, ffn=16, combines=False)
        with torch.no_grad():
            case.x[0, 0] = float("nan")
            assert case.run(function, keeps=False).isnan().any(1).tolist() == [True, False]


def test_rows_and_gradients_with_strides():
    case = Case(UNEVEN, strided=True)
    assert not case.x.is_contiguous()
    shape = case.x.shape
    for seed in torch.randn(shape[::-1], device=DEVICE).t(), case.x.new_ones(()).expand(shape):
        case.check(case.run(), *case.exact(), 1e-6, seed)
    case.token_ids = torch.stack([case.token_ids] * 2, 1)[:, 0]
    case.row_weights = torch.stack([case.row_weights] * 2, 1).detach()[:, 0].requires_grad_()
    case.check(case.run(), *case.exact(), 1e-6)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it takes the memory")
def test_rows_farther_apart_than_2_31_elements():
    def far_apart(rows):
        memory = torch.empty(2 * 2**30 + 16, dtype=FP16)  # what lies between rows is not touched
        return memory.as_strided((3, 16), (2**30, 1)).copy_(rows)

    case = Case([2, 0, 3], FP16, width=16, ffn=16, tokens=3)
    case.x = far_apart(case.x.detach()).requires_grad_()
    case.check(case.run(), *case.exact(), TOLERANCE[FP16], far_apart(torch.randn(3, 16)))


@pytest.mark.parametrize("kernels", [FusedFFN, grouped_mm.GroupedMMFFN])
def test_rows_of_no_expert_count_for_nothing(kernels):
    case = Case(UNEVEN)
    wanted = case.exact()
    fill = torch.full((7,), -1, device=DEVICE)
    case.token_ids = torch.cat([case.token_ids, fill])
    weights_N = torch.cat([case.row_weights, fill.to(case.row_weights.dtype)])
    weights_N = weights_N.masked_fill(case.token_ids < 0, 0.0)  # as in a plan
    call = Call(len(weights_N), find_activation(GELU), 0.0, 1.0, FP32, True)
    counts = torch.tensor(case.counts, device=DEVICE)
    given = case.x, weights_N, *map(case.weights.get, NAMES)
    case.check(kernels.apply(call, counts, case.token_ids, None, *given), *wanted, 1e-6)


def test_unweighted_sum_of_rows():
    case = Case(UNEVEN, weighs=False)
    case.check(case.run(), *case.exact(), 1e-6)


@pytest.mark.parametrize("gated", [True, False])
def test_dropped_values_are_dropped_in_both_passes(gated):
    counts, p = [3, 0, 9], 0.4
    case = Case(counts, gated=gated, bias=not gated, ffn=64, tokens=9)
    torch.manual_seed(5)
    seed = torch.randint(1 << 62, (1,), device=DEVICE)
    # Hidden rows of ones show what is dropped.
    ones = torch.ones(3, 64, 16, device=DEVICE)
    call = fused.Numbers(12, "relu", p, 1.0, FP32, True)
    ffn = fused._FFN(call, ones.new_ones(12, 16), None, [ones, None, None, ones, None])
    kept = ffn.up(Schedule.of(torch.tensor(counts, device=DEVICE), 16, 4), seed)[2] != 0
    assert 0.5 < kept.float().mean() < 0.7
    parts = iter(kept.split(counts))
    torch.manual_seed(5)
    got = case.run(dropout=p)
    wanted, leaves = case.exact(lambda h: GELU(h) * next(parts) / (1 - p))
    case.check(got, wanted, leaves, 1e-6)


def test_inference_and_a_graph_that_is_kept_give_the_same_bits():
    case = Case(UNEVEN)
    got = case.run()
    assert torch.equal(got, case.run(keeps=False))
    seed = torch.randn_like(got)
    first, second = (
        torch.autograd.grad(got, case.leaves, seed, retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("gated", [True, False])
def test_only_hidden_rows_are_kept(gated):
    case, kept = Case(EVEN, gated=gated, bias=False, width=16, ffn=128), []

    def keep(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        case.run(dropout=0.1)
    given = {leaf.untyped_storage().data_ptr() for leaf in case.leaves}
    sizes = {s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in given}
    assert sum(sizes.values()) <= 1.1 * (1 + gated) * 32 * 128 * 4


def test_frozen_stacks_get_no_gradient_and_others_are_scaled():
    case = Case(UNEVEN)
    wanted = torch.autograd.grad(case.run().sum(), list(case.weights.values()))
    case.weights["fc1_weight"].requires_grad_(False)
    case.weights["fc2_bias"].requires_grad_(False)
    case.x.requires_grad_(False)
    case.run(scale=0.25).sum().backward()
    for (name, weight), whole in zip(case.weights.items(), wanted, strict=True):
        if name in ("fc1_weight", "fc2_bias"):
            assert weight.grad is None
        else:
            assert torch.allclose(whole / 4, weight.grad)


def test_long_segments_are_divided_in_weight_gradients(monkeypatch):
    monkeypatch.setattr(fused, "_LEAST_PIECE", 4)
    case = Case([13, 0, 3, 5, 4])
    case.check(case.run(), *case.exact(), 1e-6)


def test_lower_precision_than_that_of_the_weights():
    case = Case(UNEVEN)
    got = case.run(dtype=BF16)
    assert got.dtype == FP32
    gradients = torch.autograd.grad(got, case.leaves, torch.ones_like(got))
    assert all(g.dtype == FP32 for g in gradients)
    case.check(case.run(dtype=BF16), *case.exact(), TOLERANCE[BF16])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_grouped_mm_equals_fp64(dtype, gated, monkeypatch):
    monkeypatch.setattr(grouped_mm, "_fuses", DEVICE == "cuda")
    if DEVICE == "cuda" and dtype != BF16:
        pytest.skip("on a GPU it is for bf16 alone")
    case = Case([20, 0, 8, 1], dtype, gated, not gated, tokens=20)
    got = case.run(torch.sigmoid, grouped_mm.GroupedMMFFN)
    case.check(got, *case.exact(torch.sigmoid), 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("counts", [[5, 0, 17, 1, 16], [0, 0], [3]])
@pytest.mark.parametrize("most, only_long", [(16, False), (4, True)])
def test_schedule(counts, most, only_long):
    starts = [sum(counts[:e]) for e in range(len(counts))]
    tiles, first_tiles = [], []
    for e, (start, count) in enumerate(zip(starts, counts, strict=True)):
        first_tiles.append(len(tiles))
        if not only_long or count > most:
            stop = start + count
            tiles += [[e, i, min(i + most, stop)] for i in range(start, stop, most)]
    longest = sorted(range(len(counts)), key=lambda e: -counts[e])
    segments = [[e, starts[e], starts[e] + counts[e]] for e in longest]
    spare = 20
    got = Schedule.of(torch.tensor(counts, device=DEVICE), most, len(tiles) + spare, only_long)
    table = got.table.tolist()
    assert got.num_tiles == len(tiles) + spare
    assert table[: len(tiles)] == tiles
    assert all(row[0] == len(counts) for row in table[len(tiles) : got.num_tiles])
    assert table[got.num_tiles :] == segments
    assert got.tile_starts.tolist() == [*first_tiles, len(tiles)]


@pytest.mark.parametrize("counts", [[100, 0, 0, 0], [25] * 4, [97, 1, 1, 1], [0] * 4, [1, 1, 0, 0]])
def test_tiles_follow_from_the_number_of_rows_alone(counts):
    """There are always enough, and few too many, whatever the load."""
    N, E = sum(counts), len(counts)
    most = tile_rows(N, E)
    needed = sum(-(-count // most) for count in counts)
    assert needed <= -(-N // most) + E <= needed + E
    assert most >= 16


def test_choice_of_kernels(monkeypatch, caplog):
    gpu, capability = torch.device("cuda"), [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "card")
    caches = cuda.why_not, cuda.why_not_fused, cuda.say_once, grouped_mm.why_not

    def choose(function, dtype, sm):
        capability[0] = sm
        cuda.why_not.cache_clear()
        cuda.why_not_fused.cache_clear()
        grouped_mm.why_not.cache_clear()
        return cuda.function_for(
            Call(1, find_activation(function), 0.0, 1.0, dtype, True), gpu, 16, 16
        )

    for cache in caches:
        cache.cache_clear()
    try:
        for dtype in TOLERANCE:
            assert choose(GELU, dtype, (8, 0)) is FusedFFN
        assert not caplog.records
        assert choose(torch.sigmoid, BF16, (9, 0)) is grouped_mm.GroupedMMFFN
        assert choose(torch.sigmoid, FP16, (9, 0)) is None
        assert choose(GELU, torch.float64, (9, 0)) is None
        for _ in range(2):
            assert choose(GELU, BF16, (7, 5)) is None
        assert [record.getMessage().split(": ", 1)[1] for record in caplog.records] == [
            "they do not have this activation; torch's grouped_mm computes the experts",
            "they do not have this activation; nor is grouped_mm: matmuls are in float16, not "
            "bfloat16; the matmuls of each expert are launched apart",
            "matmuls are in float64; nor is grouped_mm: matmuls are in float64, not bfloat16; the "
            "matmuls of each expert are launched apart",
            "card is older than Ampere; nor is grouped_mm: card is older than Hopper; the matmuls "
            "of each expert are launched apart",
        ]
    finally:
        for cache in caches:
            cache.cache_clear()
