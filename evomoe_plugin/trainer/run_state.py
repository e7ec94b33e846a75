"""The state of a run: what checkpoints hold beside fairseq's, and resuming from them.

How ranks hold it is the layout's matter (`trainer.layout`).
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import meters, metrics
from torch import Tensor

from evomoe_plugin.checkpoint import checkpoint_files, resume
from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.checkpoint.content import check_moments
from evomoe_plugin.checkpoint.load import check_finite, misfit
from evomoe_plugin.checkpoint.optimizer_layout import PARAMETER_NAMES
from evomoe_plugin.checkpoint.sharded_experts import check_all_ranks_see
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.dispatch.sharded_layers import sharded_layers
from evomoe_plugin.trainer import early_stopping, hooks, loss_scaler, run_end

logger = logging.getLogger(__name__)

# What `extra_state` holds beside fairseq's: updates since the last step of the moving average
# (--ema-update-freq), counters of the loss scaler, validations since the best.
_EMA_COUNTER, _SCALER, _EARLY_STOPPING = "ema_update_freq_counter", "loss_scaler", "early_stopping"


def completed(trainer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """fairseq's `state` of a trainer, with all that resuming needs.

    fp32 masters take the place of half-precision weights; added are the names of the optimizer's
    entries, and in `extra_state` counters.
    """
    layout = trainer.layout
    state["model"] = layout.model_state(trainer, state["model"])
    state["optimizer_history"][-1]["optimizer_name"] = _optimizer_name(trainer)
    model = state["model"]
    # By address, since shared parameters have several names. Copies, since a file would hold
    # all of the flat master for every view of it.
    masters = {
        model[name].data_ptr(): master.clone()
        for name, master in layout.fp32_masters(trainer).items()
        if name in model and master.numel()
    }
    for name, value in model.items():
        model[name] = masters.get(value.data_ptr(), value)
    if "last_optimizer_state" in state and not layout.has_fsdp_metadata:
        state[PARAMETER_NAMES] = list(layout.optimizer_layout(trainer).names)
    extra_state = state["extra_state"]
    if trainer.cfg.ema.store_ema:
        extra_state[_EMA_COUNTER] = trainer.ema.update_freq_counter
    if trainer.scaler is not None:
        extra_state[_SCALER] = loss_scaler.state_dict(trainer.scaler)
    if trainer.cfg.checkpoint.patience > 0:
        extra_state[_EARLY_STOPPING] = early_stopping.STATE.state_dict()
    return state


def _optimizer_name(trainer: Any) -> str:
    """As checkpoints have it: the same for all ways of training in half precision."""
    kept_in_fp32 = trainer.layout.is_fully_sharded and trainer.cfg.common.bf16
    return "FP16Optimizer" if kept_in_fp32 else type(trainer.optimizer).__name__


def load_checkpoint(
    trainer: Any, filename: str, *args: Any, **kwargs: Any
) -> dict[str, Any] | None:
    """Resume from a checkpoint of any parallelism, called on all ranks.

    Returns:
        fairseq's `extra_state`; None where there is no checkpoint, and the run begins.
    Raises:
        OptionError: the checkpoint cannot be read or does not fit the run.
    """
    try:
        try:
            return _load_checkpoint(trainer, filename, *args, **kwargs)
        except resume.TornCheckpoint as error:
            earlier = resume.earlier_whole(trainer, filename)
            if earlier is None:
                raise
            logger.warning("%s; this run resumes from %s", error, earlier)
            return _load_checkpoint(trainer, earlier, *args, **kwargs)
    except OptionError as error:
        option, value, remedy = error.arguments
        given = trainer.cfg.checkpoint
        if option != "checkpoint":
            raise
        if filename == given.finetune_from_model:
            option = "finetune_from_model"
        elif given.restore_file != "checkpoint_last.pt":
            option = "restore_file"
        raise OptionError(option, value, remedy) from error


def _load_checkpoint(
    trainer: Any,
    filename: str,
    reset_optimizer: bool = False,
    reset_lr_scheduler: bool = False,
    optimizer_overrides: dict[str, Any] | None = None,
    reset_meters: bool = False,
) -> dict[str, Any] | None:
    checkpoint = trainer.cfg.checkpoint
    if trainer.data_parallel_rank == 0 and not checkpoint.no_save:
        checkpoint_files.remove_leftovers(checkpoint.save_dir)
    trainer._optim_history = []
    logger.info("Preparing to load checkpoint %s", filename)
    # Of an earlier run in this process, as of a Hydra sweep.
    early_stopping.STATE.restore({})
    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    path = resume.file_to_read(trainer, filename)
    state = read_checkpoint(trainer, path, reset_optimizer)
    if state is None:
        resume.check_begins(checkpoint, path)
        logger.info("No existing checkpoint found %s", path)
        trainer.set_model_updates()
        for callback in hooks.TRAIN_START:
            callback(trainer)
        return None

    exact = load_model(trainer, path, state)
    trainer._optim_history = state["optimizer_history"]
    optimizer_state = state.pop("last_optimizer_state", None)
    if optimizer_state is not None and not reset_optimizer:
        _load_optimizer(trainer, path, optimizer_state, reset_lr_scheduler, optimizer_overrides)
    elif not reset_optimizer:
        logger.warning(
            "%s has no optimizer state (--no-save-optimizer-state): its moments, the number of "
            "updates and the schedules that follow it begin anew",
            path,
        )
    if exact:
        for name, master in trainer.layout.fp32_masters(trainer).items():
            if name in exact:
                master.copy_(exact[name])
    extra_state = state["extra_state"]
    if not reset_optimizer:
        if trainer.scaler is not None:
            loss_scaler.restore(trainer.scaler, extra_state.get(_SCALER, {}))
        if not reset_meters:  # as fairseq does with the best score
            early_stopping.STATE.restore(extra_state.get(_EARLY_STOPPING, {}))
    starts_anew = checkpoint.reset_dataloader or filename == checkpoint.finetune_from_model
    _load_progress(trainer, extra_state, reset_meters, starts_anew)
    trainer.set_model_updates()  # 0 with --reset-optimizer
    _check_same_on_all_ranks(trainer, path, filename)
    logger.info(
        "Loaded checkpoint %s (epoch %d @ %d updates)",
        path,
        extra_state["train_iterator"]["epoch"],
        trainer.get_num_updates(),
    )
    hours = trainer._previous_training_time / 3600
    limit = run_end.limit_reached(
        trainer.cfg, trainer.get_num_updates(), hours, early_stopping.STATE
    )
    if limit is not None:
        logger.info(
            "nothing to train: the checkpoint, of update %d and %.2f hours, has reached %s",
            trainer.get_num_updates(),
            hours,
            limit,
        )
        # Main reads it after loading (0 would be no limit). It would look at the other limits
        # only after one more update, and write that.
        trainer.cfg.optimization.max_epoch = -1
    return extra_state


def read_checkpoint(trainer: Any, path: str, reset_optimizer: bool) -> dict[str, Any] | None:
    """This rank's state, fitted to the run; None where there is no file.

    Rank 0 reads and sends it to the others, unless the ranks need different parts of it.
    """
    is_sharded = bool(sharded_layers(trainer.get_model()))
    exists = PathManager.isfile(path)
    if is_sharded:
        check_all_ranks_see(path, exists)
    elif trainer.layout.reads_own_shard:
        resume.check_all_have_shards(trainer, path, exists)
    if not exists:
        return None
    on_all_ranks = (
        is_sharded
        or trainer.cfg.checkpoint.load_checkpoint_on_all_dp_ranks
        or trainer.layout.reads_own_shard
        or getattr(trainer.cfg.model, "base_layers", 0) > 0  # fairseq's, with a file a rank
    )

    def check(state: dict[str, Any], path: str) -> None:
        check_finite(state["model"], path)
        for function in hooks.LOADING:
            function(trainer, state, path, reset_optimizer)

    state: Any = None
    if on_all_ranks or trainer.data_parallel_rank == 0:
        state = resume.read_for(trainer, path, reset_optimizer, on_all_ranks, check)
    if trainer.data_parallel_world_size == 1 or on_all_ranks:
        return state
    kept = None
    if state is not None and trainer.cfg.distributed_training.zero_sharding == "os":
        kept = state.get("last_optimizer_state")
        if kept is not None:  # each rank is sent its shard of it when the optimizer loads it
            state["last_optimizer_state"] = "SHARDED"
    state = distributed_utils.broadcast_object(
        state, src_rank=0, group=trainer.data_parallel_process_group, dist_device=trainer.device
    )
    if kept is not None:
        state["last_optimizer_state"] = kept
    return state


def load_model(trainer: Any, path: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Load the weights, and take them out of `state`.

    Returns:
        By name, those that the file holds in fp32 and the model in half precision.
    """
    history, weights = state["optimizer_history"], state.pop("model")
    if history and "num_updates" in history[-1]:
        trainer.model.set_num_updates(history[-1]["num_updates"])
    try:
        trainer.layout.load_model(trainer, weights)
        if utils.has_parameters(trainer.get_criterion()):
            trainer.get_criterion().load_state_dict(state.pop("criterion"), strict=True)
    except OptionError:
        raise
    except Exception as error:
        saved = (state.get("cfg") or {}).get("model") or {}
        raise misfit(path, error, saved, trainer.cfg.model) from error
    if trainer.layout.is_fully_sharded or not (trainer.cfg.common.fp16 or trainer.cfg.common.bf16):
        return {}
    return {  # by the names of today, which loading gave to those of an earlier fairseq
        name: weights[name]
        for name, p in trainer.get_model().named_parameters()
        if name in weights and weights[name].dtype == torch.float32 != p.dtype
    }


