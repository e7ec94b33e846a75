"""Checks of the configuration of a whole run, before any rank is started.

Each check raises `OptionError` or returns.
"""

from __future__ import annotations

import ast
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from evomoe_plugin.config.checks import resolve_renamed, validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.evaluation_checks import check_evaluation, check_ranks_of_experts
from evomoe_plugin.config.fairseq_checks import check_fairseq
from evomoe_plugin.config.hf_config import resolve_hf_config
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.config.values import parse_bool
from evomoe_plugin.gates.registry import gate_class

logger = logging.getLogger(__name__)

# Optimizers whose steps depend on means or norms over whole parameters, and those that fairseq
# cannot shard for this or other reasons.
_OF_WHOLE_PARAMETERS = ("adafactor", "lamb")
_NOT_SHARDED = (*_OF_WHOLE_PARAMETERS, "adagrad")

# The values of --ddp-backend with which each rank keeps a part of every parameter.
FULLY_SHARDED = ("fully_sharded", "fsdp2")


def check_run(cfg: Any, num_ranks: int) -> None:
    """Check a whole fairseq run before any rank is started.

    Args:
        cfg: fairseq's configuration; `cfg.model` is None if it comes from a checkpoint.
        num_ranks: of the run, on all machines.
    Raises:
        OptionError: invalid combinations of options, and missing data.
    """
    on_gpu = torch.cuda.is_available() and not cfg.common.cpu
    if OmegaConf.is_missing(cfg, "model"):
        raise OptionError(
            "model", "(not given)", "give an architecture, or a --config-name that has one"
        )
    if cfg.model is not None:
        resolve_renamed(cfg.model, warn=True)
        resolve_hf_config(cfg.model)
        _check_training(cfg, num_ranks, on_gpu)
    else:
        check_evaluation(cfg, num_ranks)
    validate_run(cfg)


def validate_run(cfg: Any) -> None:
    """Check the data and the plugin's own options.

    Args:
        cfg: as `check_run`.
    Raises:
        OptionError: as `validate`, and for missing data.
    """
    _check_data(cfg)
    model = cfg.model
    if model is None:
        return
    # A hand-written yaml may leave fields to the architecture's defaults, which are known only in
    # `build_model`: it checks them then.
    complete = all(f.name in model for f in fields(MoEOptions))
    if complete:
        validate(model)
    _check_changes(cfg)
    if not complete:
        return
    criterion = getattr(cfg.criterion, "_name", None)
    if criterion not in (None, "moe_cross_entropy") and not hasattr(
        cfg.criterion, "moe_gate_loss_wt"
    ):
        logger.warning(
            "--criterion %s: gate losses are not added and routing is not logged; "
            "--criterion %s does both",
            criterion,
            _WITH_GATE_LOSSES.get(criterion, "moe_cross_entropy"),
        )
    weight = getattr(cfg.criterion, "moe_gate_loss_wt", None)
    if weight is not None:
        _warn_of_large_loss(model, weight)
        _warn_of_collapse(model, weight)


_WITH_GATE_LOSSES = {
    name: f"moe_{name}"
    for name in ("masked_lm", "label_smoothed_cross_entropy", "sentence_prediction")
}


def _check_changes(cfg: Any) -> None:
    """Check runs that change weights by a spawn, adaptation or conversion.

    Fields missing in a hand-written yaml have defaults that no architecture changes.
    """
    given: dict[str, Any] = {
        f.name: getattr(cfg.model, f.name, f.default) for f in fields(MoEOptions)
    }
    spawn, dense = given["moe_spawn_updates"], given["moe_init_from_dense"]
    if spawn is not None and cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError(
            "store_ema",
            True,
            "the averages would include weights from before the spawn: leave it out, "
            "or --moe-spawn-updates",
        )
    if dense is not None and cfg.checkpoint.finetune_from_model:
        raise OptionError(
            "moe_init_from_dense",
            dense,
            "--finetune-from-model already sets the initial weights: leave one of them out",
        )
    changes = {
        "moe_spawn_updates": spawn,
        "moe_init_from_dense": dense,
        "moe_adapt_record_interval": getattr(cfg.model, "moe_adapt_record_interval", None),
    }
    change = next((name for name, value in changes.items() if value), None)
    if change is not None:
        _check_copies_of_weights(cfg, f"--{change.replace('_', '-')}")
    if spawn is not None:
        if _optimizer(cfg) == "muon" and not parse_bool(
            "moe_spawn_trainable_masked", given["moe_spawn_trainable_masked"]
        ):
            raise OptionError(
                "optimizer",
                "muon",
                "changes every weight of a matrix, and --moe-spawn-trainable-masked false keeps "
                "some at 0: give adam or fused_adamw",
            )
        _warn_of_moments(cfg.optimizer, spawn)


