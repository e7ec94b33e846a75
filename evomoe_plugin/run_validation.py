"""What makes a run fit to start, beside valid options: checked before any process is started."""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from evomoe_plugin.gates.auxiliary import coefficients
from evomoe_plugin.gates.base import gate_class
from evomoe_plugin.options import MoEOptions, OptionError
from evomoe_plugin.validation import validate

logger = logging.getLogger(__name__)


def validate_run(cfg: Any) -> None:
    """Check a whole fairseq run before any process is started.

    Args:
        cfg: fairseq's configuration; `cfg.model` is None for runs that take it from a checkpoint.
    Raises:
        OptionError: as `validate`, and for data that is not there.
    """
    _check_data(cfg)
    model = cfg.model
    if model is None:
        return
    _check_changes(cfg)
    # A hand-written yaml may leave fields to the architecture's defaults; then the check waits
    # for `build_model`, which knows them.
    if any(f.name not in model for f in fields(MoEOptions)):
        return
    validate(model)
    if cfg.criterion is not None and cfg.criterion._name == "cross_entropy":
        logger.warning("--criterion cross_entropy: gate losses are not added and routing is not "
                       "logged; --criterion moe_cross_entropy does both")
    for warning in _strong_losses(model, getattr(cfg.criterion, "moe_gate_loss_wt", 0.0)):
        logger.warning(warning)


def _check_changes(cfg: Any) -> None:
    """What else the run must be for weights to be changed in it, or set at its start.

    Fields that a hand-written yaml leaves out have the defaults, which no architecture changes.
    """
    given = {f.name: getattr(cfg.model, f.name, f.default) for f in fields(MoEOptions)}
    spawn, dense = given["moe_spawn_updates"], given["moe_init_from_dense"]
    if spawn is not None and cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError("store_ema", True,
                          "the averages of experts would be of before the spawn: leave it out, or "
                          "--moe-spawn-updates")
    if dense is not None and cfg.checkpoint.finetune_from_model:
        raise OptionError("moe_init_from_dense", dense,
                          "--finetune-from-model gives the first weights already: leave one of "
                          "them out")
    changes = {"moe_spawn_updates": spawn, "moe_init_from_dense": dense,
               "moe_adapt_record_interval": getattr(
                   cfg.model, "moe_adapt_record_interval", None)}
    change = next((name for name, value in changes.items() if value), None)
    if change is not None:
        _check_owner_of_weights(cfg, f"--{change.replace('_', '-')}")
    if spawn is not None:
        for warning in _moments_warnings(cfg.optimizer, spawn):
            logger.warning(warning)


def _check_owner_of_weights(cfg: Any, change: str) -> None:
    """Raise `OptionError` where the optimizer, or a copy of the weights, would not see `change`."""
    parallel = cfg.distributed_training
    if parallel.zero_sharding != "none":
        raise OptionError("zero_sharding", parallel.zero_sharding,
                          f"keeps the optimizer's state where {change} cannot edit it: give "
                          "--ddp-backend fully_sharded")
    if cfg.optimization.use_bmuf:
        raise OptionError("use_bmuf", f"with {change}",
                          "keeps a copy of the weights, which would undo the change: leave it out")
    if parallel.ddp_backend == "slowmo":
        raise OptionError("ddp_backend", f"slowmo with {change}",
                          "keeps a copy of the weights, which would undo the change: give "
                          "legacy_ddp or fully_sharded")


# Above it, weights without moments take steps of more than twice the learning rate.
_MOST_BETA2 = 0.99


def largest_step(betas: Sequence[float], updates: int) -> float:
    """How many times the learning rate Adam moves a weight at most whose gradient stays the same
    and begins after `updates` updates of zeros: the moments begin, the corrections have ended."""
    def step(k: int) -> float:
        one, two = ((1 - beta**k) / (1 - beta ** (updates + k)) for beta in betas)
        return one / two**0.5 if two else 1.0

    beta1, beta2 = betas
    return max(map(step, range(1, 1 + int(5 / max(1 - beta1, 1 - beta2, 1e-3)))))


def _moments_warnings(optimizer: Any, updates: int) -> Iterator[str]:
    betas = getattr(optimizer, "adam_betas", None)
    if isinstance(betas, str):
        betas = ast.literal_eval(betas)
    if not betas or betas[1] <= _MOST_BETA2:
        return
    yield (f"--adam-betas {tuple(betas)} with --moe-spawn-updates {updates}: after the spawn the "
           "gate's weights, and those that are new, begin without moments amid the run: their "
           f"first steps are up to {largest_step(betas, updates):.1f} times --lr; with (0.9, 0.98) "
           f"it is {largest_step((0.9, 0.98), updates):.1f} times")


# Losses that are about 1 or more when all is well; published coefficients are 0.001 to 0.03.
_LARGE_LOSSES = ("balance", "switch", "diversity", "simplicity", "efficiency")


def _strong_losses(model: Any, weight: float) -> Iterator[str]:
    chosen = coefficients(model, gate_class(model.moe_gate))
    strong = [name for name in _LARGE_LOSSES if chosen.get(name, 0.0) * weight > 0.1]
    if strong:
        yield (f"--moe-gate-loss-wt {weight}: the auxiliary loss {strong[0]} is added "
               f"{chosen[strong[0]] * weight:g} times; 0.01 is usual")


def _check_data(cfg: Any) -> None:
    task = cfg.task
    if task is None or getattr(task, "_name", None) != "language_modeling":
        return
    folder = Path(str(task.data).split(os.pathsep)[0])
    remedy = "give a folder made by `evomoe prepare` or fairseq-preprocess"
    if not folder.is_dir():
        raise OptionError("DATA", task.data, f"no such folder; {remedy}")
    if not (folder / "dict.txt").is_file():
        raise OptionError("DATA", task.data, f"has no dict.txt; {remedy}")
    if cfg.model is not None and not list(folder.glob(f"{cfg.dataset.train_subset}*.idx")):
        raise OptionError("DATA", task.data,
                          f"has no {cfg.dataset.train_subset}.idx to train on; {remedy}")
