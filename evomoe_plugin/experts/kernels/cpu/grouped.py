"""Grouped feed-forward networks: each expert's segment of rows through its own weights.

Gather, matmuls, activation and weighted sum are one autograd function that computes the rows in
chunks. The only tensors of N rows kept for the backward pass are the hidden rows before the
activation; everything else has the size of a chunk and is recomputed. The gradient of a pair's
weight is SonicMoE's (arXiv 2512.14080), from the hidden row and its gradient, so that no output
rows are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evomoe_plugin.experts.activations import ROWS, Activation, padded
from evomoe_plugin.experts.kernels import Call, cuda
from evomoe_plugin.experts.kernels.cpu.chunks import Chunk, chunks_of
from evomoe_plugin.experts.kernels.cpu.memory_pool import POOL
from evomoe_plugin.experts.kernels.cpu.segment_matmul import Gradient, Matrices, multiply
from evomoe_plugin.experts.precision import native_matmul_dtype, operand_dtype

CHUNK_ROWS, CHUNKS = 1024, 8
"""A chunk has at most `CHUNK_ROWS` rows, or 1 / `CHUNKS` of all rows where that is more."""
_DOT_ROWS = 128
_ON_DEVICES = 16384
"""In place of `CHUNK_ROWS` and `_DOT_ROWS` on other devices, which have no cache to stay in."""


class _GroupedFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, counts, token_ids, x, row_weights, *stacks):
        work = _Work(call, counts, token_ids, stacks[0])
        matrix1, bias1, matrix3, matrix2, bias2 = map(work.matrices, stacks)
        hidden = _Hidden(work, work.to_keep())
        linear = None if matrix3 is None else _Hidden(work, work.to_keep())
        dropped = work.to_keep(torch.bool) if call.dropout else None
        rows_buffer, active_buffer = work.buffer(x.size(1)), work.buffer()
        sums = work.sums(x)

        for chunk in work.chunks:
            rows = rows_buffer[: chunk.size]
            work.fetch(x, chunk, rows)
            h = hidden.compute(chunk, rows, matrix1, bias1)
            h3 = None if linear is None else linear.compute(chunk, rows, matrix3)
            active = _activate(call.activation, h, h3, active_buffer[: padded(chunk.size)])
            if call.dropout:
                drop = torch.rand(active.shape, device=x.device) < call.dropout
                _drop(active, drop, call.dropout)
                if dropped is not None:
                    dropped[chunk.start : chunk.stop] = drop[: chunk.size]
            multiply(chunk, active, matrix2.of(chunk), rows, bias2)
            if row_weights is not None:
                rows *= row_weights[chunk.start : chunk.stop, None]
            work.add(rows, chunk, sums)

        kept = hidden.kept, None if linear is None else linear.kept, dropped
        ctx.save_for_backward(token_ids, x, row_weights, *stacks, *kept)
        ctx.call, ctx.counts = call, counts
        return sums.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        token_ids, x, row_weights, *stacks, kept_hidden, kept_linear, dropped = ctx.saved_tensors
        call = ctx.call
        need_x, need_row_weights, *need_stacks = ctx.needs_input_grad[3:]
        work = _Work(call, ctx.counts, token_ids, stacks[0])
        matrix1, _, matrix3, matrix2, bias2 = map(work.matrices, stacks)
        hidden = _Hidden(work, kept_hidden)
        linear = None if matrix3 is None else _Hidden(work, kept_linear)
        gradients = [
            Gradient(stack, ctx.counts, call.grad_scale) if need else None
            for stack, need in zip(stacks, need_stacks, strict=True)
        ]
        grad1, grad_bias1, grad3, grad2, grad_bias2 = gradients
        rows_buffer = work.buffer(x.size(1))
        active_buffer, grad_buffer = work.buffer(), work.buffer()
        grad_x = work.sums(x) if need_x else None
        grad_row_weights = torch.empty_like(row_weights) if need_row_weights else None
        factors = small = None
        if row_weights is not None:
            factors, small = _split_small(row_weights, work.dtype)

        for chunk in work.chunks:
            h = hidden.load(chunk)
            h3 = None if linear is None else linear.load(chunk)
            drop = None if dropped is None else dropped[chunk.start : chunk.stop]
            active = _activate(call.activation, h, h3, active_buffer[: padded(chunk.size)])
            _drop(active, drop, call.dropout)

            rows, grad = rows_buffer[: chunk.size], grad_buffer[: padded(chunk.size)]
            work.fetch(grad_out, chunk, rows)
            if factors is not None:
                rows *= factors[chunk.start : chunk.stop, None]
            multiply(chunk, rows, matrix2.transposed(chunk), grad)
            if need_row_weights:
                dots = grad_row_weights[chunk.start : chunk.stop]
                _dot(active, grad, dots)
                if bias2 is not None:
                    parts = zip(rows.split(chunk.sizes), bias2.of(chunk), strict=True)
                    dots += torch.cat([part @ bias for part, bias in parts])
                dots /= factors[chunk.start : chunk.stop]
            if small is not None:
                for scaled in (rows, grad):
                    scaled[: chunk.size].mul_(small[chunk.start : chunk.stop, None])
            if grad_bias2 is not None:  # sums first, while the rows are in the cache
                grad_bias2.add_sums(chunk, rows)
            if grad2 is not None:
                grad2.add_matmul(chunk, active, rows)

            _drop(grad, drop, call.dropout)
            if linear is not None:
                call.activation.forward(h, active)
                active *= grad  # from here on the gradient of h3
                grad *= h3
            call.activation.backward(grad, h)
            if grad_bias1 is not None:
                grad_bias1.add_sums(chunk, grad)
            work.fetch(x, chunk, rows)
            if grad1 is not None:
                grad1.add_matmul(chunk, grad, rows)
            if grad3 is not None:
                grad3.add_matmul(chunk, active, rows)
            if need_x:
                multiply(chunk, grad, matrix1.of(chunk), rows)
                if linear is not None:
                    multiply(chunk, active, matrix3.of(chunk), rows, adds=True)
                work.add(rows, chunk, grad_x)

        if grad_x is not None:
            grad_x = grad_x.to(x.dtype)
        grads = [None if gradient is None else gradient.whole() for gradient in gradients]
        return None, None, None, grad_x, grad_row_weights, *grads


def grouped_ffn(
    x: Tensor,
    weights: Mapping[str, Tensor],
    counts: Sequence[int] | Tensor,
    activation: Activation,
    *,
    dropout: float = 0.0,
    grad_scale: float = 1.0,
    token_ids_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    by_token: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Apply each expert's network to its rows.

    Plain: fc2 dropout(act(fc1 row + fc1_bias)) + fc2_bias. Gated, with an fc3:
    fc2 dropout(act(fc1 row) * fc3 row). Under autocast, rows and matmuls have its dtype.

    Args:
        x: tokens [T, D], or without `token_ids_N` rows [N, D] sorted by expert.
        weights: `fc1_weight`, `fc2_weight` and, where gated, `fc3_weight`, all [E, F, D];
            `fc1_bias` [E, F] and `fc2_bias` [E, D], or neither.
        counts: rows of each expert, in order; they sum to N, or to less if there are `token_ids_N`,
            whose rest is -1. A tensor avoids a wait for the GPU.
        activation: of hidden rows.
        dropout: probability that a hidden value is dropped.
        grad_scale: factor of the gradients of `weights`.
        token_ids_N: int64, the token of each row.
        weights_N: weight of each pair's output row; None: 1. Only with `token_ids_N`.
        by_token: as `RoutingPlan.by_token`, for GPUs, which otherwise sort `token_ids_N`.
    Returns:
        The sum of each token's output rows [T, D], or without `token_ids_N` the output rows [N, D],
        in the dtype of x. First derivatives only.
    """
    arguments = [
        x,
        weights_N,
        *map(weights.get, ("fc1_weight", "fc1_bias", "fc3_weight", "fc2_weight", "fc2_bias")),
    ]
    keeps = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments)
    call = Call(
        (x if token_ids_N is None else token_ids_N).size(0),
        activation,
        dropout,
        grad_scale,
        operand_dtype(x),
        keeps,
    )
    function = cuda.function_for(call, x.device, x.size(1), weights["fc1_weight"].size(1))
    if function is not None:
        counts = torch.as_tensor(counts, device=x.device)
        return function.apply(call, counts, token_ids_N, by_token, *arguments)
    counts = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    if (num_rows := sum(counts)) < call.num_rows and token_ids_N is not None:
        call, token_ids_N = replace(call, num_rows=num_rows), token_ids_N[:num_rows]
        arguments[1] = None if weights_N is None else weights_N[:num_rows]
    return _GroupedFFN.apply(call, counts, token_ids_N, *arguments)


