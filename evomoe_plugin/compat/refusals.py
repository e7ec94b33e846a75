"""Combinations of options that cannot work, refused before the first step.

Each check takes the run's configuration and raises `OptionError`, or returns.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from evomoe_plugin.compat.launcher import process_count
from evomoe_plugin.options import OptionError
from evomoe_plugin.run_validation import validate_run

# Optimizers whose steps follow from means or norms over whole parameters; and those that fairseq
# does not shard, for these or other reasons.
_OF_WHOLE_PARAMETERS = ("adafactor", "lamb")
_NOT_SHARDED = (*_OF_WHOLE_PARAMETERS, "adagrad")


def check_run(cfg: Any) -> None:
    """Refuse what cannot work; the plugin's own options are checked too."""
    on_gpu = torch.cuda.is_available() and not cfg.common.cpu
    if cfg.model is not None:
        _check_training(cfg, on_gpu)
    validate_run(cfg)


def _check_training(cfg: Any, on_gpu: bool) -> None:
    common, parallel = cfg.common, cfg.distributed_training
    if not on_gpu and common.amp:
        raise OptionError("amp", "without a GPU", "give --bf16, --fp16, or none of them")
    if common.fp16 and common.bf16:
        raise OptionError("fp16", "with --bf16", "give one of them")
    _check_products(cfg)
    if cfg.checkpoint.write_checkpoints_asynchronously and not importlib.util.find_spec("iopath"):
        raise OptionError("write_checkpoints_asynchronously", "without iopath",
                          "fairseq asks for it: pip install iopath")
    if parallel.ddp_backend == "fully_sharded":
        _check_fully_sharded(cfg, on_gpu)
    elif parallel.use_sharded_state:
        raise OptionError("use_sharded_state", f"with --ddp-backend {parallel.ddp_backend}",
                          "needs --ddp-backend fully_sharded")
    elif parallel.ddp_backend == "slowmo" and not on_gpu:
        raise OptionError("ddp_backend", "slowmo without a GPU", "give legacy_ddp")
    if getattr(cfg.model, "moe_expert_parallel_size", 1) > 1:
        _check_expert_parallel(cfg)


def _check_products(cfg: Any) -> None:
    dtype = getattr(cfg.model, "moe_products_dtype", "same")
    for option in ("fp16", "memory_efficient_fp16", "bf16", "memory_efficient_bf16", "amp"):
        if dtype != "same" and getattr(cfg.common, option):
            raise OptionError("moe_products_dtype", f"{dtype} with --{option.replace('_', '-')}",
                              "its weights are in fp32: leave one of them out")


def _check_fully_sharded(cfg: Any, on_gpu: bool) -> None:
    common, parallel = cfg.common, cfg.distributed_training
    combined = "with --ddp-backend fully_sharded"
    if not importlib.util.find_spec("fairscale"):
        raise OptionError("ddp_backend", "fully_sharded", "needs fairscale: pip install fairscale")
    if common.cpu and torch.cuda.is_available():
        raise OptionError("cpu", combined,
                          "hide the GPUs instead, with CUDA_VISIBLE_DEVICES=''")
    if common.bf16 or common.memory_efficient_bf16:
        raise OptionError("memory_efficient_bf16" if common.memory_efficient_bf16 else "bf16",
                          combined, "give --fp16, --moe-products-dtype bf16, or --ddp-backend "
                                    "legacy_ddp")
    if common.amp:
        raise OptionError("amp", combined, "give --fp16")
    if parallel.use_sharded_state and getattr(cfg.model, "moe_train_only", None) is not None:
        raise OptionError("use_sharded_state", "with --moe-train-only",
                          "the shards do not tell what is frozen: leave it out")
    if parallel.zero_sharding != "none":
        raise OptionError("zero_sharding", f"{parallel.zero_sharding} {combined}",
                          "leave it out, fully_sharded does that already")
    if parallel.cpu_offload and not on_gpu:
        raise OptionError("cpu_offload", "without a GPU",
                          "leave it out, everything is on the CPU already")
    if parallel.fp32_reduce_scatter and (not common.fp16 or common.memory_efficient_fp16):
        raise OptionError("fp32_reduce_scatter", "without plain --fp16", "leave it out")
    if parallel.not_fsdp_flatten_parameters and not (
        parallel.use_sharded_state or cfg.checkpoint.no_save_optimizer_state
        or cfg.checkpoint.no_save
    ):
        raise OptionError("not_fsdp_flatten_parameters", "with one file for all ranks",
                          "add --use-sharded-state, or --no-save-optimizer-state")
    if cfg.optimization.use_bmuf:
        raise OptionError("use_bmuf", combined, "leave it out")
    if _optimizer(cfg) in _NOT_SHARDED:
        raise OptionError("optimizer", f"{_optimizer(cfg)} {combined}",
                          "adam, fused_adamw, adamax, adadelta, nag and sgd are sharded: give one, "
                          "or --ddp-backend legacy_ddp")


def _optimizer(cfg: Any) -> str | None:
    return getattr(cfg.optimizer, "_name", None)


def _check_expert_parallel(cfg: Any) -> None:
    parallel, size = cfg.distributed_training, cfg.model.moe_expert_parallel_size
    combined = "with --moe-expert-parallel-size"
    if cfg.common.amp:
        raise OptionError("amp", combined, "it looks for overflow in each process's own experts: "
                                           "give --fp16 or --bf16")
    count = process_count(parallel)
    if count % size:
        raise OptionError("moe_expert_parallel_size", size,
                          f"does not divide the {count} processes of --distributed-world-size")
    if parallel.zero_sharding != "none":
        raise OptionError("zero_sharding", f"{parallel.zero_sharding} {combined}",
                          "give --ddp-backend fully_sharded")
    if parallel.ddp_backend not in ("fully_sharded", "legacy_ddp"):
        raise OptionError("ddp_backend", f"{parallel.ddp_backend} {combined}",
                          "give fully_sharded or legacy_ddp")
    if parallel.use_sharded_state:
        raise OptionError("use_sharded_state", combined,
                          "leave it out: --moe-ep-checkpoint sharded writes a file a process")
    if cfg.ema is not None and cfg.ema.store_ema:
        raise OptionError("store_ema", combined,
                          "it knows nothing of experts on other processes: leave it out")
    if cfg.optimization.use_bmuf:
        raise OptionError("use_bmuf", combined, "leave it out")
    remedy = "give adam, fused_adamw, adamax, adadelta, nag or sgd"
    if _optimizer(cfg) in _OF_WHOLE_PARAMETERS:
        raise OptionError("optimizer", f"{_optimizer(cfg)} {combined}",
                          "its steps follow from means over whole parameters, of which each "
                          f"process holds a part: {remedy}")
    if _optimizer(cfg) == "composite":
        raise OptionError("optimizer", f"composite {combined}",
                          f"checkpoints know one optimizer for all parameters: {remedy}")
