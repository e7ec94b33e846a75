"""One of two ranks is slow, stopped, without memory, with NaN, with a full disk, or with other code
or options: the others end in one line within the time, or go on as if nothing had happened."""

from __future__ import annotations

import datetime
import errno
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from tests.torture import disks, faults, forked, kills, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "ranks", "Ranks", 120, 2

_TWO = ("--distributed-world-size", "2")
LAYOUTS = {
    "fully sharded": tiny.LAYOUTS["fully sharded"],
    "sharded experts": tiny.LAYOUTS["sharded experts"],
    "legacy_ddp": (*_TWO, "--ddp-backend", "legacy_ddp"),
    "pytorch_ddp": (*_TWO, "--ddp-backend", "pytorch_ddp", "--find-unused-parameters"),
}
TIMEOUT_SECONDS = 20
"""Of an exchange between ranks; torch's own are 10 to 30 minutes."""
_LIMIT_SECONDS = 600

# Each gets (dice, the rank, the update) and changes what the rank will do.
Break = Callable[[random.Random, int, int, Path], None]


def _in_step(rank: int, update: int, act: Callable[[], Any], lasting: bool = False) -> None:
    from fairseq.tasks import FairseqTask

    step = FairseqTask.train_step

    def train_step(task: Any, *args: Any, update_num: int = 0, **kwargs: Any) -> Any:
        due = update_num >= update if lasting else update_num == update
        if due and faults.rank() == rank:
            act()
        return step(task, *args, update_num=update_num, **kwargs)

    FairseqTask.train_step = train_step


def _slow(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    _in_step(rank, update, lambda: time.sleep(0.3), lasting=True)


def _stopped(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    _in_step(rank, update, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _raise(error: BaseException) -> None:
    raise error


def _out_of_memory(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    error = dice.choice(
        [
            RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            ),
            MemoryError(),
        ]
    )
    _in_step(rank, update, lambda: _raise(error))


def _out_of_memory_in_validation(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    from fairseq.tasks import FairseqTask

    step = FairseqTask.valid_step

    def valid_step(*args: Any, **kwargs: Any) -> Any:
        if faults.rank() == rank:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(*args, **kwargs)

    FairseqTask.valid_step = valid_step


def _nan(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    """In a gradient, once, as a broken chip has it; or wherever experts compute, each time."""
    from evomoe_plugin.experts.ffn import ExpertFFN
    from evomoe_plugin.trainer.moe_trainer import MoETrainer

    forward, step = ExpertFFN.forward, MoETrainer._reduce_and_clip_grads
    struck = [dice.random() < 0.5, False]

    def broken(experts: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(experts, *args, **kwargs)
        return output * float("nan") if struck[1] else output

    def reduce(trainer: Any, size: Any) -> Any:
        if trainer.get_num_updates() == update and faults.rank() == rank:
            own = [p for p in trainer.model.parameters() if p.grad is not None]
            dice.choice(own).grad.view(-1)[0] = float("nan")
            struck[1] = struck[0]
        return step(trainer, size)

    ExpertFFN.forward = broken
    MoETrainer._reduce_and_clip_grads = reduce


def _full_disk(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    fault = faults.Error(1 + dice.randrange(30), rank, errno.ENOSPC, ("write", "open", "mkdir"))
    faults.watch_disk(folder, fault, faults.Counters())


def _killed(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    _in_step(rank, update, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _before_main(rank: int, change: Callable[[Any], None]) -> None:
    """Change the options, or the code, of a rank as it begins."""
    from evomoe_plugin.launch import call_main

    check = call_main.check_same_everywhere

    def changed(cfg: Any) -> None:
        if faults.rank() == rank:
            change(cfg)
        check(cfg)

    call_main.check_same_everywhere = changed


def _other_code(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    from evomoe_plugin.launch import same_everywhere

    other = dict(same_everywhere._code())
    other[dice.choice(sorted(other))] = "0.0.1"
    _before_main(rank, lambda cfg: setattr(same_everywhere, "_code", lambda: other))


def _other_option(dice: random.Random, rank: int, update: int, folder: Path) -> None:
    group, name, value = dice.choice(
        [
            ("optimization", "lr", [0.1]),
            ("optimization", "max_update", 5),
            ("optimization", "update_freq", [2]),
            ("optimization", "clip_norm", 0.5),
            ("dataset", "batch_size", 2),
            ("common", "seed", 8),
            ("common", "fp16", True),
            ("model", "decoder_embed_dim", 64),
            ("model", "moe_expert_count", "8"),
            ("model", "moe_gate", "top_k"),
            ("checkpoint", "save_interval_updates", 3),
            ("criterion", "moe_gate_loss_wt", 0.5),
            ("task", "tokens_per_sample", 16),
        ]
    )
    _before_main(rank, lambda cfg: setattr(cfg[group], name, value))


# What the line that ends the run says; empty: it is not to end. With a full disk it may go on,
# where nothing is lost.
BREAKS: dict[str, tuple[Break, str]] = {
    "slow": (_slow, ""),
    "stopped": (_stopped, "has waited for another rank until the time was up"),
    "out of memory": (_out_of_memory, "rank {rank} ran out of memory on a batch"),
    "out of memory in validation": (
        _out_of_memory_in_validation,
        "rank {rank} ran out of memory in validation",
    ),
    "NaN": (_nan, "Nan/Inf, but not when the same|rank {rank}: .*(NaN/Inf; stop|first in)"),
    "full disk": (_full_disk, "No space left on device"),
    "killed": (_killed, "rank {rank} was ended by SIGKILL"),
    "other code": (_other_code, "rank 1 has other code than rank 0"),
    "other option": (_other_option, " on rank 1: it is .* on rank 0"),
}


def smoke() -> Iterable[int]:
    """Out of memory, fully sharded."""
    return (len(LAYOUTS) * list(BREAKS).index("out of memory"),)


def prepare(work: Path) -> None:
    tiny.data(work)


def case(seed: int, work: Path) -> Outcome:
    dice = random.Random(seed)
    layout = list(LAYOUTS)[seed % len(LAYOUTS)]
    name = list(BREAKS)[seed // len(LAYOUTS) % len(BREAKS)]
    change, said = BREAKS[name]
    rank, update = dice.randrange(2), dice.randrange(1, 5)
    folder = folder_of(NAME, seed, work) / "run"
    validating = [] if "validation" in name else ["--disable-validation"]
    options = [*LAYOUTS[layout], "--max-update", "6", "--save-interval-updates", "1"]
    arguments = tiny.train_arguments(tiny.data(work), folder, *options, *validating)

    def run() -> None:
        limit = datetime.timedelta(seconds=TIMEOUT_SECONDS)
        torch.distributed.distributed_c10d._get_default_timeout = lambda _backend: limit
        change(dice, rank, update, folder)
        forked.command("train", arguments)

    ended = forked.call(run, timeout=_LIMIT_SECONDS)
    label = f"{name}, {layout}: {'went on' if ended.status == 0 else 'ended in one line'}"
    fault = disks.verdict(ended)
    if not fault and ended.status == 0:
        fault = "" if not said or change is _full_disk else "it went on"
    elif not fault and not (said and re.search(said.format(rank=rank), ended.error)):
        fault = f"it ended with {ended.status}: {ended.error}"
    if not fault and ended.status != 0 and folder.exists():
        fault = kills.unreadable(folder)
    return Outcome(label, fault)
