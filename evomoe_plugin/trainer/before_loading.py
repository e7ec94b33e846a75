"""A checkpoint that a run is to go on from is looked at before anything of it is taken."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from evomoe_plugin.patches.patch import Patch, always, wrap

Look = Callable[[Trainer, dict[str, Any], str, bool], None]
"""Called with the trainer, fairseq's state as the file has it, the file's name, and whether the
optimizer begins afresh and updates count from 0. Raises `OptionError` for what cannot go on."""

_callbacks: list[Look] = []

# The trainer that is loading a checkpoint in this thread, and whether it resets the optimizer;
# evaluation has none.
_loading: ContextVar[tuple[Trainer, bool] | None] = ContextVar("loading", default=None)


def trainer_that_loads() -> tuple[Trainer, bool] | None:
    """The trainer that is loading a checkpoint in this thread, and whether the optimizer begins
    afresh; None where nobody trains."""
    return _loading.get()


@contextlib.contextmanager
def loaded_by(loading: tuple[Trainer, bool] | None) -> Iterator[None]:
    """Inside, `trainer_that_loads` answers with this."""
    token = _loading.set(loading)
    try:
        yield
    finally:
        _loading.reset(token)


def before_loading(callback: Look) -> None:
    """Have `callback` called for each file that a trainer reads, on the ranks that read it."""
    if callback not in _callbacks:
        _callbacks.append(callback)


def _load_checkpoint(
    upstream: Callable, trainer: Trainer, filename: str, reset_optimizer: bool = False,
    *args: Any, **kwargs: Any
) -> Any:
    with loaded_by((trainer, bool(reset_optimizer))):
        return upstream(trainer, filename, reset_optimizer, *args, **kwargs)


def _load_to_cpu(upstream: Callable, path: str, *args: Any, **kwargs: Any) -> dict:
    state = upstream(path, *args, **kwargs)
    loading = trainer_that_loads()
    if loading is not None:
        trainer, resets = loading
        for callback in _callbacks:
            callback(trainer, state, path, resets)
    return state


@functools.cache
def apply() -> None:
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", _load_to_cpu)
    wrap(Trainer, "load_checkpoint", _load_checkpoint)


PATCH = Patch(
    name="before-loading",
    broken="a run takes the weights and the optimizer's state of a checkpoint whatever options it "
           "was written with, also where these say what the weights are",
    upstream="fairseq/trainer.py: load_checkpoint; fairseq/checkpoint_utils.py",
    remove_when="fairseq shows its task or model a checkpoint before it is loaded",
    needed=always("spawned experts and frozen parameters are told from a checkpoint's options"),
    apply=apply,
)