def _check_copies_of_weights(cfg: Any, change: str) -> None:
    """Raise `OptionError` if the optimizer or a copy of the weights would miss `change`."""
    parallel = cfg.distributed_training
    if parallel.zero_sharding != "none":
        raise OptionError(
            "zero_sharding",
            parallel.zero_sharding,
            f"keeps optimizer state that {change} cannot edit: give --ddp-backend fully_sharded",
        )
    if parallel.ddp_backend == "slowmo":
        raise OptionError(
            "ddp_backend",
            f"slowmo with {change}",
            "keeps a copy of the weights, which would undo the change: give "
            "legacy_ddp or fully_sharded",
        )


# Above this, weights without moments take steps of more than twice the learning rate.
_MOST_BETA2 = 0.99


def largest_step(betas: Sequence[float], updates: int) -> float:
    """Adam's largest step, relative to the learning rate, for a constant gradient that starts after
    `updates` updates of zeros: the moments start then, but the bias corrections have ended."""

    def step(k: int) -> float:
        one, two = ((1 - beta**k) / (1 - beta ** (updates + k)) for beta in betas)
        return one / two**0.5 if two else 1.0

    beta1, beta2 = betas
    return max(map(step, range(1, 1 + int(5 / max(1 - beta1, 1 - beta2, 1e-3)))))


def _warn_of_moments(optimizer: Any, updates: int) -> None:
    betas = getattr(optimizer, "adam_betas", None)
    if isinstance(betas, str):
        betas = ast.literal_eval(betas)
    if betas and betas[1] > _MOST_BETA2:
        logger.warning(
            "--adam-betas %s with --moe-spawn-updates %s: after the spawn, the weights of the gate "
            "and new weights start without moments in the middle of the run: their first steps are "
            "up to %.1f times --lr; with (0.9, 0.98) %.1f times",
            tuple(betas),
            updates,
            largest_step(betas, updates),
            largest_step((0.9, 0.98), updates),
        )


# Losses with values of about 1 or more in a good run; published coefficients are 0.001 to 0.03.
_LARGE_LOSSES = ("balance", "switch", "diversity", "simplicity", "efficiency")


def _warn_of_large_loss(model: Any, weight: float) -> None:
    chosen = gate_class(model.moe_gate).aux_coefficients(model)
    large = next((loss for loss in _LARGE_LOSSES if chosen.get(loss, 0.0) * weight > 0.1), None)
    if large:
        logger.warning(
            "--moe-gate-loss-wt %s: the auxiliary loss %s is added with weight %g; 0.01 is usual",
            weight,
            large,
            chosen[large] * weight,
        )


_BALANCING_LOSSES = ("balance", "switch", "mi", "importance", "load")


def _warn_of_collapse(model: Any, weight: float) -> None:
    """Warn of dense-to-sparse routing that nothing balances (docs/options.md has the numbers)."""
    if model.moe_gate != "dense_to_sparse" or model.moe_bias_update_rate:
        return
    chosen = gate_class(model.moe_gate).aux_coefficients(model)
    if not any(chosen.get(loss, 0.0) * weight for loss in _BALANCING_LOSSES):
        logger.warning(
            "--moe-gate dense_to_sparse: nothing balances the load of experts (the weight of the "
            "balance loss is 0), and routing can collapse onto a few: give --moe-bias-update-rate "
            "0.01, or --moe-gate-loss-wt 0.01 with --moe-aux balance=1"
        )


# By task: the dictionary, next to which the data are.
_DICTIONARIES = {
    "language_modeling": "dict.txt",
    "masked_lm": "dict.txt",
    "translation": "dict.*.txt",
    "sentence_prediction": "input0/dict.txt",
}


def _check_data(cfg: Any) -> None:
    task = cfg.task
    if getattr(task, "_name", None) not in _DICTIONARIES:
        return
    remedy = "give a folder made by `evomoe prepare` or fairseq-preprocess"
    if task.data is None:
        raise OptionError("DATA", "is missing", f"{remedy}; with Hydra, task.data=FOLDER")
    folder = Path(str(task.data).split(os.pathsep)[0])
    if not folder.is_dir():
        raise OptionError("DATA", task.data, f"no such folder; {remedy}")
    dictionary = _DICTIONARIES[task._name]
    if not any(folder.glob(dictionary)):
        raise OptionError("DATA", task.data, f"has no {dictionary}; {remedy}")
    folder = (folder / dictionary).parent
    if cfg.model is not None and not list(folder.glob(f"{cfg.dataset.train_subset}*.idx")):
        raise OptionError(
            "DATA", task.data, f"has no {cfg.dataset.train_subset}.idx to train on; {remedy}"
        )