def _load_optimizer(
    trainer: Any, path: str, state: Any, reset_lr_scheduler: bool, overrides: dict[str, Any] | None
) -> None:
    trainer._build_optimizer()  # anew: the parameters may be other tensors now
    last = trainer._optim_history[-1]
    for what, saved, now in (
        ("Criterion", last["criterion_name"], type(trainer.get_criterion()).__name__),
        ("Optimizer", last["optimizer_name"], _optimizer_name(trainer)),
    ):
        if saved != now:
            raise OptionError(
                "checkpoint",
                path,
                f"{what} does not match; please reset the "
                f"optimizer (--reset-optimizer). {saved} vs "
                f"{now}",
            )
    try:
        if not reset_lr_scheduler:
            trainer.lr_scheduler.load_state_dict(last["lr_scheduler_state"])
        own = trainer.layout.own_optimizer_state(trainer, state)
        trainer.optimizer.load_state_dict(own, overrides)
    except Exception as error:  # of a state of other parameters, anything
        raise OptionError(
            "checkpoint",
            path,
            f"its optimizer state does not fit the run ({describe(error)}): give its options, "
            "or --reset-optimizer",
        ) from error
    check_moments(trainer.optimizer.optimizer, path, trainer.optimizer.supports_flat_params)
    trainer.set_num_updates(last["num_updates"])


