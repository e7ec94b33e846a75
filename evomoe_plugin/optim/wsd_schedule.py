"""`--lr-scheduler wsd`: warm-up, a constant rate, and a decay at the end."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

import math
from dataclasses import dataclass
from typing import Any, List, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.optim.fairseq_optimizer import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag
from evomoe_plugin.config.values import check_choice, check_number

# Share of the decay that is over -> what is left of the rate above --min-lr.
DECAYS = {
    "linear": lambda done: 1 - done,
    "sqrt": lambda done: 1 - math.sqrt(done),
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass
class WSDScheduleConfig(FairseqDataclass):
    """Options of the schedule; those of the warm-up are named as in fairseq's other schedules."""

    warmup_updates: int = flag(0, "warm up the learning rate linearly in the first N updates")
    warmup_init_lr: float = flag(0.0, "learning rate at the start of the warm-up")
    wsd_decay_updates: Optional[int] = flag(
        None, "length of the decay in updates (default: --wsd-decay-share)"
    )
    wsd_decay_share: float = flag(0.2, "length of the decay as a share of --max-update")
    wsd_decay: str = flag("sqrt", "form of the decay: linear, sqrt (1 - sqrt) or cosine")
    min_lr: float = flag(0.0, "learning rate at --max-update")
    lr: List[float] = II("optimization.lr")
    max_update: int = II("optimization.max_update")


@register_lr_scheduler("wsd", dataclass=WSDScheduleConfig)
class WSDSchedule(FairseqLRScheduler):
    """Warm-up, stable, decay: the rate is constant until the last updates (arXiv 2404.06395).

    The run can be prolonged from any checkpoint before the decay. `sqrt` is the form that
    arXiv 2405.18392 found best. The schedule has no state: it is a function of the update.

    Args:
        cfg: the fields of `WSDScheduleConfig`.
        optimizer: whose rate is set.
    Raises:
        OptionError: an option is invalid, or warm-up and decay do not fit into the run.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer):
        super().__init__(cfg, optimizer)
        self.peak, self.decay_updates = _checked(cfg)
        self.optimizer.set_lr(self.rate(0))

    def rate(self, num_updates: int) -> float:
        """The rate of the update after `num_updates` completed ones."""
        cfg = self.cfg
        if num_updates < cfg.warmup_updates:
            done = num_updates / cfg.warmup_updates
            return cfg.warmup_init_lr + done * (self.peak - cfg.warmup_init_lr)
        left = cfg.max_update - num_updates
        if left >= self.decay_updates:
            return self.peak
        kept = DECAYS[cfg.wsd_decay](1 - max(left, 0) / self.decay_updates)
        return cfg.min_lr + kept * (self.peak - cfg.min_lr)

    def step_update(self, num_updates: int) -> float:
        """Set the rate after `num_updates` completed updates; called by fairseq."""
        self.optimizer.set_lr(self.rate(num_updates))
        return self.optimizer.get_lr()


def _checked(cfg: Any) -> tuple[float, int]:
    """Peak, and length of the decay in updates."""
    if len(cfg.lr) != 1:
        raise OptionError("lr", list(cfg.lr), "--lr-scheduler wsd takes one learning rate")
    if not cfg.max_update:
        raise OptionError(
            "max_update", cfg.max_update, "--lr-scheduler wsd decays before it: give it"
        )
    check_choice(cfg, "wsd_decay", tuple(DECAYS))
    check_number(cfg, "warmup_updates", "[0, inf)", "give a number of updates, 0 or more")
    check_number(cfg, "wsd_decay_updates", "[0, inf)", "give a number of updates, 0 or more")
    check_number(cfg, "wsd_decay_share", "[0, 1]", "it is a share of the run: give 0 to 1")
    default = WSDScheduleConfig.wsd_decay_share
    if cfg.wsd_decay_updates is not None and cfg.wsd_decay_share != default:
        raise OptionError(
            "wsd_decay_share",
            cfg.wsd_decay_share,
            "--wsd-decay-updates already sets the length: leave one of them out",
        )
    peak = cfg.lr[0]
    for option in ("min_lr", "warmup_init_lr"):
        check_number(cfg, option, f"[0, {peak}]", f"give 0 or more, and at most --lr ({peak})")
    length = cfg.wsd_decay_updates
    if length is None:
        length = round(cfg.wsd_decay_share * cfg.max_update)
    if cfg.warmup_updates + length > cfg.max_update:
        raise OptionError(
            "max_update",
            cfg.max_update,
            f"is less than --warmup-updates {cfg.warmup_updates} and the decay of {length} updates "
            "(--wsd-decay-updates) together",
        )
    return peak, length
