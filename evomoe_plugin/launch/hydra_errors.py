"""What Hydra says of a configuration that it cannot compose, of values in it that refer to what is
not there, and of folders that it cannot write: in one line, with what is right.

HYDRA_FULL_ERROR=1 has Hydra's tracebacks, as ever.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal import utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.utils import JobReturn, _save_config
from hydra.errors import (
    CompactHydraException,
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
    SearchPathException,
)
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from evomoe_plugin.config.errors import OptionError
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


def _compose(upstream: Callable, self: Any, *args: Any, **kw: Any) -> Any:
    self.composed = upstream(self, *args, **kw)
    return self.composed


def _run(upstream: Callable, self: Any, *args: Any, task_function: Callable, **kw: Any) -> Any:
    """Of `Hydra.run` and `Hydra.multirun`."""

    @functools.wraps(task_function)
    def task(cfg: Any) -> Any:
        return _run_task(task_function, cfg)

    try:
        return upstream(self, *args, task_function=task, **kw)
    except (OSError, ValueError) as error:
        key = "hydra.run.dir" if upstream.__name__ == "run" else "hydra.sweep.dir"
        config = None if _is_of_a_job(error) else getattr(self, "composed", None)
        line = None if config is None else _unwritable(error, config, key)
        if line is None:
            raise
        raise HydraException(line) from error


def _run_task(task_function: Callable, cfg: Any) -> Any:
    """Run fairseq's command. Hydra would keep its error, and print a line before it."""
    try:
        return task_function(cfg)
    except InterpolationResolutionError as error:
        is_of_the_run = _passes(error, call_main._call_main)
        line = None if is_of_the_run or _wants_traceback() else unresolved(error)
        if line is None:
            raise
        _end(line)


# What says that a file cannot be written, and not that a program is wrong.
_REFUSED = {
    errno.EACCES,
    errno.EDQUOT,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOSPC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def _unwritable(error: OSError | ValueError, config: Any, key: str) -> str | None:
    """What to say if the folder of the key cannot be written; None if the error is another."""
    refused = error if isinstance(error, OSError) else error.__cause__  # logging hides it
    if not isinstance(refused, OSError) or refused.errno not in _REFUSED:
        return None
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(config)  # for `${hydra:…}`: the run has put back what was before
    try:
        folder = OmegaConf.select(config, key)
    except InterpolationResolutionError:
        return None
    finally:
        hydra.cfg = before
    file = refused.filename
    if file is None and any(_passes(error, saving) for saving in (_save_config, OmegaConf.save)):
        file = folder  # a full disk is met while an open file is written
    if file is None or not _is_in(file, folder):
        return None
    remedy = f"cannot write {file}: {refused.strerror}; give a folder that can be written"
    return f"{key} {folder}: {remedy}"


def _is_in(file: Any, folder: Any) -> bool:
    """Whether it is of the folder, or one in which the folder would be."""
    file, folder = Path(os.path.abspath(file)), Path(os.path.abspath(folder))
    return file.is_relative_to(folder) or folder.is_relative_to(file)


def _run_and_report(upstream: Callable, function: Callable[[], Any]) -> Any:
    def explained() -> Any:
        try:
            return function()
        except Exception as error:
            line = None if _wants_traceback() else _line_of(error)
            if line is None:
                raise
            _end(line)

    return upstream(explained)


def _end(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(OptionError.exit_status)


def _wants_traceback() -> bool:
    """As Hydra decides it."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" or utils.is_under_debugger()


def _line_of(error: Exception) -> str | None:
    """What to say of an error of Hydra's own; None for those of the run, and of programs."""
    if _is_of_a_job(error):
        return None
    if isinstance(error, SearchPathException):
        found = re.fullmatch("Additional config directory '(.*)' not found", str(error))
        return f"--config-dir {found[1]}: there is no such folder" if found else str(error)
    if isinstance(error, HydraException):
        return _joined(str(error))
    return unresolved(error) if isinstance(error, InterpolationResolutionError) else None


def _is_of_a_job(error: BaseException) -> bool:
    """Whether a run raised it, here or where a launcher has started it."""
    return _passes(error, _run_task) or _passes(error, JobReturn.return_value.fget)  # type: ignore[attr-defined]


def _passes(error: BaseException, function: Callable) -> bool:
    """Whether it was raised in a call of the function."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code is function.__code__ for frame, _ in frames)


WRAPPED: tuple[tuple[Any, str, Callable], ...] = (
    (ConfigLoaderImpl, "load_configuration", _load_configuration),
    (ConfigRepository, "load_config", _load_config),
    (Hydra, "compose_config", _compose),
    (Hydra, "run", _run),
    (Hydra, "multirun", _run),
    (utils, "run_and_report", _run_and_report),
)
"""What explains: of whom, which function, and what is called in its place."""