def _check_training(cfg: Any, num_ranks: int, on_gpu: bool) -> None:
    common, parallel = cfg.common, cfg.distributed_training
    if not on_gpu and common.amp:
        raise OptionError("amp", "without a GPU", "give --bf16, --fp16, or none of them")
    if common.fp16 and common.bf16:
        raise OptionError("fp16", "with --bf16", "give one of them")
    check_batch_size(cfg)
    _check_validation(cfg)
    check_fairseq(cfg, num_ranks, on_gpu)
    dtype = getattr(cfg.model, "moe_matmul_dtype", "same")
    for option in ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16", "amp"):
        if dtype != "same" and getattr(common, option):
            raise OptionError(
                "moe_matmul_dtype",
                f"{dtype} with --{option.replace('_', '-')}",
                "its weights are in fp32: leave one of them out",
            )
    if cfg.checkpoint.write_checkpoints_asynchronously and not importlib.util.find_spec("iopath"):
        raise OptionError(
            "write_checkpoints_asynchronously",
            "without iopath",
            "fairseq needs it: pip install iopath",
        )
    if parallel.ddp_backend in FULLY_SHARDED:
        _check_fully_sharded(cfg, on_gpu)
    elif parallel.ddp_backend == "slowmo" and not on_gpu:
        raise OptionError("ddp_backend", "slowmo without a GPU", "give legacy_ddp")
    if parallel.use_sharded_state and parallel.ddp_backend != "fully_sharded":
        raise OptionError(
            "use_sharded_state",
            f"with --ddp-backend {parallel.ddp_backend}",
            "needs --ddp-backend fully_sharded",
        )
    if getattr(cfg.model, "moe_expert_parallel_size", 1) > 1:
        _check_expert_parallel(cfg, num_ranks)


def check_batch_size(cfg: Any) -> None:
    """Raise `OptionError` if nothing limits a batch, of training or validation: to fairseq, 0 and
    less are no limit."""
    for of in [""] if cfg.dataset.disable_validation else ["", "_valid"]:
        given = [getattr(cfg.dataset, name + of) for name in ("batch_size", "max_tokens")]
        if not any(limit is not None and limit > 0 for limit in given):
            value = "(not given)" if given[0] is None else given[0]
            other = f"--max-tokens{of.replace('_', '-')}"
            remedy = f"give it, in samples, or {other}, in tokens: 1 or more"
            raise OptionError(f"batch_size{of}", value, remedy)


def _check_validation(cfg: Any) -> None:
    """Raise `OptionError` for options of validation that could have no effect, or no number."""
    steps = cfg.dataset.max_valid_steps
    if steps is not None and steps < 1:
        raise OptionError("max_valid_steps", steps, "give 1 or more, or --disable-validation")
    if not cfg.dataset.disable_validation:
        return
    plateau = getattr(cfg.lr_scheduler, "_name", None) == "reduce_lr_on_plateau"
    for option, value, given in (
        ("patience", cfg.checkpoint.patience, cfg.checkpoint.patience > 0),
        (
            "keep_best_checkpoints",
            cfg.checkpoint.keep_best_checkpoints,
            cfg.checkpoint.keep_best_checkpoints > 0,
        ),
        ("lr_scheduler", "reduce_lr_on_plateau", plateau),
    ):
        if given:
            raise OptionError(
                option,
                f"{value} with --disable-validation",
                "it follows what validation gives: leave one of them out",
            )


def _check_fully_sharded(cfg: Any, on_gpu: bool) -> None:
    """Of fairscale's FSDP (`fully_sharded`) and torch's (`fsdp2`)."""
    common, parallel = cfg.common, cfg.distributed_training
    combined = f"with --ddp-backend {parallel.ddp_backend}"
    if common.amp:
        raise OptionError("amp", combined, "give --bf16 or --fp16")
    if parallel.zero_sharding != "none":
        raise OptionError(
            "zero_sharding",
            f"{parallel.zero_sharding} {combined}",
            f"leave it out: {parallel.ddp_backend} includes it",
        )
    if cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError(
            "store_ema", combined, "it averages whole models: leave it out, or give legacy_ddp"
        )
    if _optimizer(cfg) in _NOT_SHARDED:
        raise OptionError(
            "optimizer",
            f"{_optimizer(cfg)} {combined}",
            "adam, fused_adamw, adamax, adadelta, nag and sgd are sharded: give one, "
            "or --ddp-backend legacy_ddp",
        )
    if parallel.ddp_backend == "fsdp2":
        _check_fsdp2(cfg)
    else:
        _check_fairscale(cfg, on_gpu)


