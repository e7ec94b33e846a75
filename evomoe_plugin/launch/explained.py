"""Which errors of a run one line explains: another rank's end, and options that fairseq refuses."""

from __future__ import annotations

import logging
import re
import sys
import traceback
from importlib.metadata import packages_distributions
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch import nn

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.trainer import first_step

logger = logging.getLogger(__name__)


def explained(error: Exception) -> RunFailed | None:
    """What to say instead of a traceback; None for errors that need theirs."""
    if isinstance(error, (OptionError, RunFailed)):
        return None
    if dist.is_initialized() and _is_of_a_collective(error) and (lost := _how_lost(str(error))):
        return RunFailed(f"rank {dist.get_rank()} {lost}")
    return _refusal(error)


# --- other ranks

# How gloo and NCCL say that a rank at the other end of a connection is gone, or silent.
_LOST = re.compile("onnection (closed|reset) by (remote )?peer|Broken pipe|remote process exited")
_SILENT = re.compile("timed out|timeout", re.IGNORECASE)


def _is_of_a_collective(error: Exception) -> bool:
    """Whether torch.distributed raised it: it has types of its own, but for gloo's connections,
    whose errors begin with their place in gloo."""
    of_gloo = isinstance(error, RuntimeError) and re.match(r"\[[^]]*gloo/", str(error))
    return isinstance(error, dist.DistError) or bool(of_gloo)


def _how_lost(message: str) -> str | None:
    if _LOST.search(message):
        return "lost its connection to another rank, which ended first and said why"
    if _SILENT.search(message):
        return (
            "has waited for another rank until the time was up: that one is stopped, or does not "
            "get on; the last checkpoint, if any, is intact"
        )
    return None


# --- options

_FAIRSEQ = ("fairseq", "fairseq_cli")


def _refusal(error: Exception) -> RunFailed | None:
    """Of an error by which fairseq, or a library called by it, refuses options before the first
    step; not of an error of this package, or of a program of the user's."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    in_a_model = any(frame.f_code is nn.Module._call_impl.__code__ for frame in frames)
    if first_step.has_begun() or in_a_model:
        return None
    libraries = {*sys.stdlib_module_names, *packages_distributions()} - {*_FAIRSEQ, "evomoe_plugin"}
    lines = dict(traceback.walk_tb(error.__traceback__))
    for frame in reversed(frames):
        package = _package(frame)
        if package in _FAIRSEQ:
            logger.debug("fairseq refused the options", exc_info=error)
            message = " ".join(str(error).split())[:300]
            where = f"{Path(frame.f_code.co_filename).name}, line {lines[frame]}"
            return RunFailed(
                f"fairseq does not accept these options: {type(error).__name__}: {message} "
                f"({where}; LOGLEVEL=DEBUG shows more)"
            )
        if package not in libraries:
            return None
    return None


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]
