"""Why a value of a configuration that refers to another, `${…}`, cannot be had, in one line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import split_key
from omegaconf.base import Container
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import (
    InterpolationKeyError,
    InterpolationResolutionError,
    UnsupportedInterpolationType,
)

from evomoe_plugin.config.errors import OptionError


def unresolved(error: InterpolationResolutionError) -> OptionError:
    """The option whose value refers to what is not there, that value, and what would be right."""
    root = error.parent_node._get_root()
    key = error.full_key or str(error.key)
    return OptionError(key, _written(root, key), _remedy(error, root))


def similar(name: str, names: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing where no name is like it."""
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _written(root: Container, key: str) -> Any:
    """The value of a key as it is given, `${…}`."""
    node: Any = root
    for part in split_key(key):
        node = node._get_node(part if isinstance(node, DictConfig) else int(part))
    return node._value()


def _remedy(error: InterpolationResolutionError, root: Container) -> str:
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
        group, _, name = found[1].rpartition(".")
        beside = OmegaConf.select(root, group) if group else root
        names = [str(n) for n in beside] if isinstance(beside, DictConfig) else []
        return f"there is no {found[1]}{similar(name, names)}"
    if isinstance(error, UnsupportedInterpolationType):
        names = sorted(BaseContainer._resolvers)
        return f"{message}; one of: {', '.join(names)}, or a key"
    return message
