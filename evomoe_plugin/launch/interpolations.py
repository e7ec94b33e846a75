"""Why a value of a configuration that refers to another, `${…}`, cannot be had, in one line."""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    UnsupportedInterpolationType,
)


def unresolved(error: InterpolationResolutionError) -> str | None:
    """The key whose value refers to what is not there, that value, and what would be right.

    None if a resolver of the user's own failed: its traceback says where.
    """
    if _is_of_a_program(error):
        return None
    container: Any = error.parent_node
    if container is None or error.key is None:
        return " ".join(str(error).split())
    key = error.full_key or error.key
    written = _written(container, error.key)
    return f"{key}{written}: {_remedy(error, container, written)}"


def similar(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no name is like it."""
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _written(container: Any, key: Any) -> str:
    """` ` and the value of a key, or of a path of keys, as it is given; nothing if not found."""
    values: Any = OmegaConf.to_container(container, resolve=False)
    try:
        if isinstance(key, str) and key not in values:
            *path, key = key.split(".")
            for name in path:
                values = values[name]
        return f" {values[key]}"
    except (KeyError, IndexError, TypeError):
        return ""


# Whose code resolves a value where no resolver of the user's own takes part.
_RESOLVERS = ("omegaconf", "hydra", "antlr4", "os", "yaml")


def _is_of_a_program(error: InterpolationResolutionError) -> bool:
    """Whether it was raised below other code than that of OmegaConf and Hydra."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    packages = [frame.f_globals.get("__name__", "").partition(".")[0] for frame in frames]
    if "omegaconf" not in packages:
        return False
    return any(name not in _RESOLVERS for name in packages[packages.index("omegaconf") :])


def _remedy(error: InterpolationResolutionError, container: Any, written: str) -> str:
    message = str(error).partition("\n")[0]
    if message == "Recursive interpolation detected":
        return "it refers to itself, maybe by way of others; give one of them a value"
    if unset := re.search(r"Environment variable '(.*?)' not found", message):
        name = unset[1]
        return (
            f"the environment variable {name} is not set; set it, or give a default: "
            f"${{oc.env:{name},DEFAULT}}"
        )
    if isinstance(error, InterpolationKeyError) and (found := re.search("key '(.*)'", message)):
        if f"${{{found[1]}" not in written:  # relative: sought elsewhere than from the root
            return f"there is no {found[1]}"
        group, _, name = found[1].rpartition(".")
        root = container._get_root()
        beside = OmegaConf.select(root, group) if group else root
        names = [str(n) for n in beside] if isinstance(beside, DictConfig) else []
        return f"there is no {found[1]}{similar(name, names)}"
    if isinstance(error, UnsupportedInterpolationType):
        return f"{message}; give a key, or a resolver such as oc.env"
    return message
