"""Check a run against the checkpoint it resumes from: spawn and trained parameters.

Whether a checkpoint is in the dense phase follows from its own options and number of updates, as it
does in evaluation.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from fairseq.trainer import Trainer

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.sharded_layers import is_expert_parameter
from evomoe_plugin.experts.ffn import frozen_name
from evomoe_plugin.models.freeze import trained_names

logger = logging.getLogger(__name__)


def check_spawn(trainer: Trainer, state: dict[str, Any], path: str, resets: bool) -> None:
    """Refuse a second spawn, which would discard trained experts, and a missing first one.

    Args:
        trainer: of the run that resumes.
        state: fairseq's checkpoint. Masks that hold weights at zero are removed where the run
            restarts from its weights and lets them train.
        path: its file.
        resets: whether updates are counted from 0.
    Raises:
        OptionError: trained experts would be lost, or untrained ones used.
    """
    saved_model, now = state["cfg"].model, getattr(trainer.cfg.model, "moe_spawn_updates", None)
    if getattr(saved_model, "moe_expert_count", None) is None:
        return  # another kind of model, which loading reports
    saved = getattr(saved_model, "moe_spawn_updates", None)
    done = state["optimizer_history"][-1]["num_updates"]
    start = 0 if resets else done
    misfit = functools.partial(
        OptionError, "moe_spawn_updates", "is not given" if now is None else now
    )
    if saved is not None and done < saved:
        if now is None:
            raise misfit(
                f"only expert 0 of each layer of {path} is trained, its spawn was to be "
                f"at update {saved}: give an update above {start}"
            )
        if now <= start:
            raise misfit(
                f"{path} is of update {start} and not spawned, and never would be: give "
                f"an update above {start}"
            )
    elif now is not None and (resets or saved is None):
        at = "" if saved is None else f", spawned at update {saved}"
        raise misfit(
            f"all experts of {path} work already{at}, and another spawn would make them "
            "anew from expert 0: leave it out"
            + ("" if done else ", or give it to `evomoe upcycle` too")
        )
    elif not resets and now != saved:
        raise misfit(
            f"the experts of {path} were spawned at update {saved}, which schedules count "
            f"from: give --moe-spawn-updates {saved}"
        )
    elif resets and saved is not None:
        masks = [
            name
            for name in state["model"]
            if is_expert_parameter(name) and name.endswith(frozen_name(""))
        ]
        if masks:
            logger.info("%s holds masked weights at zero; they are trained from here on", path)
        for name in masks:
            del state["model"][name]


def check_trained(trainer: Trainer, state: dict[str, Any], path: str, resets: bool) -> None:
    """Refuse optimizer state of parameters other than those trained now.

    Which ones a checkpoint trained follows from its own options.

    Raises:
        OptionError: `--moe-train-only` chose others.
    """
    saved, now = (getattr(cfg.model, "moe_train_only", None) for cfg in (state["cfg"], trainer.cfg))
    if resets or saved == now or not state.get("last_optimizer_state"):
        return
    names = trainer.layout.parameter_names(trainer)

    def trained(train_only: str | None) -> set[str]:
        return set(names) if train_only is None else trained_names(names, train_only)

    if trained(saved) != trained(now):
        same = "leave it out" if saved is None else f"give --moe-train-only {saved}"
        raise OptionError(
            "moe_train_only",
            "is not given" if now is None else now,
            f"the optimizer's state in {path} is of other parameters: {same}, or "
            "give --reset-optimizer",
        )
