"""How one feed-forward network becomes another, similar expert: pure functions of tensors.

    copy    the network as it is (sparse upcycling, arXiv 2212.05055)
    mask    a random share `rate` of the weights is zero (EvoMoE, arXiv 2112.14397; its mask rate
            is not on record, its code not released)
    noise   normal noise of `rate` times each tensor's own deviation is added
    reinit  a random share `rate` of the hidden units is drawn afresh (Drop-Upcycling, arXiv
            2502.19261)

Random numbers come from generators on the CPU, seeded by a key and the tensor's name: the same on
every rank, device and after every restart, whatever else is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from evomoe_plugin.config.options import SPAWN_METHODS, SPAWN_RATES
from evomoe_plugin.routing.noise import fold

METHODS = SPAWN_METHODS

# Their order is what random numbers are keyed by.
_STREAMS = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "fc3_weight", "units")


def seed_of(*parts: int) -> int:
    """A generator's seed, at least 0: the same everywhere, another one for other parts."""
    key = torch.zeros((), dtype=torch.int64)
    for part in parts:
        key = fold(key, part)
    return int(key) & (2**63 - 1)


def spawn_expert(
    source: Mapping[str, Tensor], method: str, *, key: int, rate: float, rescale: bool
) -> dict[str, Tensor]:
    """A new expert from one expert's tensors; the source stays as it is.

    Args:
        source: by the names of `ExpertFFN`: fc1_weight [F, D], fc1_bias [F], fc2_weight [F, D],
            fc2_bias [D]; gated, fc3_weight [F, D] and no biases.
        method: one of `METHODS`.
        key: of the expert (`seed_of`); other keys give other experts, but for `copy`.
        rate: of the method, as above; `copy` does not use it.
        rescale: with `mask`, divide the weights that are left by 1 - rate, so that the mean
            product with a row is that of the source.
    Raises:
        ValueError: an unknown method, a rate that it cannot have, or `rescale` without `mask`.
        KeyError: a name that no expert has.
    """
    return {
        name: spawn_tensor(name, tensor, method, key=key, rate=rate, rescale=rescale)[0]
        for name, tensor in source.items()
    }


def spawn_tensor(
    name: str, source: Tensor, method: str, *, key: int, rate: float, rescale: bool
) -> tuple[Tensor, Tensor]:
    """What `spawn_expert` makes of the tensor `name`, and its `kept_mask`, on the same device."""
    if rescale and method != "mask":
        raise ValueError(f"rescale: the method {method} masks nothing")
    kept = kept_mask(name, source.shape, method, key=key, rate=rate).to(source.device)
    if method == "copy":
        return source.clone(), kept
    # Statistics and sums of half-precision weights are made in fp32.
    value = source.to(torch.promote_types(source.dtype, torch.float32), copy=True)
    if method == "mask":
        if rescale and name.endswith("_weight"):
            value /= 1.0 - rate
        value.masked_fill_(~kept, 0.0)
    else:
        drawn = torch.randn(source.shape, generator=_generator(key, name)).to(value)
        deviation = value.std(correction=0)
        if method == "noise":
            value += rate * deviation * drawn
        else:
            value = torch.where(kept, value, value.mean() + deviation * drawn)
    return value.to(source.dtype), kept


def kept_mask(
    name: str, shape: Sequence[int], method: str, *, key: int, rate: float
) -> Tensor:
    """Which elements of the tensor `name` still hold what the source was taught.

    False is a weight that `mask` made zero, or one of a hidden unit that `reinit` drew afresh; the
    others are the source's, rescaled or with noise.

    Args:
        shape: the tensor's.
    Returns:
        bool of that shape, on the CPU.
    """
    _check(method, rate)
    if method == "mask" and name.endswith("_weight"):
        return torch.rand(tuple(shape), generator=_generator(key, name)) >= rate
    kept = torch.ones(tuple(shape), dtype=torch.bool)
    if method == "reinit" and name != "fc2_bias":  # which belongs to no hidden unit
        units = shape[0]
        # One at least where any is asked for, so that no two experts are the same.
        count = min(units, max(round(rate * units), math.ceil(rate)))
        # The same units in all tensors: the generator is not of this one.
        kept[torch.randperm(units, generator=_generator(key, "units"))[:count]] = False
    return kept


def _generator(key: int, name: str) -> torch.Generator:
    if name not in _STREAMS:
        raise KeyError(f"no tensor of an expert: {name}")
    return torch.Generator().manual_seed(seed_of(key, _STREAMS.index(name)))


def _check(method: str, rate: float) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method}: one of: {', '.join(METHODS)}")
    if method in SPAWN_RATES and not SPAWN_RATES[method].fits(rate):
        raise ValueError(f"rate {rate}: not one for the method {method}")
