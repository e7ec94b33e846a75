"""The description of a patch, and the helpers that patches share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Patch:
    """The patch of one fault of fairseq, fairscale or what they depend on.

    Attributes:
        name: short, for the table of `evomoe doctor`.
        broken: what a user would see.
        upstream: file and function that hold the fault.
        remove_when: what must have happened before the patch can go.
        needed: the reason that this environment needs it, or None.
        apply: applies it; again, it changes nothing.
    """

    name: str
    broken: str
    upstream: str
    remove_when: str
    needed: Callable[[], str | None]
    apply: Callable[[], None]


@dataclass(frozen=True)
class PatchStatus:
    """Whether a patch is active, and why (or what makes it unnecessary)."""

    name: str
    active: bool
    reason: str


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Call `around(original, *args, **kwargs)` wherever `owner.name(...)` is called.

    Patches of the same function compose, in the order in which they are applied.
    """
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    setattr(owner, name, wrapper)


class ModuleView(ModuleType):
    """`module` with some names replaced, for one upstream file to see in its place.

    Patching the module itself would change it for all; this changes it for one file.
    """

    def __init__(self, module: ModuleType, **replaced: Any):
        super().__init__(module.__name__)
        self.__dict__.update(replaced, _viewed=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)


def always(reason: str) -> Callable[[], str | None]:
    """`needed` of a patch that every environment needs."""
    return lambda: reason
