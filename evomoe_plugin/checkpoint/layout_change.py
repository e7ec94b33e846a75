"""Resuming with another parallelism than the checkpoint was written with."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from evomoe_plugin.checkpoint import expert_loading, fsdp_shards
from evomoe_plugin.checkpoint.expert_shards import ExpertShards, manifest_of, merge
from evomoe_plugin.checkpoint.optimizer_layout import (
    OptimizerLayout,
    check_number_trained,
    fsdp_layout,
    is_flat,
    model_layout,
    plain_layout,
)
from evomoe_plugin.checkpoint.sharded_experts import Divided, divided
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrap
from evomoe_plugin.trainer.before_loading import loaded_by, trainer_that_loads

logger = logging.getLogger(__name__)

# Wrappers of the same optimizer: without FSDP, and with it or --memory-efficient-fp16.
HALF_PRECISION = ("FP16Optimizer", "MemoryEfficientFP16Optimizer")

# Optimizers whose state is the same, by what `--optimizer` calls them.
SAME_STATE = {"adam": "FairseqAdam", "fused_adamw": "FusedAdamW"}


def _load_checkpoint(
    upstream: Callable, trainer: Trainer, filename: str, *args: Any, **kwargs: Any
) -> Any:
    """In place of `Trainer.load_checkpoint`: find the files, convert what is in them."""
    found = _existing(trainer, filename)
    with expert_loading.loading(trainer, found):
        extra_state = upstream(trainer, found, *args, **kwargs)
    if extra_state is not None and _reads_own_shard(trainer):
        _check_same_update(trainer, filename)
    return extra_state


def _reads_own_shard(trainer: Trainer) -> bool:
    return trainer.is_fsdp and trainer.cfg.distributed_training.use_sharded_state


def _existing(trainer: Trainer, filename: str) -> str:
    """The file to read for `filename`: itself, or else the shards of the same checkpoint."""
    if os.path.exists(filename):
        return filename
    first_shard = fsdp_shards.shard_path(filename, 0)
    whole = fsdp_shards.SHARD.sub(".pt", filename)
    if _reads_own_shard(trainer):
        if os.path.exists(first_shard):
            raise _shard_missing(trainer, filename)
        if os.path.exists(whole):
            raise OptionError("use_sharded_state", "", f"{whole} is one file for all ranks: "
                                                       "resume without --use-sharded-state")
    elif os.path.exists(first_shard):
        logger.info("%s was written with --use-sharded-state: putting it together", filename)
        return first_shard
    _check_is_default(trainer, filename)
    return filename


def _shard_missing(trainer: Trainer, filename: str) -> OptionError:
    with loaded_by(None):  # names the shard that is missing, unless this run only has more ranks
        state = checkpoint_utils.load_checkpoint_to_cpu(filename)
    return _other_world_size(fsdp_shards.world_size(state), trainer)


def _other_world_size(count: int, trainer: Trainer) -> OptionError:
    return OptionError(
        "distributed_world_size", trainer.data_parallel_world_size,
        f"the checkpoint has {count} shards: give {count}, or leave --use-sharded-state out, "
        "which puts them together",
    )


def _check_is_default(trainer: Trainer, filename: str) -> None:
    given = trainer.cfg.checkpoint.restore_file
    if given != "checkpoint_last.pt":
        raise OptionError("restore_file", given, f"there is no {filename}")


def _check_same_update(trainer: Trainer, filename: str) -> None:
    """Shards that a killed run left at different updates must not train on together."""
    own = trainer._optim_history[-1]["num_updates"]
    updates: list[int] = [own] * trainer.data_parallel_world_size
    dist.all_gather_object(updates, own, group=trainer.data_parallel_process_group)
    if len(set(updates)) > 1:
        raise OptionError("checkpoint", fsdp_shards.SHARD.sub(".pt", filename),
                          f"its shards are of different updates ({', '.join(map(str, updates))}):"
                          " take an earlier one with --restore-file")


def _load_to_cpu(upstream: Callable, path: str, *args: Any, **kwargs: Any) -> dict:
    """In place of `load_checkpoint_to_cpu`: one state for all ranks, as this run keeps it."""
    trainer, resets = trainer_that_loads() or (None, False)

    def read(path: str) -> dict:
        return upstream(path, *args, **kwargs)

    if not fsdp_shards.SHARD.search(path):
        state = read(path)
        return _complete(state, path) if trainer is None else _adapt(state, trainer, path, resets)
    if trainer is None:
        state = fsdp_shards.consolidated(path, read)
        del state["fsdp_metadata"]  # makes upstream look for shards
        return state
    if not _reads_own_shard(trainer):
        return _adapt(fsdp_shards.consolidated(path, read), trainer, path, resets)
    state = read(path)
    if fsdp_shards.world_size(state) != trainer.data_parallel_world_size:
        raise _other_world_size(fsdp_shards.world_size(state), trainer)
    _name_optimizer(state, trainer)
    return state


def _complete(state: dict, path: str) -> dict:
    """With the experts that have files of their own."""
    manifest = manifest_of(state, path)
    if manifest is not None:
        merge(state, ExpertShards(path, manifest))
    return state


def _adapt(state: dict, trainer: Trainer, path: str, resets: bool) -> dict:
    """Change `state` to what a run like `trainer`'s would have written, the optimizer's unless it
    begins afresh."""
    _adapt_iterator(state, trainer)
    experts, manifest = divided(trainer), manifest_of(state, path)
    if experts is not None:
        expert_loading.check_experts(state, experts, path)
    if manifest is not None:
        merge(state, ExpertShards(path, manifest), experts and experts.groups.own,
              with_optimizer=not resets)
    if not resets:
        _adapt_optimizer(state, trainer, None if manifest is not None else experts)
    if experts is not None:
        expert_loading.take_experts_out(state, experts)
    return state


def _adapt_optimizer(
    state: dict, trainer: Trainer, whole: Divided | None = None
) -> None:
    """Change the optimizer's state to the layout of `trainer`'s.

    Args:
        whole: the layers whose experts are to be divided still.
    """
    optimizer = state.get("last_optimizer_state")
    if not optimizer:
        return
    _name_optimizer(state, trainer)
    was_fsdp = "param_id_map" in optimizer
    new = model_layout(trainer)
    if not was_fsdp and not trainer.is_fsdp and whole is None and (
            is_flat(optimizer, new) == new.is_flat):
        check_number_trained(optimizer, new)
        return
    written = new if whole is None else whole.undivided(new)
    old = fsdp_layout(state, new.names) if was_fsdp else plain_layout(state, written)
    check_number_trained(optimizer, old)
    if old == new:
        return
    logger.info("converting the optimizer's state from %s to %s",
                _layout_name(old), _layout_name(new))
    named = old.by_name(optimizer)
    if whole is not None:
        named = whole.own_moments(named)
    state["last_optimizer_state"] = new.state(named, optimizer)


def _name_optimizer(state: dict, trainer: Trainer) -> None:
    """As the trainer's, which upstream asks for, where what it keeps is the same."""
    history = state["optimizer_history"][-1]
    if history["optimizer_name"] in HALF_PRECISION and trainer.cfg.common.fp16:
        efficient = trainer.is_fsdp or trainer.cfg.common.memory_efficient_fp16
        history["optimizer_name"] = HALF_PRECISION[efficient]
    elif history["optimizer_name"] in SAME_STATE.values():
        history["optimizer_name"] = SAME_STATE.get(trainer.cfg.optimizer._name,
                                                   history["optimizer_name"])


