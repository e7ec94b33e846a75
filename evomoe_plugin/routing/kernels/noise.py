"""The counter-based noise of `routing.noise` in Triton: the same keys and the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from evomoe_plugin.routing.kernels.operators import operator

_BLOCK = 1024
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_PARTS = 3


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def _fold(key, mixed):
    return _mix(key + _GOLDEN + mixed.to(tl.uint64))


@triton.jit(do_not_specialize=["first", "second", "third"])
def _fold_all(
    keys,
    out,
    size,
    first: tl.int64,
    second: tl.int64,
    third: tl.int64,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = keys folded with one, two or three values, each times the first constant of `_mix`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _fold(tl.load(keys + index, mask=index < size, other=0).to(tl.uint64), first)
    if PARTS > 1:
        key = _fold(key, second)
    if PARTS > 2:
        key = _fold(key, third)
    tl.store(out + index, key.to(tl.int64), mask=index < size)


@triton.jit
def _draw(keys, out, size, columns, IS_GUMBEL: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, columns]: uniform, or Gumbel noise of it."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + index // columns, mask=index < size, other=0).to(tl.uint64)
    column = (index % columns).to(tl.uint64)
    bits = _fold(key, column * _MIX_1) >> 41
    value = (bits.to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    if IS_GUMBEL:
        value = -tl.log(-tl.log(value))
    tl.store(out + index, value, mask=index < size)


@operator(lambda keys, mixed: torch.empty_like(keys, memory_format=torch.contiguous_format))
def fold(keys: Tensor, mixed: Sequence[int]) -> Tensor:
    """`routing.noise.fold` with values in turn, each given as its product with the first constant,
    as a signed integer of 64 bits."""
    keys = keys.contiguous()
    for first in range(0, len(mixed), _PARTS):
        parts = mixed[first : first + _PARTS]
        out = torch.empty_like(keys)
        padded = (*parts, *(0,) * (_PARTS - len(parts)))
        grid = (triton.cdiv(max(keys.numel(), 1), _BLOCK),)
        _fold_all[grid](keys, out, keys.numel(), *padded, PARTS=len(parts), BLOCK=_BLOCK)
        keys = out
    return keys


@operator(
    lambda keys_T, columns, is_gumbel: keys_T.new_empty(
        keys_T.size(0), columns, dtype=torch.float32
    )
)
def draw(keys_T: Tensor, columns: int, is_gumbel: bool) -> Tensor:
    """`routing.noise.uniform` or `routing.noise.gumbel`."""
    out = torch.empty(keys_T.size(0), columns, dtype=torch.float32, device=keys_T.device)
    grid = (triton.cdiv(max(out.numel(), 1), _BLOCK),)
    _draw[grid](keys_T.contiguous(), out, out.numel(), columns, is_gumbel, _BLOCK)
    return out
