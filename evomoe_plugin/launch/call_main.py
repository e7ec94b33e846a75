"""Start a run, in place of fairseq's `distributed.utils.call_main`, which its commands call.

Upstream does not do three things: end bad options in one line before anything is started, start
ranks on CPUs over gloo, and train fully sharded with one rank.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fairscale.internal.parallel import get_process_group_cached
from fairseq.distributed import utils as distributed_utils
from omegaconf import open_dict

from evomoe_plugin.checkpoint import async_writer
from evomoe_plugin.config.errors import (
    OptionError,
    install_excepthook,
    one_line_errors,
)
from evomoe_plugin.config.evaluation_checks import model_overrides
from evomoe_plugin.config.run_checks import FULLY_SHARDED, check_batch_size, check_run
from evomoe_plugin.config.terminal import show_any_text
from evomoe_plugin.evaluation import eval_lm
from evomoe_plugin.launch.environment import is_slurm_task, process_count, started_by_torchrun
from evomoe_plugin.launch.explained import explained
from evomoe_plugin.launch.ranks import run_ranks
from evomoe_plugin.launch.same_everywhere import check_same_everywhere
from evomoe_plugin.patches.patch import wrap
from evomoe_plugin.trainer.install import install_in

logger = logging.getLogger(__name__)


def run_main(main: Callable, cfg: Any, **kwargs: Any) -> None:
    """Run `main` with our trainer and evaluation, in a rank's process; return when all files are
    written.

    Raises:
        RunFailed: another rank has ended, or fairseq refuses the options.
    """
    show_any_text()
    install_in(main, cfg)
    eval_lm.install_in(main)
    with async_writer.finished_on_exit():
        try:
            if dist.is_initialized() and dist.get_world_size() > 1:
                check_same_everywhere(cfg)
            main(cfg, **kwargs)
        except Exception as error:
            reason = explained(error)
            if reason is not None:
                raise reason from error
            raise


def _call_main(upstream: Callable, cfg: Any, main: Callable, **kwargs: Any) -> None:
    """Run `main(cfg, **kwargs)` on as many ranks as `cfg.distributed_training` asks for."""
    with one_line_errors():
        count = process_count(cfg.distributed_training)
        check_run(cfg, count)
        if cfg.model is None:
            _check_command(cfg, _command_of(main))
        main = functools.partial(run_main, main)
        if torch.cuda.is_available() and not cfg.common.cpu:
            _launch_on_gpus(upstream, cfg, main, kwargs)
        else:
            _launch_on_cpus(cfg, main, kwargs)


# Their ranks generate texts of different lengths, and would wait for each other's rows in vain.
_NEVER_SHARD = ("fairseq_cli.generate", "fairseq_cli.interactive")


def _command_of(main: Callable) -> str:
    """The module of the command whose `main` this is, also where Python runs it as __main__."""
    spec = main.__globals__.get("__spec__")
    return main.__module__ if spec is None else spec.name


def _check_command(cfg: Any, command: str) -> None:
    """Check options of an evaluating command, and put `--moe-expert-parallel-size` where fairseq
    reads options of the checkpoint's model."""
    if command == "fairseq_cli.validate":
        check_batch_size(cfg)
    overrides = model_overrides(cfg)
    size = overrides.get("moe_expert_parallel_size", 1)
    if size > 1 and command in _NEVER_SHARD:
        raise OptionError(
            "moe_expert_parallel_size",
            size,
            "this command does not shard experts: evomoe generate does",
        )
    cfg.common_eval.model_overrides = repr(overrides)


def _launch_on_gpus(upstream: Callable, cfg: Any, main: Callable, kwargs: dict) -> None:
    options = cfg.distributed_training
    if options.distributed_world_size == 1 and options.ddp_backend in FULLY_SHARDED:
        _in_group_of_one("nccl", main, cfg, kwargs)
    elif (
        options.distributed_init_method is None
        and not started_by_torchrun()
        and (
            options.distributed_world_size > torch.cuda.device_count()
            and "SLURM_JOB_ID" not in os.environ
        )
    ):
        raise OptionError(
            "distributed_world_size",
            options.distributed_world_size,
            f"this machine has {torch.cuda.device_count()} GPUs; give at most that "
            "many, or --distributed-init-method for several machines",
        )
    else:
        upstream(cfg, main, **kwargs)


def _launch_on_cpus(cfg: Any, main: Callable, kwargs: dict) -> None:
    options = cfg.distributed_training
    options.distributed_backend = "gloo"
    if options.distributed_init_method is None and started_by_torchrun():
        options.distributed_init_method = "env://"
        options.distributed_world_size = int(os.environ["WORLD_SIZE"])
        options.distributed_rank = int(os.environ["RANK"])
        options.distributed_no_spawn = True
    elif is_slurm_task(options):
        distributed_utils._infer_slurm_init(options, None)

    if options.distributed_world_size == 1:
        if options.ddp_backend in FULLY_SHARDED:
            _in_group_of_one("gloo", main, cfg, kwargs)
        else:
            main(cfg, **kwargs)
    elif options.distributed_no_spawn:
        distributed_utils.distributed_main(options.device_id, main, cfg, kwargs)
    else:
        _spawn_on_cpus(cfg, main, kwargs)


def _spawn_on_cpus(cfg: Any, main: Callable, kwargs: dict) -> None:
    options = cfg.distributed_training
    count = options.distributed_world_size - options.distributed_rank
    # The default of --distributed-num-procs is 1 where there is no GPU: it says nothing.
    if options.distributed_num_procs is not None and options.distributed_num_procs > 1:
        count = min(count, options.distributed_num_procs)
    if options.distributed_init_method is None:
        port = options.distributed_port
        if port <= 0:
            with socket.create_server(("localhost", 0)) as probe:
                port = probe.getsockname()[1]
        options.distributed_init_method = f"tcp://localhost:{port}"
    kwargs["start_rank"] = options.distributed_rank
    with open_dict(cfg):
        options.distributed_num_procs = count
        options.distributed_rank = None  # upstream's sign that each rank adds its own
    run_ranks(main, cfg, kwargs, count, _threads_per_rank(count))


def _threads_per_rank(count: int) -> int | None:
    if "OMP_NUM_THREADS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // count)
    logger.info(
        "%d ranks share %s cores: OMP_NUM_THREADS=%d for each, unless you set it",
        count,
        cores,
        threads,
    )
    return threads


def _in_group_of_one(backend: str, main: Callable, cfg: Any, kwargs: dict) -> None:
    """FSDP needs a process group even for one rank: make one, without a port."""
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        main(cfg, **kwargs)
    finally:
        # fairseq and fairscale cache groups; a Hydra sweep runs several trainings in one process.
        vars(distributed_utils.get_global_group).pop("_global_group", None)
        vars(get_process_group_cached).pop("_global_group_cache", None)
        dist.destroy_process_group()


@functools.cache
def install() -> None:
    """Replace `call_main` for all of fairseq's commands; those that do not call it have one-line
    errors too."""
    install_excepthook()
    wrap(distributed_utils, "call_main", _call_main)
