"""Sizes of samples with more than 65,535 tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.data import TokenBlockDataset

from evomoe_plugin.patches.patch import Patch, always, wrapping


def _build_slice_indices(upstream: Callable, *args: Any, **kwargs: Any) -> tuple:
    sizes, dataset_index, slices = upstream(*args, **kwargs)
    exact = slices[:, 1] - slices[:, 0]
    if (sizes != exact).any():
        sizes = exact
    return sizes, dataset_index, slices


PATCH = Patch(
    name="sample-sizes",
    broken="with --sample-break-mode eos or complete, a document of 65,546 tokens passes for one "
    "of 10: it is not left out, but runs out of positions or memory",
    upstream="fairseq/data/token_block_dataset.py: sizes are uint16 if the block size is, which "
    "documents may exceed",
    remove_when="fairseq takes the dtype from the sizes",
    needed=always("documents of any length are measured"),
    apply=wrapping(TokenBlockDataset, _build_slice_indices=_build_slice_indices),
)