def _layout_name(layout: OptimizerLayout) -> str:
    if layout.modules is not None:
        return "fully sharded"
    return "flat" if layout.is_flat else "plain"


def _adapt_iterator(state: dict, trainer: Trainer) -> None:
    """Count batches of this many processes: each takes every N-th batch of the epoch."""
    iterator = state.get("extra_state", {}).get("train_iterator")
    cfg = state.get("cfg")
    if not iterator or not cfg:
        return
    before, now = fsdp_shards.world_size(state), trainer.data_parallel_world_size
    position = iterator.get("iterations_in_epoch", 0)
    if before == now or position == 0:
        return
    iterator["iterations_in_epoch"] = position * before // now
    again = position * before % now
    logger.info("resuming at batch %d of each of %d processes, which was %d of each of %d%s",
                iterator["iterations_in_epoch"], now, position, before,
                f"; {again} batches are seen again" if again else "")


def _file_to_evaluate(
    upstream: Callable, filename: str, suffix: str, shard_idx: int, num_shards: int
) -> str:
    """Upstream prefers fsdp_shards, however old, to the file that was named."""
    named = filename.replace(".pt", suffix + ".pt")
    if num_shards == 1 and os.path.exists(named):
        return named
    found = upstream(filename, suffix, shard_idx, num_shards)
    if not checkpoint_utils.PathManager.exists(found):
        raise OptionError("path", filename, "there is no such checkpoint")
    return found


@functools.cache
def apply() -> None:
    wrap(checkpoint_utils, "get_maybe_sharded_checkpoint_filename", _file_to_evaluate)
    wrap(checkpoint_utils, "load_checkpoint_to_cpu", _load_to_cpu)
    wrap(Trainer, "load_checkpoint", _load_checkpoint)


PATCH = Patch(
    name="layout-change",
    broken="a plain checkpoint resumed fully sharded, and the reverse, ends in KeyError: "
           "param_id_map or an assertion; shards without --use-sharded-state are not seen and "
           "training starts anew, as it does with a --restore-file that does not exist; "
           "fairseq-eval-lm cannot read shards; with another number of processes the wrong "
           "number of batches is skipped",
    upstream="fairseq/trainer.py: load_checkpoint; fairseq/checkpoint_utils.py; "
             "fairseq/data/iterators.py: EpochBatchIterator.load_state_dict",
    remove_when="training moves to torch's own distributed checkpoints",
    needed=always("checkpoints outlive the number of processes"),
    apply=apply,
)
