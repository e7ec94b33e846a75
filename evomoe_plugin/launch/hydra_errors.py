"""What Hydra says of a configuration that it cannot compose, in one line, with what is right."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterable
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.object_type import ObjectType
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import OmegaConfBaseException


def explain() -> None:
    """Make Hydra's loader explain; more calls have no effect."""
    load: Callable[..., Any] = ConfigLoaderImpl.load_configuration
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def load_configuration(self: ConfigLoaderImpl, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(self, *args, **kwargs)
        except CompactHydraException as error:
            raise ConfigCompositionException(f"error: {_line(self, error)}") from error

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]


def _line(loader: ConfigLoaderImpl, error: CompactHydraException) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing(loader, error.missing_cfg_file.removesuffix(".yaml"))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {_joined(error.message.partition('See https')[0])}"
    cause = error.__cause__
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None or not cause.full_key:
        return _joined(str(error))
    message = (cause.msg or str(cause)).partition("\n")[0]
    kind: Any = cause.object_type
    fields = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    similar = "" if cause.key in fields else _similar(str(cause.key), fields)
    return f"{cause.full_key}: {message}{similar}"


def _missing(loader: ConfigLoaderImpl, name: str) -> str:
    group, _, own = name.rpartition("/")
    options = loader.repository.get_group_options(group, ObjectType.CONFIG)
    while not options and "/" in group:  # Hydra sought `gate` beside a run in `small`
        group = group.partition("/")[2]
        options = loader.repository.get_group_options(group, ObjectType.CONFIG)
    known = f"; one of: {', '.join(sorted(options))}" if options else ""
    return f"{name}: there is no such configuration{_similar(own, options)}{known}"


def _similar(name: str, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _joined(text: str) -> str:
    return " ".join(text.split())