def _load_progress(
    trainer: Any, extra_state: dict[str, Any], reset_meters: bool, starts_anew: bool
) -> None:
    """Restore times, learning rate, meters and the moving average of weights.

    Args:
        starts_anew: whether the run begins at the first batch, as with a crash.pt it must.
    """
    if "previous_training_time" in extra_state:
        trainer._previous_training_time = extra_state["previous_training_time"]
        trainer._start_time = time.time()
    iterator = extra_state["train_iterator"]
    epoch = iterator.get("epoch", 1)
    if epoch < 1 and not starts_anew:
        raise OptionError(
            "restore_file",
            trainer.cfg.checkpoint.restore_file,
            "does not say how far the run was: take an earlier one, or give --reset-dataloader to "
            "go on with the first batch, or --finetune-from-model to start from its weights",
        )
    trainer.lr_step(max(epoch, 1))
    starts_epoch = iterator.get("version", 1) >= 2 and iterator["iterations_in_epoch"] == 0
    if "metrics" in extra_state and not reset_meters and not starts_epoch:
        metrics.load_state_dict(extra_state["metrics"])
        for meter in metrics.get_meters("default"):
            if isinstance(meter, meters.TimeMeter):
                meter.reset()  # its start belongs to the earlier process
    if not trainer.cfg.ema.store_ema:
        return
    if "ema" not in extra_state:
        logger.warning(
            "the checkpoint has no moving average of the weights: it starts from the weights"
        )
        trainer.ema.restore(
            trainer.get_model().state_dict(), build_fp32_params=trainer.cfg.ema.ema_fp32
        )
        return
    trainer.ema.restore(extra_state["ema"], build_fp32_params=False)
    trainer.ema.update_freq_counter = extra_state.get(_EMA_COUNTER, 0)
    if trainer.cfg.ema.ema_fp32:
        trainer.ema.build_fp32_params(extra_state.get("ema_fp32_params"))


def _check_same_on_all_ranks(trainer: Any, path: str, filename: str) -> None:
    """Raise `OptionError` on all ranks if each read a file of its own and they differ."""
    updates = trainer._optim_history[-1].get("num_updates")
    if trainer.layout.reads_own_shard:
        resume.check_same_update(trainer, filename, updates)
    elif sharded_layers(trainer.get_model()):
        check_all_ranks_see(path, updates)
