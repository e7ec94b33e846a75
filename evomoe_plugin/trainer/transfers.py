"""Many small values taken from or to a device at once. Values are nested lists, tuples, dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def on_host(values: Any) -> Any:
    """`values` with their tensors on the host, after one transfer."""
    leaves, structure = tree_flatten(values)
    places = [
        i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.device.type != "cpu"
    ]
    if places:
        # In fp64, which holds counts and values in less precision exactly.
        flat = torch.cat([leaves[i].detach().double().reshape(-1) for i in places]).cpu()
        parts = flat.split([leaves[i].numel() for i in places])
        for i, part in zip(places, parts, strict=True):
            leaves[i] = part.to(leaves[i].dtype).view(leaves[i].shape)
    return tree_unflatten(leaves, structure)


def on_device(values: Any, device: torch.device) -> Any:
    """`values` with their numbers as scalars on `device`, in fp64; the host does not wait."""
    leaves, structure = tree_flatten(values)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, int | float)]
    numbers = torch.tensor([float(leaves[i]) for i in places], dtype=torch.float64)
    if device.type == "cuda":
        numbers = numbers.pin_memory().to(device, non_blocking=True)
    for i, number in zip(places, numbers.unbind(), strict=True):
        leaves[i] = number
    return tree_unflatten(leaves, structure)
