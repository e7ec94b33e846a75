"""Published flags that this package has under another name or does not need: those of the EvoMoE
authors' fork of fairseq and of fairseq's moe branch.

A command line is translated before it is parsed. What it does not give has our default, not theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomoe_plugin.config.errors import OptionError


@dataclass(frozen=True)
class Row:
    """What a published flag means here. A flag may have several rows.

    Attributes:
        ours: our option, and its value unless that is the flag's; empty: the flag has no effect.
        has_value: a value follows the flag.
        values: our value for each that it may have; None: any, unchanged.
        needs: a flag without which it has no effect.
        without: a flag beside which it has no effect.
        reason: why it has none.
    """

    flag: str
    ours: str = ""
    has_value: bool = False
    values: Mapping[str, str] | None = None
    needs: str = ""
    without: str = ""
    reason: str = ""

    def idle(self, given: Mapping[str, str]) -> str:
        """Why the flag has no effect beside the flags that are given; empty if it has one."""
        if self.needs and self.needs not in given:
            return f"needs {self.needs}"
        if self.without in given:
            return f"{self.without} takes its place"
        return self.reason


_TOP1, _TOPK = "--moe-top1-expert", "--moe-topk-expert"
_GUMBEL, _GUMBEL_GATES = "--use-gumbel-softmax", "--use-gumbel-gates"
_SCHEDULES = {"Linear": "linear", "Exp": "exp", "None": "constant"}


def _annealing(flag: str, ours: str, values: Mapping[str, str] | None = None) -> Row:
    return Row(flag, ours, has_value=True, values=values, needs=_GUMBEL)


def _off(flag: str, value: str) -> Row:
    """A flag without counterpart, accepted with the value that turns it off."""
    return Row(flag, has_value=True, values={value: value}, reason=f"{value} turns it off")


ROWS = (
    Row(_GUMBEL, "--moe-gate dense_to_sparse"),
    Row(_GUMBEL, "--moe-combine-weights softmax", without=_GUMBEL_GATES),
    Row(_GUMBEL_GATES, "--moe-combine-weights gate", needs=_GUMBEL),
    # The published code routes as Switch where both are given; its recipes mean the other.
    Row(_TOP1, "--moe-gate switch", without=_GUMBEL),
    Row(_TOPK, "--moe-gate dense", without=_GUMBEL),
    Row("--topk", has_value=True, reason="all experts are candidates"),
    Row(
        "--moe-train-capacity-token-fraction",
        "--moe-capacity-factor",
        has_value=True,
        needs=_TOP1,
        without=_GUMBEL,
    ),
    _annealing("--gumbel-decay-scheduler", "--moe-temperature-schedule", _SCHEDULES),
    _annealing("--gumbel-decay-factor", "--moe-temperature-updates"),
    _annealing("--max-temperature", "--moe-temperature-start"),
    _annealing("--min-temperature", "--moe-temperature-end"),
    _annealing("--switch-to-hard-gumbel-softmax", "--moe-hard-updates"),
    Row(
        "--moe-normalize-expert-grad",
        has_value=True,
        reason="an expert's gradient is averaged over all tokens",
    ),
    Row("--use-moe-pad-mask", reason="padding is never routed"),
    Row("--record-a2a-perf-stats", reason="ep_wait_ms is always in the log"),
    Row("--dummy-a2a", reason="rows are always exchanged"),
    Row("--save-trace", reason="the published code ignores it too"),
    Row("--is-moe", reason="the architecture says so"),
    _off("--moe-gate-loss-transform", "none"),
    _off("--alternate-ffn-embed-dim", "0"),
    _off("--alternate-decoder-ffn-embed-dim", "0"),
)
# In theirs, --moe-freq gives fairseq's Transformers MoE layers.
ARCHS = {"transformer_vaswani_wmt_en_de_big": "transformer_wmt_en_de_big_moe"}
_GIVES_MOE_LAYERS = {"--moe-freq", "--encoder-moe-freq", "--decoder-moe-freq"}


def translate(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line in our options, and a line on each published flag in it.

    Raises:
        OptionError: a flag lacks its value, has one without counterpart, or contradicts another.
    """
    given, rest = _divide(words)
    parts = [part for word in rest for part in word.split("=", 1)]
    others = dict(itertools.zip_longest(parts, parts[1:], fillvalue=""))  # option -> value
    lines = []
    arch = others.get("--arch", "")
    if arch in ARCHS and _GIVES_MOE_LAYERS & others.keys():
        rest += ["--arch", ARCHS[arch]]
        lines.append(f"--arch {arch} is --arch {ARCHS[arch]} here")
    ours: dict[str, str] = {}
    sources: dict[str, str] = {}
    for flag, value in given.items():
        rows = [row for row in ROWS if row.flag == flag]
        became = []
        for row in rows:
            if row.values is not None and value not in row.values:
                raise OptionError(flag, value, f"give {' or '.join(row.values)}")
            if row.idle(given):
                continue
            option, _, fixed = row.ours.partition(" ")
            wanted = fixed or (value if row.values is None else row.values[value])
            if ours.get(option, others.get(option, wanted)) != wanted:
                raise OptionError(
                    flag,
                    value or "(given)",
                    f"is {option} {wanted} here and contradicts {sources.get(option, option)}: "
                    "leave one of them out",
                )
            ours[option], sources[option] = wanted, flag
            became.append(f"{option} {wanted}")
        effect = (
            f"is {' '.join(became)} here" if became else f"has no effect: {rows[0].idle(given)}"
        )
        lines.append(f"{flag} {value}".strip() + f" {effect}")
    return [*rest, *(word for pair in ours.items() for word in pair)], lines


def leave_out(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without published flags, for commands that evaluate, and a line on each.

    Raises:
        OptionError: a flag lacks its value.
    """
    given, rest = _divide(words)
    return rest, [without_effect(flag, value) for flag, value in given.items()]


def without_effect(flag: str, value: str) -> str:
    """What is said of an option of the model that a command gives which evaluates a checkpoint."""
    return f"{flag} {value}".strip() + " is ignored here: the model is built as its checkpoint says"


def _divide(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The published flags with their values, the last where one comes twice; all other words."""
    has_value = {row.flag: row.has_value for row in ROWS}
    given: dict[str, str] = {}
    rest: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag not in has_value:
            rest.append(word)
            continue
        if equals and not has_value[flag]:
            raise OptionError(flag, value, "takes no value: leave the value out")
        if has_value[flag] and not equals:
            value = next(left, "--")
        if value.startswith("--"):
            raise OptionError(flag, "(not given)", "give its value")
        given[flag] = value
    return given, rest
