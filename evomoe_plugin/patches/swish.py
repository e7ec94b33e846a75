"""`--activation-fn swish`, for which fairseq returns a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq import utils

from evomoe_plugin.patches.patch import Patch, always, wrapping


def _get_activation_fn(upstream: Callable, activation: str) -> Callable[[Any], Any]:
    if activation == "swish":
        return torch.nn.functional.silu
    return upstream(activation)


PATCH = Patch(
    name="swish",
    broken="--activation-fn swish, which SwiGLU needs, ends in a TypeError in the first step",
    upstream="fairseq/utils.py: get_activation_fn returns the class SiLU where it should make one",
    remove_when="it returns a function",
    needed=always("SwiGLU experts"),
    apply=wrapping(utils, get_activation_fn=_get_activation_fn),
)
