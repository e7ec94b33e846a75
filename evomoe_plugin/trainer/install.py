"""Have fairseq's commands train with `MoETrainer`, and save with `checkpoint.save`."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.distributed import fsdp_enable_wrap
from fairseq.trainer import Trainer

from evomoe_plugin.checkpoint.save import save_checkpoint
from evomoe_plugin.trainer import early_stopping, later_log
from evomoe_plugin.trainer.data_wait import TimedGroupedIterator
from evomoe_plugin.trainer.moe_trainer import MoETrainer


def install() -> None:
    """Replace what fairseq's commands look up by name, in the modules that are imported already."""
    for name in ("fairseq_cli.train", "__main__", "__mp_main__"):
        _use_trainer(vars(sys.modules.get(name, sys)))
    checkpoint_utils.save_checkpoint = save_checkpoint
    iterators.GroupedIterator = TimedGroupedIterator
    later_log.install()


def install_in(main: Callable[..., Any], cfg: Any) -> None:
    """Have fairseq's `main` train with `MoETrainer`, in the process that runs it.

    Args:
        cfg: fairseq's configuration of the run.
    """
    names = main.__globals__
    _use_trainer(names)
    if "fsdp_enable_wrap" in names:
        names["fsdp_enable_wrap"] = functools.partial(_enable_wrap, bool(cfg.common.bf16))


@contextlib.contextmanager
def _enable_wrap(in_bf16: bool, options: Any) -> Iterator[None]:
    """In place of fairseq's `fsdp_enable_wrap`, which knows fp16 alone: fairscale's FSDP then
    gathers, computes and scatters in bf16, and keeps fp32 masters."""
    with fsdp_enable_wrap(options):
        if in_bf16:
            from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap

            ConfigAutoWrap.kwargs |= {"compute_dtype": torch.bfloat16, "mixed_precision": True}
        yield


def _use_trainer(names: dict[str, Any]) -> None:
    if names.get("Trainer") is Trainer:
        names["Trainer"] = MoETrainer
        names["should_stop_early"] = early_stopping.STATE.should_stop
