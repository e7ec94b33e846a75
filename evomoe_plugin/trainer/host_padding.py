"""Counts padding while a batch is on the host, so that nobody waits for a GPU to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from evomoe_plugin.routing.padding import Padding, padding_of, remember

_TOKENS = ("src_tokens", "prev_output_tokens", "target")


def count(sample: Any, padding_idx: int) -> dict[str, Padding]:
    """The padding in the tokens of a batch on the host, by name."""
    return {
        name: padding_of(tokens, padding_idx)
        for name, tokens in _tokens(sample).items()
        if tokens.device.type == "cpu"
    }


def pass_on(padding: Mapping[str, Padding], sample: Any) -> None:
    """Tell it of the same batch, wherever it is now."""
    for name, tokens in _tokens(sample).items():
        if name in padding:
            remember(tokens, padding[name])


def _tokens(sample: Any) -> dict[str, Tensor]:
    given = {**sample.get("net_input", {}), **sample} if isinstance(sample, Mapping) else {}
    return {
        name: given[name]
        for name in _TOKENS
        if isinstance(given.get(name), Tensor) and given[name].dim() == 2
    }