def _check_fsdp2(cfg: Any) -> None:
    common, parallel = cfg.common, cfg.distributed_training
    combined = "with --ddp-backend fsdp2"
    for dtype in ("fp16", "bf16"):
        option = f"memory_efficient_{dtype}"
        if getattr(common, option):
            raise OptionError(option, combined, f"it keeps weights in fp32: give --{dtype}")
    if parallel.fp32_reduce_scatter and not (common.fp16 or common.bf16):
        raise OptionError("fp32_reduce_scatter", "without --bf16 or --fp16", "leave it out")
    if parallel.cpu_offload:
        raise OptionError("cpu_offload", combined, "give fully_sharded")
    if parallel.not_fsdp_flatten_parameters:
        raise OptionError(
            "not_fsdp_flatten_parameters", combined, "leave it out: it flattens no parameters"
        )
    if parallel.heartbeat_timeout > 0:
        raise OptionError("heartbeat_timeout", combined, "leave it out, or give fully_sharded")
    if _optimizer(cfg) == "composite":
        raise OptionError(
            "optimizer", f"composite {combined}", "checkpoints support one for all parameters"
        )


def _check_fairscale(cfg: Any, on_gpu: bool) -> None:
    common, parallel = cfg.common, cfg.distributed_training
    combined = "with --ddp-backend fully_sharded"
    if not importlib.util.find_spec("fairscale"):
        raise OptionError("ddp_backend", "fully_sharded", "needs fairscale: pip install fairscale")
    if common.cpu and torch.cuda.is_available():
        raise OptionError("cpu", combined, "hide the GPUs instead, with CUDA_VISIBLE_DEVICES=''")
    if common.memory_efficient_bf16:
        raise OptionError(
            "memory_efficient_bf16", combined, "it keeps weights in fp32: give --bf16"
        )
    if parallel.use_sharded_state and getattr(cfg.model, "moe_train_only", None) is not None:
        raise OptionError(
            "use_sharded_state",
            "with --moe-train-only",
            "shards do not record which parameters are frozen: leave it out",
        )
    if parallel.cpu_offload and not on_gpu:
        raise OptionError(
            "cpu_offload", "without a GPU", "leave it out: everything is on the CPU anyway"
        )
    if parallel.fp32_reduce_scatter and (
        common.memory_efficient_fp16 or not (common.fp16 or common.bf16)
    ):
        raise OptionError("fp32_reduce_scatter", "without plain --fp16 or --bf16", "leave it out")
    if parallel.not_fsdp_flatten_parameters and not (
        parallel.use_sharded_state
        or cfg.checkpoint.no_save_optimizer_state
        or cfg.checkpoint.no_save
    ):
        raise OptionError(
            "not_fsdp_flatten_parameters",
            "with one file for all ranks",
            "add --use-sharded-state, or --no-save-optimizer-state",
        )


def _optimizer(cfg: Any) -> str | None:
    return getattr(cfg.optimizer, "_name", None)


def _check_expert_parallel(cfg: Any, num_ranks: int) -> None:
    parallel, size = cfg.distributed_training, cfg.model.moe_expert_parallel_size
    combined = "with --moe-expert-parallel-size"
    if cfg.common.amp:
        raise OptionError(
            "amp",
            combined,
            "overflow is checked only in each rank's own experts: give --fp16 or --bf16",
        )
    check_ranks_of_experts(size, num_ranks)
    if parallel.zero_sharding != "none":
        raise OptionError(
            "zero_sharding",
            f"{parallel.zero_sharding} {combined}",
            "give --ddp-backend fully_sharded",
        )
    if parallel.ddp_backend not in (*FULLY_SHARDED, "legacy_ddp"):
        raise OptionError(
            "ddp_backend",
            f"{parallel.ddp_backend} {combined}",
            "give fsdp2, fully_sharded or legacy_ddp",
        )
    if parallel.use_sharded_state:
        raise OptionError(
            "use_sharded_state",
            combined,
            "leave it out: --moe-ep-checkpoint sharded writes one file per rank",
        )
    if cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError(
            "store_ema", combined, "it does not include experts on other ranks: leave it out"
        )
    remedy = "give adam, fused_adamw, adamax, adadelta, nag or sgd"
    if _optimizer(cfg) in _OF_WHOLE_PARAMETERS:
        raise OptionError(
            "optimizer",
            f"{_optimizer(cfg)} {combined}",
            "its steps depend on means over whole parameters, of which each rank "
            f"holds only a part: {remedy}",
        )
    if _optimizer(cfg) == "composite":
        raise OptionError(
            "optimizer",
            f"composite {combined}",
            f"checkpoints support one optimizer for all parameters: {remedy}",
        )
