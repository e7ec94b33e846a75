"""Noise without a generator: a pure function of what it belongs to.

The noise of a token is computed by hashing (seed, update, layer, the token's sequence, its
position, expert). It is therefore the same whichever rank or micro-batch holds the sequence, when
activation checkpointing runs the forward pass again, and after a restart; and it does not touch
torch's generator, so that dropout stays the same with noise or without.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd 64-bit constants of the splitmix64 generator (Steele, Lea, Flood, "Fast splittable
# pseudorandom number generators", OOPSLA 2014), as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's shift of signed integers copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on an int64 tensor: one flipped bit flips half of the result's."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """The key of `value` under `key`; int64 tensors broadcast."""
    if isinstance(value, int):
        product = (value * _MIX_1 + 2**63) % 2**64 - 2**63  # wrap as int64 tensors do
    else:
        product = value * _MIX_1
    return mix(key + _GOLDEN + product)


def sequence_keys(tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """One key a position, from that position and the whole sequence it stands in.

    Args:
        tokens_BT: int64 token ids, a row a sequence.
        mask_BT: bool, False for padding, which then does not count; None: no padding.
    Returns:
        int64 of the same shape. Equal sequences get equal keys.
    """
    position_T = torch.arange(tokens_BT.size(1), dtype=torch.int64, device=tokens_BT.device)
    hashed_BT = fold(position_T, tokens_BT)
    if mask_BT is not None:
        hashed_BT = hashed_BT * mask_BT
    return fold(hashed_BT.sum(1, keepdim=True), position_T)


def uniform(keys_T: Tensor, columns: int) -> Tensor:
    """fp32 numbers strictly inside (0, 1), [T, columns], a row for each key."""
    column = torch.arange(columns, dtype=torch.int64, device=keys_T.device)
    bits = _shift_right(fold(keys_T.unsqueeze(1), column), 41)  # 23 bits: the half added is exact
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def gumbel(keys_T: Tensor, columns: int) -> Tensor:
    """Standard Gumbel noise, fp32 [T, columns]; every value is finite."""
    return -torch.log(-torch.log(uniform(keys_T, columns)))
