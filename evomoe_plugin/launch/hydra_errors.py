"""What Hydra says of a configuration that it cannot compose, of values in it that refer to what is
not there, and of folders that it cannot write: in one line, with what is right.

HYDRA_FULL_ERROR=1 has Hydra's tracebacks, as ever.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

from hydra._internal import utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.object_type import ObjectType
from hydra.core.utils import run_job
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from evomoe_plugin.config.errors import OptionError, one_line_errors
from evomoe_plugin.launch import call_main
from evomoe_plugin.launch.interpolations import similar, unresolved
from evomoe_plugin.patches.patch import wrap


def explain() -> None:
    """Make Hydra explain; more calls have no effect."""
    for owner, name, around in WRAPPED:
        if not hasattr(getattr(owner, name), "__wrapped__"):
            wrap(owner, name, around)


# --- composing


def _load_configuration(upstream: Callable, self: ConfigLoaderImpl, *args: Any, **kw: Any) -> Any:
    try:
        return upstream(self, *args, **kw)
    except CompactHydraException as error:
        raise ConfigCompositionException(_line(self, error)) from error


def _load_config(upstream: Callable, self: ConfigRepository, config_path: str) -> Any:
    try:
        return upstream(self, config_path)
    except (OSError, UnicodeError, YAMLError) as error:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        file = f"{source.path if source else ''}/{config_path.removesuffix('.yaml')}.yaml"
        reason = getattr(error, "strerror", None) or _joined(str(error))
        raise ConfigCompositionException(f"{file}: cannot be read: {reason}") from error


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
    return f"{cause.full_key}: {message}{_similar(str(cause.key), fields)}"


def _missing(loader: ConfigLoaderImpl, name: str) -> str:
    group, _, own = name.rpartition("/")
    options = loader.repository.get_group_options(group, ObjectType.CONFIG)
    while not options and "/" in group:  # Hydra sought `gate` beside a run in `small`
        group = group.partition("/")[2]
        options = loader.repository.get_group_options(group, ObjectType.CONFIG)
    known = f"; one of: {', '.join(sorted(options))}" if options else ""
    return f"{name}: there is no such configuration{_similar(own, options)}{known}"


def _similar(name: str, names: Iterable[str]) -> str:
    """As `similar`; nothing for one of the names."""
    return "" if name in names else similar(name, names)


def _joined(text: str) -> str:
    return " ".join(text.split())


# --- running


def _run(upstream: Callable, self: Hydra, *args: Any, task_function: Callable, **kw: Any) -> Any:
    """Of `Hydra.run` and `Hydra.multirun`."""

    @functools.wraps(task_function)
    def task(cfg: Any) -> Any:
        return _run_task(task_function, cfg)

    return upstream(self, *args, task_function=task, **kw)


def _run_task(task_function: Callable, cfg: Any) -> Any:
    """Run fairseq's command. Hydra would keep its error, and print a line before it."""
    try:
        return task_function(cfg)
    except InterpolationResolutionError as error:
        if _wants_traceback() or _passes(error, call_main._call_main):  # not of the configuration
            raise
        with one_line_errors():
            raise unresolved(error) from error


def _run_and_report(upstream: Callable, function: Callable[[], Any]) -> Any:
    def explained() -> Any:
        try:
            return function()
        except Exception as error:
            line = None if _wants_traceback() else _line_of(error)
            if line is None:
                raise
            print(f"error: {line}", file=sys.stderr)
            sys.exit(OptionError.exit_status)

    return upstream(explained)


def _wants_traceback() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def _line_of(error: Exception) -> str | None:
    """What to say of an error of Hydra's own; None for those of the run, and of programs."""
    if _passes(error, _run_task):
        return None
    if isinstance(error, SearchPathException):
        found = re.fullmatch("Additional config directory '(.*)' not found", str(error))
        return f"--config-dir {found[1]}: there is no such folder" if found else str(error)
    if isinstance(error, HydraException):
        return _joined(str(error))
    if isinstance(error, InterpolationResolutionError):
        return str(unresolved(error))
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__  # logging hides it in a ValueError
    return None if cause is None else _unwritable(cause, _frames(error))


def _unwritable(error: OSError, frames: list[FrameType]) -> str | None:
    """Of a folder of Hydra's; None if it is of no such folder."""
    for frame in reversed(frames):
        given = frame.f_locals
        if frame.f_code is run_job.__code__:
            key, config = given["job_dir_key"], given["config"]
        elif isinstance(given.get("self"), (Sweeper, Launcher)):
            key, config = "hydra.sweep.dir", given["self"].config
        else:
            continue
        value = OmegaConf.select(config, key)
        where = error.filename or given.get("output_dir") or value
        remedy = f"cannot write {where}: {error.strerror}; give a folder that can be written"
        return str(OptionError(key, value, remedy))
    return None


def _passes(error: BaseException, function: Callable) -> bool:
    """Whether it was raised in a call of the function."""
    return any(frame.f_code is function.__code__ for frame in _frames(error))


def _frames(error: BaseException) -> list[FrameType]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


WRAPPED: tuple[tuple[Any, str, Callable], ...] = (
    (ConfigLoaderImpl, "load_configuration", _load_configuration),
    (ConfigRepository, "load_config", _load_config),
    (Hydra, "run", _run),
    (Hydra, "multirun", _run),
    (utils, "run_and_report", _run_and_report),
)
"""What explains: of whom, which function, and what is called in its place."""
