"""Counter-based noise: a pure function of keys, without a random generator.

The noise of a token is a hash of (seed, update, layer, the token's sequence, its position, expert).
It does not depend on the rank or micro-batch of the sequence, is the same when activation
checkpointing repeats the forward pass and after a restart, and does not use torch's generator, so
that dropout is the same with and without noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evomoe_plugin.routing import kernels

# Odd 64-bit constants of the splitmix64 generator (Steele, Lea, Flood, "Fast splittable
# pseudorandom number generators", OOPSLA 2014), as signed integers.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's shift of signed integers copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 on int64: one flipped input bit flips half of the output bits."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def fold(key: Tensor, value: Tensor | int) -> Tensor:
    """The key of `value` under `key`; int64 tensors broadcast."""
    if isinstance(value, int):
        return fold_all(key, value)
    return mix(key + _GOLDEN + value * _MIX_1)


def fold_all(key: Tensor, *values: int) -> Tensor:
    """`fold` with each of the values in turn."""
    # Wraps like int64 tensors.
    mixed = tuple((value * _MIX_1 + 2**63) % 2**64 - 2**63 for value in values)
    if mixed and kernels.usable(key.device):
        from evomoe_plugin.routing.kernels import noise

        return noise.fold(key, mixed)
    for part in mixed:
        key = mix(key + _GOLDEN + part)
    return key


def sequence_keys(tokens_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    """A key for each position, from the position and the whole sequence.

    Args:
        tokens_BT: int64 token ids, one sequence per row.
        mask_BT: bool, False for padding, which is ignored; None: no padding.
    Returns:
        int64 of the same shape. Equal sequences get equal keys.
    """
    if mask_BT is None:
        mask_BT = torch.ones_like(tokens_BT, dtype=torch.bool)
    position_BT = mask_BT.cumsum(1) - 1  # without padding before the first token
    hashed_BT = fold(position_BT, tokens_BT) * mask_BT
    return fold(hashed_BT.sum(1, keepdim=True), position_BT)


def uniform(keys_T: Tensor, columns: int) -> Tensor:
    """fp32 numbers in the open interval (0, 1), [T, columns], a row per key."""
    if kernels.usable(keys_T.device):
        from evomoe_plugin.routing.kernels import noise

        return noise.draw(keys_T, columns, False)
    column = torch.arange(columns, dtype=torch.int64, device=keys_T.device)
    bits = _shift_right(fold(keys_T.unsqueeze(1), column), 41)  # 23 bits: adding 0.5 is exact
    return (bits.to(torch.float32) + 0.5) * 2.0**-23


def gumbel(keys_T: Tensor, columns: int) -> Tensor:
    """Standard Gumbel noise, fp32 [T, columns]; every value is finite."""
    if kernels.usable(keys_T.device):
        from evomoe_plugin.routing.kernels import noise

        return noise.draw(keys_T, columns, True)
    return -torch.log(-torch.log(uniform(keys_T, columns)))
