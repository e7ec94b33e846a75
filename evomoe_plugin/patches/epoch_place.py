"""The place in an epoch, for a run that resumes with batches of another size."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fairseq.data.iterators import EpochBatchIterator

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrapping

logger = logging.getLogger(__name__)

BATCHES = "batches"
"""In the state: the number of batches of the epoch, of all ranks."""


def _state_dict(upstream: Callable, iterator: EpochBatchIterator) -> dict[str, Any]:
    state = upstream(iterator)
    if not callable(iterator.batch_sampler):  # else each epoch has its own
        state[BATCHES] = len(iterator.frozen_batches)
    return state


def _load_state_dict(
    upstream: Callable, iterator: EpochBatchIterator, state: dict[str, Any]
) -> None:
    """As upstream, but at the same share of the epoch where that has another number of batches."""
    iterator.epoch = state["epoch"]
    before, now = state.get(BATCHES), len(iterator.frozen_batches)
    position = state.get("iterations_in_epoch", 0)
    if position > 0 and before not in (None, now):
        scaled = min(position * now // before, len(iterator) - 1)
        logger.warning(
            "the epoch of the checkpoint had %d batches, that of this run has %d: resuming at "
            "batch %d of %d, which is the same share of it, where the checkpoint was at %d. Some "
            "samples of this epoch may be seen again, and others not at all",
            before,
            now,
            scaled,
            len(iterator),
            position,
        )
        position = scaled
    elif position >= len(iterator) > 0:
        raise OptionError(
            "reset_dataloader",
            "is missing",
            f"the checkpoint is {position} batches into its epoch, which has {len(iterator)} now: "
            "give --batch-size, --max-tokens and --tokens-per-sample of before, or begin the epoch "
            "anew with this option",
        )
    upstream(iterator, {**state, "iterations_in_epoch": position})


PATCH = Patch(
    name="epoch-place",
    broken="a run that resumes with another --batch-size, --max-tokens or --tokens-per-sample goes "
    "on at another share of the epoch, or ends in a RuntimeError",
    upstream="fairseq/data/iterators.py: EpochBatchIterator counts batches, whatever their size",
    remove_when="fairseq keeps the number of samples",
    needed=always("batches are no unit"),
    apply=wrapping(EpochBatchIterator, state_dict=_state_dict, load_state_dict=_load_state_dict),
)
