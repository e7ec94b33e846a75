"""Initialise an expert from a feed-forward network: pure functions of tensors.

    copy    the network itself (sparse upcycling, arXiv 2212.05055)
    mask    a random fraction `rate` of the weights is zero (EvoMoE, arXiv 2112.14397; its mask rate
            and code are not published)
    noise   normal noise of `rate` times each tensor's standard deviation is added
    reinit  a random fraction `rate` of the hidden units is drawn anew (Drop-Upcycling, arXiv
            2502.19261)

Random numbers come from CPU generators seeded by a key and the tensor's name: the same on every
rank and device and after every restart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evomoe_plugin.config.rates import SPAWN_METHODS as METHODS
from evomoe_plugin.config.rates import SPAWN_RATES
from evomoe_plugin.config.values import in_interval
from evomoe_plugin.routing.noise import fold

_PART = 2**18  # numbers drawn at a time
# Random numbers are keyed by their order.
_STREAMS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "fc3_weight", "units")


def seed_of(*parts: int) -> int:
    """A generator's seed >= 0, a hash of `parts`."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = fold(key, part)
    return int(key) & (2**63 - 1)


def spawn_tensor(
    name: str, source: Tensor, method: str, *, key: int, rate: float, rescale: bool
) -> tuple[Tensor, Tensor]:
    """A tensor of a new expert from that of an expert, which stays as it is.

    Args:
        name: as in `ExpertFFN`.
        source: fc1_weight [F, D], fc1_bias [F], fc2_weight [F, D], fc2_bias [D]; gated, fc3_weight
            [F, D] and no biases.
        method: one of `METHODS`.
        key: of the expert (`seed_of`); except for `copy`, other keys give other experts.
        rate: of the method, as above; unused by `copy`.
        rescale: with `mask`, divide the remaining weights by 1 - rate, which keeps the expected
            matmul.
    Returns:
        The tensor, and its `kept_mask` on that device.
    Raises:
        ValueError: an unknown method, a rate that it cannot have, or `rescale` without `mask`.
        KeyError: a name that no expert has.
    """
    if rescale and method != "mask":
        raise ValueError(f"rescale: the method {method} masks nothing")
    kept = kept_mask(name, source.shape, method, key=key, rate=rate).to(source.device)
    if method == "copy":
        return source.clone(), kept
    # Statistics of half-precision weights are computed in fp32.
    value = source.to(torch.promote_types(source.dtype, torch.float32), copy=True)
    if method == "mask":
        if rescale and name.endswith("_weight"):
            value /= 1.0 - rate
        value.masked_fill_(~kept, 0.0)
    else:
        deviation, mean = value.std(correction=0), value.mean()
        for rows, drawn in _drawn(value, _generator(key, name)):
            if method == "noise":
                value[rows] += rate * deviation * drawn
            else:
                value[rows] = torch.where(kept[rows], value[rows], mean + deviation * drawn)
    return value.to(source.dtype), kept


def _drawn(value: Tensor, generator: torch.Generator) -> Iterator[tuple[slice, Tensor]]:
    """Normal numbers of the shape and device of `value`, some rows at a time: those that one call
    of `torch.randn` gives, which draws by sixteens."""
    width = max(1, math.prod(value.shape[1:]))
    step = 16 * max(1, _PART // (16 * width))
    starts = range(0, max(len(value) - 15, 1), step)  # no part of fewer than 16, but the only one
    for start, end in zip(starts, [*starts[1:], len(value)], strict=True):
        drawn = torch.randn((end - start, *value.shape[1:]), generator=generator)
        yield slice(start, end), drawn.to(value)


def kept_mask(name: str, shape: Sequence[int], method: str, *, key: int, rate: float) -> Tensor:
    """Which elements of the tensor `name` come from the source.

    False: zeroed by `mask`, or of a hidden unit that `reinit` drew anew. The others may be rescaled
    or noisy.

    Args:
        shape: the tensor's.
    Returns:
        bool of that shape, on the CPU.
    """
    if method not in METHODS:
        raise ValueError(f"method {method}: one of: {', '.join(METHODS)}")
    if method in SPAWN_RATES and not in_interval(rate, SPAWN_RATES[method].interval):
        raise ValueError(f"rate {rate}: not one for the method {method}")
    if method == "mask" and name.endswith("_weight"):
        return torch.rand(tuple(shape), generator=_generator(key, name)) >= rate
    kept = torch.ones(tuple(shape), dtype=torch.bool)
    if method == "reinit" and name != "fc2_bias":  # which belongs to no hidden unit
        units = shape[0]
        # At least one unless the rate is 0, so that no two experts are equal.
        count = min(units, max(round(rate * units), math.ceil(rate)))
        # Keyed by "units", not by the tensor: the same units in all tensors.
        kept[torch.randperm(units, generator=_generator(key, "units"))[:count]] = False
    return kept


def _generator(key: int, name: str) -> torch.Generator:
    if name not in _STREAMS:
        raise KeyError(f"no tensor of an expert: {name}")
    return torch.Generator().manual_seed(seed_of(key, _STREAMS.index(name)))
