"""A checkpoint that a run is to go on from is looked at before anything of it is taken."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from evomoe_plugin.compat.mend import Mend, always, wrap

Look = Callable[[Trainer, dict[str, Any], str, bool], None]
"""Called with the trainer, fairseq's state as the file has it, the file's name, and whether the
optimizer begins afresh and updates count from 0. Raises `OptionError` for what cannot go on."""

_callbacks: list[Look] = []

# The trainer that is loading in this thread, and whether it resets the optimizer.
_loading: ContextVar[tuple[Trainer, bool] | None] = ContextVar("loading", default=None)


def before_loading(callback: Look) -> None:
    """Have `callback` called for each file that a trainer reads, on the ranks that read it."""
    if callback not in _callbacks:
        _callbacks.append(callback)


def _load_checkpoint(
    upstream: Callable, trainer: Trainer, filename: str, *args: Any, **kwargs: Any
) -> Any:
    resets = args[0] if args else kwargs.get("reset_optimizer", False)
    token = _loading.set((trainer, bool(resets)))
    try:
        return upstream(trainer, filename, *args, **kwargs)
    finally:
        _loading.reset(token)


def _load_to_cpu(upstream: Callable, path: str, *args: Any, **kwargs: Any) -> dict:
    state = upstream(path, *args, **kwargs)
    loading = _loading.get()
    if loading is not None:
        trainer, resets = loading
        for callback in _callbacks:
            callback(trainer, state, path, resets)
    return state


@functools.cache
def apply() -> None:
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", _load_to_cpu)
    wrap(Trainer, "load_checkpoint", _load_checkpoint)


MEND = Mend(
    name="before-loading",
    broken="a run takes the weights and the optimizer's state of a checkpoint whatever options it "
           "was written with, also where these say what the weights are",
    upstream="fairseq/trainer.py: load_checkpoint; fairseq/checkpoint_utils.py",
    remove_when="fairseq shows its task or model a checkpoint before it is loaded",
    needed=always("spawned experts and frozen parameters are told from a checkpoint's options"),
    apply=apply,
)
