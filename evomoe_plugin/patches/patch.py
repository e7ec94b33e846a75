"""The description of a patch, and the helpers that patches share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Patch:
    """The patch of one fault of fairseq, fairscale or what they depend on.

    Attributes:
        name: short, for the table of `evomoe doctor`.
        broken: what a user would see.
        upstream: file and function that hold the fault.
        remove_when: what must have happened before the patch can go.
        needed: the reason that this environment needs it, or None.
        apply: applies it, at the first call only.
    """

    name: str
    broken: str
    upstream: str
    remove_when: str
    needed: Callable[[], str | None]
    apply: Callable[[], None]

    def __post_init__(self) -> None:
        object.__setattr__(self, "apply", functools.cache(self.apply))


@dataclass(frozen=True)
class PatchStatus:
    """Whether a patch is active, and why (or what makes it unnecessary)."""

    name: str
    active: bool
    reason: str


def always(reason: str) -> Callable[[], str | None]:
    """`needed` of a patch that every environment needs."""
    return lambda: reason


def without_gpu() -> str | None:
    """`needed` of a patch for machines without a GPU."""
    return None if torch.cuda.is_available() else "torch sees no GPU"


def replacing(owner: Any, **values: Any) -> Callable[[], None]:
    """`apply` of a patch that sets attributes of `owner`."""

    def apply() -> None:
        for name, value in values.items():
            setattr(owner, name, value)

    return apply


def wrapping(owner: Any, **around: Callable) -> Callable[[], None]:
    """`apply` of a patch that calls `wrap` for attributes of `owner`."""

    def apply() -> None:
        for name, function in around.items():
            wrap(owner, name, function)

    return apply


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Call `around(original, *args, **kwargs)` wherever `owner.name(...)` is called.

    Patches of the same function compose, in the order in which they are applied.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)
