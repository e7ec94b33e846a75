"""Measurements in a fork: time of all contenders of a case in turn, or memory of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from speed import clock
from speed.bare import Floor, Limit
from speed.cases import Case
from speed.contenders import (
    AllMasked,
    Contender,
    Dense,
    GroupedMM,
    Loop,
    OneHot,
    Ours,
    OursGated,
    OursGroupedMM,
    Refused,
    Routing,
)
from speed.forks import forked, reason
from speed.inputs import Inputs
from speed.peers import (
    Fairscale,
    MixtralEager,
    MixtralGrouped,
    OlmoeEager,
    OlmoeGrouped,
)

CONTENDERS: dict[str, type[Contender]] = {
    kind.__name__: kind
    for kind in (
        Ours,
        OursGated,
        OursGroupedMM,
        Loop,
        GroupedMM,
        MixtralGrouped,
        OlmoeGrouped,
        Dense,
        AllMasked,
        OneHot,
        Fairscale,
        MixtralEager,
        OlmoeEager,
        Routing,
    )
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """How a case is measured."""

    dtype: str = "fp32"
    threads: int = 1
    device: str = "cpu"
    rounds: int = 7


def in_own_process(
    case: Case, setting: Setting, names: Sequence[str], what: str = "times"
) -> dict[str, Any]:
    """`times`, or `memory` of one, measured in a fork; {"failed": reason} if it died."""

    def work() -> dict[str, Any]:
        start(setting)
        inputs = Inputs(case, DTYPES[setting.dtype], setting.device)
        if what == "times":
            return times(inputs, setting, names)
        try:
            return memory(inputs, *names)
        except Exception as error:  # other packages raise any type; reported
            return {"failed": why(error)}

    return forked(work)


def start(setting: Setting) -> None:
    """Settings of a measuring process."""
    torch.set_num_threads(setting.threads)
    if setting.device == "cuda":  # no TF32
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)


def times(inputs: Inputs, setting: Setting, names: Sequence[str]) -> dict[str, Any]:
    """Seconds of all supported contenders, by round, with limit and floor."""
    bounds = {"Limit": Limit(inputs), "Floor": Floor(inputs)}
    steps, flops, failed = {}, {}, {}
    for name in names:
        try:
            contender = made(name, inputs)
            contender.step()
        except Exception as error:  # other packages raise any type; reported
            failed[name] = why(error)
        else:
            steps[name], flops[name] = contender.step, contender.flops
            contender = None
    steps |= {name: bound.step for name, bound in bounds.items()}
    flops |= {name: bound.flops for name, bound in bounds.items()}
    return {
        "pairs": inputs.pairs,
        "load_max": inputs.load_max,
        "flops": flops,
        "failed_each": failed,
        "times": clock.take_turns(steps, setting.rounds, setting.device, "Limit"),
    }


def nulls(cases: Sequence[Case], setting: Setting) -> dict[str, Any]:
    """Our layer and the loop at several null shares in turn: pairs, and seconds of each round.

    Args:
        cases: of equal sizes, the one without null experts first.
    """
    start(setting)
    pairs, steps = [], {}
    for case in cases:
        inputs = Inputs(case, DTYPES[setting.dtype], setting.device)
        pairs.append(inputs.pairs)
        for kind in (Ours, Loop):
            steps[f"{kind.__name__} {case.null_share}"] = kind(inputs).step
    bound = next(iter(steps))
    return {"pairs": pairs, "times": clock.take_turns(steps, setting.rounds, setting.device, bound)}


def made(name: str, inputs: Inputs) -> Contender:
    """Build a contender, unless it needs more memory than available."""
    kind = CONTENDERS[name]
    need, free = kind.gibibytes(inputs), clock.free_gibibytes(inputs.device)
    if need > 0.8 * free:
        raise Refused(f"needs about {need:.0f} GiB of {free:.0f} GiB")
    return kind(inputs)


def why(error: Exception) -> str:
    """The reason of a failure in one line."""
    return str(error) if isinstance(error, Refused) else reason(error)


def memory(inputs: Inputs, name: str) -> dict[str, Any]:
    """MiB of the first step of one contender beyond weights and their gradients."""
    # A small case first, to load libraries and start threads.
    small = replace(inputs.case, tokens=8 * inputs.case.experts, width=64)
    made(name, Inputs(small, inputs.dtype, inputs.device)).step()
    contender = made(name, inputs)
    with clock.Peak(inputs.device) as peak:
        contender.gradients()
    gradients = (
        sum(
            p.grad.numel() * p.grad.element_size()
            for p in contender.parameters()
            if p.grad is not None
        )
        / 2**20
    )
    case = inputs.case
    elements = inputs.pairs * (case.ffn_dim + 2 * case.width)
    beyond = peak.mib - gradients
    return {
        "peak_mib": peak.mib,
        "beyond_mib": beyond,
        "of_goal": beyond * 2**20 / inputs.dtype.itemsize / elements,
    }