class _Work:
    """Chunks, buffers and dtypes of one forward or backward pass."""

    def __init__(self, call: Call, counts: Sequence[int], token_ids: Tensor | None, fc1: Tensor):
        self.call, self.token_ids = call, token_ids
        self.device, self.width = fc1.device, fc1.size(1)
        self.dtype = native_matmul_dtype(call.dtype, fc1.device.type)
        least = CHUNK_ROWS if fc1.device.type == "cpu" else _ON_DEVICES
        self.chunks = chunks_of(counts, max(least, -(-call.num_rows // CHUNKS)))
        self.longest = max((chunk.size for chunk in self.chunks), default=0)

    def buffer(self, width: int | None = None) -> Tensor:
        """Rows of one chunk; hidden rows if no width is given."""
        shape = padded(self.longest), width or self.width
        return POOL.empty(shape, self.dtype, self.device)

    def to_keep(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """Hidden rows of all pairs, to keep for the backward pass."""
        if not self.call.keeps:
            return None
        shape = self.call.num_rows + ROWS, self.width
        return POOL.empty(shape, dtype or self.call.dtype, self.device)

    def matrices(self, stack: Tensor | None) -> Matrices | None:
        """Matrices or biases of the experts, to compute with."""
        return None if stack is None else Matrices(stack, self.call.dtype, self.dtype)

    def sums(self, x: Tensor) -> Tensor:
        """The tensor that `add` adds to: of the shape of x, at least fp32."""
        if self.token_ids is None:
            return POOL.empty(x.shape, x.dtype, x.device)
        return POOL.empty(x.shape, torch.promote_types(x.dtype, torch.float32), x.device).zero_()

    def fetch(self, x: Tensor, chunk: Chunk, rows: Tensor) -> None:
        """Gather the chunk's rows from x: [T, D], or [N, D] without token ids."""
        if self.token_ids is None:
            source = x[chunk.start : chunk.stop]
        elif x.dtype == self.call.dtype == self.dtype:
            torch.index_select(x, 0, self.token_ids[chunk.start : chunk.stop], out=rows)
            return
        else:
            source = x.index_select(0, self.token_ids[chunk.start : chunk.stop])
        rows.copy_(source.to(self.call.dtype))

    def add(self, rows: Tensor, chunk: Chunk, sums: Tensor) -> None:
        """Scatter-add the chunk's rows, the transpose of `fetch`."""
        if self.token_ids is None:
            sums[chunk.start : chunk.stop] = rows
            return
        token_ids = self.token_ids[chunk.start : chunk.stop]
        if self.device.type == "cpu":
            sums.index_add_(0, token_ids, rows.to(sums.dtype))
            return
        for part, ids in zip(rows.split(chunk.sizes), token_ids.split(chunk.sizes), strict=True):
            # One expert at a time has one row per token: the order of atomics cannot matter.
            sums.index_add_(0, ids, part.to(sums.dtype))


class _Hidden:
    """Hidden rows before the activation: kept for all pairs, computed chunk by chunk.

    They are computed in place where `kept` has the dtype of the matmuls, elsewhere in a buffer.
    """

    def __init__(self, work: _Work, kept: Tensor | None):
        self.kept, self._dtype = kept, work.call.dtype
        is_direct = kept is not None and kept.dtype == work.dtype
        self._buffer = None if is_direct else work.buffer()

    def compute(
        self, chunk: Chunk, rows: Tensor, matrices: Matrices, bias: Matrices | None = None
    ) -> Tensor:
        """The chunk's hidden rows, padded, kept and rounded alike."""
        hidden = self._place(chunk)
        multiply(chunk, rows, matrices.transposed(chunk), hidden, bias)
        if hidden.dtype != self._dtype:
            rounded = hidden[: chunk.size].to(self._dtype)
            hidden[: chunk.size] = rounded
            if self.kept is not None:
                self.kept[chunk.start : chunk.stop] = rounded
        return hidden

    def load(self, chunk: Chunk) -> Tensor:
        """The chunk's kept rows, padded."""
        hidden = self._place(chunk)
        if self._buffer is not None and self.kept is not None:
            hidden[: chunk.size] = self.kept[chunk.start : chunk.stop]
        return hidden

    def _place(self, chunk: Chunk) -> Tensor:
        if self._buffer is not None:
            return self._buffer[: padded(chunk.size)]
        assert self.kept is not None  # one of the two is given
        return self.kept[chunk.start : chunk.start + padded(chunk.size)]


def _split_small(weights_N: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Two factors of `weights_N`: without the small ones, and those alone, if there are any.

    Gradients are multiplied by the weights first, D numbers a pair in place of F, and the dot
    products that give the weights' own gradients are divided by them again. Weights too small to
    divide by are applied after the dot products.
    """
    is_small_N = weights_N.abs() < torch.finfo(dtype).tiny ** 0.5
    return (
        weights_N.masked_fill(is_small_N, 1.0),
        weights_N.masked_fill(~is_small_N, 1.0) if is_small_N.any() else None,
    )


def _activate(activation: Activation, h: Tensor, h3: Tensor | None, out: Tensor) -> Tensor:
    activation.forward(h, out)
    if h3 is not None:
        out *= h3
    return out


def _drop(rows: Tensor, drop: Tensor | None, probability: float) -> None:
    if drop is not None:
        rows = rows[: drop.size(0)]
        rows.masked_fill_(drop, 0).div_(1 - probability)


def _dot(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = dot products of the rows, summed in at least fp32."""
    step = _DOT_ROWS if a.device.type == "cpu" else _ON_DEVICES
    products = POOL.empty(
        (min(step, out.size(0)), a.size(1)), torch.promote_types(a.dtype, torch.float32), a.device
    )
    for start in range(0, out.size(0), step):
        stop = min(start + step, out.size(0))
        block = torch.mul(a[start:stop], b[start:stop], out=products[: stop - start])
        out[start:stop] = block.sum(1)
