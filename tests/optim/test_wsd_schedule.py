"""`--lr-scheduler wsd`: the rate of each update."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from fairseq import optim, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.optim.lr_scheduler import build_lr_scheduler

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.optim import WSDSchedule


def made(*given: str) -> WSDSchedule:
    """The schedule that fairseq's command line builds."""
    parser = options.get_training_parser()
    command = [
        "data",
        "--arch",
        "transformer_lm",
        "--task",
        "language_modeling",
        "--optimizer",
        "sgd",
        "--lr-scheduler",
        "wsd",
        "--lr",
        "1.0",
    ]
    command += ["--max-update", "100", "--warmup-updates", "10", *given]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, command))
    weights = [torch.nn.Parameter(torch.zeros(1))]
    return build_lr_scheduler(cfg.lr_scheduler, optim.build_optimizer(cfg.optimizer, weights))


@pytest.mark.parametrize(
    ("form", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5)]
)
def test_the_rate_rises_stays_and_falls(form, middle):
    schedule = made("--wsd-decay", form, "--min-lr", "0.2", "--warmup-init-lr", "0.1")
    rates = [schedule.step_update(n) for n in range(101)]
    assert schedule.optimizer.get_lr() == rates[100] == pytest.approx(0.2)
    assert rates[0] == 0.1 and rates[5] == pytest.approx(0.55)
    assert rates[10:81] == [1.0] * 71
    assert rates[90] == pytest.approx(0.2 + 0.8 * middle)
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))


def test_the_first_update_has_the_rate_of_update_0():
    assert made().optimizer.get_lr() == 0.0
    assert made("--warmup-updates", "0").optimizer.get_lr() == 1.0


def test_a_longer_run_has_the_same_rates_until_the_decay():
    short, long = made("--wsd-decay-updates", "30"), made("--max-update", "500")
    assert [short.rate(n) for n in range(71)] == [long.rate(n) for n in range(71)]
    assert short.rate(71) < long.rate(71) == 1.0


def test_a_share_of_0_never_decays():
    schedule = made("--wsd-decay-share", "0")
    assert schedule.rate(99) == schedule.rate(100) == 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--max-update", "0"), "--max-update 0: .* give it"),
        (("--max-update", "25", "--wsd-decay-updates", "16"), "the decay of 16 updates"),
        (("--wsd-decay-updates", "5", "--wsd-decay-share", "0.1"), "leave one of them out"),
        (("--wsd-decay", "square"), "--wsd-decay square: one of: linear, sqrt, cosine"),
        (("--wsd-decay-share", "1.5"), "it is a share of the run"),
        (("--min-lr", "2"), r"--min-lr 2.0: give 0 or more, and at most --lr \(1.0\)"),
        (("--warmup-updates", "-1"), "--warmup-updates -1: give"),
        (("--lr", "1.0,0.5"), "takes one learning rate"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    with pytest.raises(OptionError, match=message):
        made(*given)
