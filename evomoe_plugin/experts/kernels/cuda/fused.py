"""Grouped feed-forward networks on GPUs, by Triton kernels of our own.

Gather, biases, activation, gate, dropout and combine weights are parts of the matmuls' kernels, and
so are their derivatives. Kept for the backward pass are the hidden rows before the activation and,
of gated experts, those of fc3; dropout is drawn again from its seed. Row counts stay on the device,
without synchronization, and sums have a fixed order, so that a step is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.experts.kernels.cuda import triton_kernels as kernels
from evomoe_plugin.experts.kernels.cuda.combine import combine, sort_by_token
from evomoe_plugin.routing.kernels.operators import operator

MOST_ROWS = 128
_LEAST_ROWS = 16
_ENOUGH_BLOCKS = 256
_LEAST_PIECE = 4096
"""An expert's weight gradient has that many programs or more, or its rows are divided into pieces
of this many or more, so that an expert with most rows keeps no single program busy for long."""
_BLOCK = 128


@dataclass(frozen=True)
class Schedule:
    """The tables of `triton_kernels.schedule`."""

    most: int
    """Rows of a tile."""
    table: Tensor
    """Tiles, then segments."""
    tile_starts: Tensor

    @classmethod
    def of(cls, counts_E: Tensor, most: int, num_tiles: int, only_long: bool = False) -> Schedule:
        """Divide rows into at most `num_tiles` tiles; with `only_long`, those of experts with more
        than `most`."""
        E, block = counts_E.numel(), 16
        table = counts_E.new_empty((num_tiles + E, 3), dtype=torch.int32)
        tile_starts = counts_E.new_empty(E + 1, dtype=torch.int32)
        kernels.schedule[(triton.cdiv(max(num_tiles, E + 1), block),)](
            counts_E,
            table,
            table[num_tiles:],
            tile_starts,
            num_tiles,
            most,
            ONLY_LONG=only_long,
            E=E,
            BE=triton.next_power_of_2(E),
            BLOCK=block,
            num_warps=8,
        )
        return cls(most, table, tile_starts)

    @property
    def num_tiles(self) -> int:
        return len(self.table) - len(self.tile_starts) + 1


def tile_rows(num_rows: int, num_experts: int) -> int:
    """Rows of a tile: about those of an expert, a power of two."""
    mean = triton.next_power_of_2(triton.cdiv(num_rows, num_experts))
    return max(_LEAST_ROWS, min(MOST_ROWS, mean))


def piece_rows(num_rows: int, ffn_dim: int, model_dim: int) -> int:
    """Rows above which those of an expert are divided in a weight gradient."""
    blocks = triton.cdiv(ffn_dim, _BLOCK) * triton.cdiv(model_dim, _BLOCK)
    if blocks >= _ENOUGH_BLOCKS:
        return max(num_rows, 1)
    most = triton.next_power_of_2(triton.cdiv(num_rows * blocks, _ENOUGH_BLOCKS))
    return max(_LEAST_PIECE, most)


class FusedFFN(torch.autograd.Function):
    """As `kernels.cpu.grouped.grouped_ffn`, with the row counts as a tensor."""

    @staticmethod
    def forward(ctx, call, counts_E, token_ids, by_token, x, row_weights, *stacks):
        counts_E, token_ids, row_weights = (
            None if t is None else t.contiguous() for t in (counts_E, token_ids, row_weights)
        )
        order, starts = by_token or sort_by_token(token_ids, x.size(0))
        given = counts_E, token_ids, order, starts, x, row_weights, list(stacks)
        kind = call.activation.kernel
        numbers = call.num_rows, kind, call.dropout, call.grad_scale, call.dtype, call.keeps
        y, *kept = _forward(*given, *numbers)
        ctx.save_for_backward(*given[:-1], *stacks, *kept)
        ctx.numbers = numbers
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        given, stacks, kept = (
            ctx.saved_tensors[i] for i in (slice(6), slice(6, 11), slice(11, None))
        )
        need = ctx.needs_input_grad[4:]
        found = iter(
            _backward(grad_out, list(kept), list(need), *given, list(stacks), *ctx.numbers)
        )
        return None, None, None, None, *(next(found) if needed else None for needed in need)


class Numbers(NamedTuple):
    """What `Call` has, without functions."""

    num_rows: int
    kind: str
    dropout: float
    grad_scale: float
    dtype: torch.dtype
    keeps: bool


def _schedule(counts_E: Tensor, num_rows: int) -> tuple[int, int]:
    """Rows of a tile, and how many tiles there are at most."""
    most, E = tile_rows(num_rows, counts_E.numel()), counts_E.numel()
    return most, triton.cdiv(num_rows, most) + E


def _no_rows(
    counts_E, token_ids, order, starts, x, row_weights, stacks, num_rows, kind, dropout, *others
) -> list[Tensor]:
    _, dtype, keeps = others
    E, F, D = stacks[0].shape
    y = x.new_empty(num_rows if token_ids is None else x.size(0), D)
    if not keeps:
        return [y]
    of_hidden = num_rows, F
    return [
        y,
        x.new_empty(of_hidden, dtype=dtype),
        x.new_empty(of_hidden if stacks[2] is not None else (0,), dtype=dtype),
        counts_E.new_empty(1 if dropout else 0),
        counts_E.new_empty((_schedule(counts_E, num_rows)[1] + E, 3), dtype=torch.int32),
        counts_E.new_empty(E + 1, dtype=torch.int32),
    ]


@operator(_no_rows, tags=(torch.Tag.nondeterministic_seeded,))
def _forward(
    counts_E: Tensor,
    token_ids: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    x: Tensor,
    row_weights: Tensor | None,
    stacks: Sequence[Tensor | None],
    num_rows: int,
    kind: str,
    dropout: float,
    grad_scale: float,
    dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """The output; if it is kept for a backward pass, the hidden rows before the activation, those
    of fc3, the seed of dropout (each empty where there is none), and the tables of the schedule."""
    ffn = _FFN(Numbers(num_rows, kind, dropout, grad_scale, dtype, keeps), x, token_ids, stacks)
    schedule = Schedule.of(counts_E, *_schedule(counts_E, num_rows))
    seed = torch.randint(1 << 62, (1,), device=x.device) if dropout else None
    h, h3, active = ffn.up(schedule, seed)
    *_, matrix2, bias2 = ffn.operands
    y = ffn.combined(
        ffn.down(schedule, active, matrix2, bias=bias2, weights=row_weights), order, starts
    )
    if not keeps:
        return [y]
    h3 = x.new_empty(0, dtype=dtype) if h3 is None else h3
    seed = counts_E.new_empty(0) if seed is None else seed
    return [y, h, h3, seed, schedule.table, schedule.tile_starts]


def _no_gradients(grad_out, kept, need, counts_E, token_ids, order, starts, x, weights, stacks, *_):
    leaves = zip((x, weights, *stacks), need, strict=True)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, n in leaves if n]


@operator(_no_gradients)
def _backward(
    grad_out: Tensor,
    kept: Sequence[Tensor],
    need: Sequence[bool],
    counts_E: Tensor,
    token_ids: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    x: Tensor,
    row_weights: Tensor | None,
    stacks: Sequence[Tensor | None],
    num_rows: int,
    kind: str,
    dropout: float,
    grad_scale: float,
    dtype: torch.dtype,
    keeps: bool,
) -> list[Tensor]:
    """The gradients of x, the row weights and the stacks: of those that `need` names, in order."""
    most, _ = _schedule(counts_E, num_rows)
    numbers = Numbers(num_rows, kind, dropout, grad_scale, dtype, keeps)
    ffn = _FFN(numbers, x, token_ids, stacks)
    given = stacks, row_weights, counts_E, order, starts
    return _gradients(ffn, most, _by_rows(grad_out), kept, need, *given)


def _gradients(ffn, most, grad, kept, need, stacks, row_weights, counts_E, order, starts):
    h, h3, seed, *tables = kept
    h3, seed = (t if t.numel() else None for t in (h3, seed))
    need_x, need_row_weights, need1, need_bias1, need3, need2, need_bias2 = need
    schedule = Schedule(most, *tables)
    matrix1, _, matrix3, _, bias2 = ffn.operands
    active, grad_h, grad_h3, dots, bias1_sums = ffn.down_backward(
        schedule, grad, row_weights, h, h3, seed, need_bias1
    )
    bias2_sums = None
    if bias2 is not None and (need_row_weights or need_bias2):
        bias2_sums = ffn.output_bias_backward(schedule, grad, row_weights, dots)
    gradient = ffn.weight_gradients(schedule, counts_E)
    grad2 = gradient(active, grad, stacks[3]) if need2 else None
    del active
    grad1 = gradient(grad_h, ffn.x, stacks[0]) if need1 else None
    grad3 = gradient(grad_h3, ffn.x, stacks[2]) if need3 else None
    grad_bias1 = ffn.sums(schedule, bias1_sums, stacks[1]) if need_bias1 else None
    grad_bias2 = ffn.sums(schedule, bias2_sums, stacks[4]) if need_bias2 else None
    grad_x = None
    if need_x:
        rows = ffn.down(schedule, grad_h, matrix1, grad_h3, matrix3)
        grad_x = ffn.combined(rows, order, starts)
    grad_weights = dots.sum(0).to(row_weights.dtype) if need_row_weights else None
    found = grad_x, grad_weights, grad1, grad_bias1, grad3, grad2, grad_bias2
    return [grad for grad in found if grad is not None]


class _FFN:
    """The launches of one forward or backward pass.

    In place of a tensor that is not used, kernels get any other: a pointer must be one.
    """

    def __init__(self, call: Numbers, x: Tensor, token_ids: Tensor | None, stacks: Sequence[Any]):
        self.call, self.token_ids, self.x = call, token_ids, _by_rows(x)
        self.operands: list[Any] = [
            None if s is None else s.to(call.dtype).contiguous() for s in stacks
        ]
        self.E, self.F, self.D = stacks[0].shape
        self.is_gated = self.operands[2] is not None
        self.precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.ids = self.x if token_ids is None else token_ids

    def _new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.call.dtype, device=self.x.device)

    def _grid(self, tiles: int, width: int) -> Callable:
        return lambda meta: (tiles * triton.cdiv(width, meta["BN"]),)

    def up(self, schedule: Schedule, seed: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """The hidden rows before the activation, those of fc3, and those for fc2."""
        matrix1, bias1, matrix3, *_ = self.operands
        call, N = self.call, self.call.num_rows
        active = self._new(N, self.F)
        h = self._new(N, self.F) if call.keeps else active
        h3 = self._new(N, self.F) if call.keeps and self.is_gated else None
        kernel = kernels.gated_up if self.is_gated else kernels.up
        kernel[self._grid(schedule.num_tiles, self.F)](
            self.x,
            self.ids,
            matrix1,
            matrix1 if bias1 is None else bias1,
            matrix1 if matrix3 is None else matrix3,
            self.x if seed is None else seed,
            h,
            h if h3 is None else h3,
            active,
            schedule.table,
            schedule.num_tiles,
            self.D,
            self.F,
            self.x.stride(0),
            call.dropout,
            E=self.E,
            ROWS=schedule.most,
            GROUP=kernels.GROUP,
            KIND=call.kind,
            HAS_IDS=self.token_ids is not None,
            HAS_BIAS=bias1 is not None,
            IS_GATED=self.is_gated,
            DROPS=seed is not None,
            KEEPS=call.keeps,
            PRECISION=self.precision,
        )
        return h, h3, active

    def down(
        self,
        schedule: Schedule,
        rows: Tensor,
        matrix: Tensor,
        rows3: Tensor | None = None,
        matrix3: Tensor | None = None,
        bias: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """weights (rows matrix + rows3 matrix3 + bias), [N, D]."""
        out = self._new(self.call.num_rows, self.D)
        kernels.down[self._grid(schedule.num_tiles, self.D)](
            rows,
            matrix,
            rows if rows3 is None else rows3,
            matrix if matrix3 is None else matrix3,
            rows if bias is None else bias,
            rows if weights is None else weights,
            out,
            schedule.table,
            schedule.num_tiles,
            self.D,
            self.F,
            E=self.E,
            ROWS=schedule.most,
            GROUP=kernels.GROUP,
            IS_SUM=rows3 is not None,
            HAS_BIAS=bias is not None,
            HAS_WEIGHTS=weights is not None,
            PRECISION=self.precision,
        )
        return out

    def combined(self, rows: Tensor, order: Tensor | None, starts: Tensor | None) -> Tensor:
        """The sum of each token's rows; without token ids the rows."""
        if order is None or starts is None:
            return rows.to(self.x.dtype)
        return combine(rows, None, order, starts, self.x.dtype)

    def down_backward(
        self,
        schedule: Schedule,
        grad: Tensor,
        weights: Tensor | None,
        h: Tensor,
        h3: Tensor | None,
        seed: Tensor | None,
        sums_bias: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """As `triton_kernels.down_backward`; the last row of the dots is that of the bias."""
        N, F = h.shape
        active, grad_h = torch.empty_like(h), torch.empty_like(h)
        grad_h3 = None if h3 is None else torch.empty_like(h)
        parts = triton.cdiv(F, kernels.BACKWARD_COLUMNS)
        has_bias2 = self.operands[4] is not None
        dots = bias_sums = None
        if weights is not None:
            dots = self._new(parts + has_bias2, N, dtype=torch.float32)
        if sums_bias:
            bias_sums = self._new(schedule.num_tiles, F, dtype=torch.float32)
        kernels.down_backward[self._grid(schedule.num_tiles, F)](
            grad,
            self.ids,
            grad if weights is None else weights,
            self.operands[3],
            grad if seed is None else seed,
            h,
            h if h3 is None else h3,
            active,
            grad_h,
            grad_h if grad_h3 is None else grad_h3,
            grad if dots is None else dots,
            grad if bias_sums is None else bias_sums,
            schedule.table,
            schedule.num_tiles,
            N,
            self.D,
            F,
            grad.stride(0),
            self.call.dropout,
            E=self.E,
            ROWS=schedule.most,
            GROUP=kernels.GROUP,
            KIND=self.call.kind,
            HAS_IDS=self.token_ids is not None,
            HAS_WEIGHTS=weights is not None,
            HAS_BIAS=sums_bias,
            IS_GATED=self.is_gated,
            DROPS=seed is not None,
            PRECISION=self.precision,
        )
        return active, grad_h, grad_h3, dots, bias_sums

    def output_bias_backward(
        self, schedule: Schedule, grad: Tensor, weights: Tensor | None, dots: Tensor | None
    ) -> Tensor:
        """Sums over tiles of the weighted rows of `grad`; writes the last row of the dots."""
        sums = self._new(schedule.num_tiles, self.D, dtype=torch.float32)
        kernels.output_bias_backward[(schedule.num_tiles,)](
            grad,
            self.ids,
            grad if weights is None else weights,
            self.operands[4],
            grad if dots is None else dots[-1],
            sums,
            schedule.table,
            self.D,
            grad.stride(0),
            E=self.E,
            ROWS=schedule.most,
            HAS_IDS=self.token_ids is not None,
            HAS_WEIGHTS=weights is not None,
            BN=_BLOCK // 2,
        )
        return sums

    def sums(self, schedule: Schedule, parts: Tensor, stack: Tensor) -> Tensor:
        """The gradient of a stack of biases: the sums of an expert's tiles, scaled."""
        out = torch.empty_like(stack, memory_format=torch.contiguous_format)
        self._sum(schedule, parts, out, skips_empty=False)
        return out

    def _sum(self, schedule: Schedule, parts: Tensor, out: Tensor, skips_empty: bool) -> None:
        width = out[0].numel()
        kernels.sum_tiles[(self.E, triton.cdiv(width, _BLOCK))](
            parts,
            schedule.tile_starts,
            out,
            width,
            self.call.grad_scale,
            SKIPS_EMPTY=skips_empty,
            BN=_BLOCK,
        )

    def weight_gradients(
        self, schedule: Schedule, counts_E: Tensor
    ) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function that makes the gradient of a stack [E, F, D], scaled: each expert's
        rows^T x[token_ids]."""
        N, F, D = self.call.num_rows, self.F, self.D
        most = piece_rows(N, F, D)
        num_pieces = 0 if most >= N else 2 * N // most
        if num_pieces:
            schedule = Schedule.of(counts_E, most, num_pieces, only_long=True)
        table = schedule.table[schedule.num_tiles - num_pieces :]

        def gradient(rows: Tensor, x: Tensor, stack: Tensor) -> Tensor:
            out = torch.empty_like(stack, memory_format=torch.contiguous_format)
            parts = self._new(num_pieces, F, D, dtype=torch.float32) if num_pieces else out

            def grid(meta: dict[str, int]) -> tuple[int]:
                return (len(table) * triton.cdiv(F, meta["BM"]) * triton.cdiv(D, meta["BN"]),)

            kernels.weight_gradient[grid](
                rows,
                x,
                self.ids,
                out,
                parts,
                table,
                num_pieces,
                most,
                D,
                F,
                x.stride(0),
                self.call.grad_scale,
                E=self.E,
                HAS_IDS=self.token_ids is not None,
                PRECISION=self.precision,
            )
            if num_pieces:
                self._sum(schedule, parts, out, skips_empty=True)
            return out

        return gradient


def _by_rows(x: Tensor) -> Tensor:
    """x with contiguous rows."""
    return x if x.stride(1) == 1 else x.contiguous()
