"""Options of what scoring gates add to their scorer's logits."""

from collections.abc import Sequence
from dataclasses import dataclass

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions, flag, gated_updates
from evomoe_plugin.config.values import check_number

# Scorers whose logits are linear in the parameters that a factor scales.
LINEAR_SCORERS = ("linear", "sigmoid")


@dataclass
class LogitOptions(ModelOptions):
    """For gates that take any scorer: z = s(u) f(x - m) + d(u) T[token id] (docs/options.md)."""

    moe_lexical: str = flag(
        "none",
        "learned logits of each token id, added to the scorer's, initialised as: zero; normal:STD; "
        "hash:LOGIT (LOGIT for one expert of each id, by a hash, 0 for the others); none: no such "
        "logits",
    )
    moe_lexical_lr_factor: float = flag(
        1.0, "factor of the learning rate of these logits, under Adam"
    )
    moe_lexical_decay_updates: int = flag(
        0, "updates in which these logits are scaled down to 0, linearly; 0: never"
    )
    moe_gate_init_scale: float = flag(1.0, "factor of the scorer's initial weights")
    moe_gate_lr_factor: float = flag(
        1.0, "factor of the learning rate of the scorer's weights, under Adam"
    )
    moe_gate_warmup_updates: int = flag(
        0,
        "updates in which the scorer's logits are scaled up to their value, linearly, while "
        "--moe-lexical routes; 0: none",
    )
    moe_gate_centre: float = flag(
        0.0,
        "decay per update of a running mean of the gate's input, which is subtracted from it; 0: "
        "none",
    )


def lexical_init(options: LogitOptions) -> tuple[str, float]:
    """Kind and number of `--moe-lexical`; 0 for kinds without one.

    Raises:
        OptionError: neither none, zero, normal:STD nor hash:LOGIT with a positive number.
    """
    text = str(options.moe_lexical).replace(" ", "")
    kind, colon, number = text.partition(":")
    if not colon and kind in ("none", "zero"):
        return kind, 0.0
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if kind not in ("normal", "hash") or not 0 < value < float("inf"):
        raise OptionError(
            "moe_lexical", text, "give none, zero, normal:STD or hash:LOGIT, such as normal:3"
        )
    return kind, value


def validate_logits(options: LogitOptions, scorer: str) -> list[str]:
    """Check the options of a gate with the scorer named `scorer`.

    Returns:
        warnings.
    Raises:
        OptionError: an option cannot work, or has no effect.
    """
    kind, _ = lexical_init(options)
    for option in ("moe_lexical_lr_factor", "moe_gate_lr_factor", "moe_gate_init_scale"):
        check_number(options, option, "(0, inf)", "give a factor above 0")
    for option in ("moe_lexical_decay_updates", "moe_gate_warmup_updates"):
        check_number(options, option, "[0, inf)", "give a number of updates, 0 or more")
    check_number(options, "moe_gate_centre", "[0, 1)", "give a decay of at least 0 and below 1")
    needed = ("moe_lexical_lr_factor", "moe_lexical_decay_updates", "moe_gate_warmup_updates")
    if kind == "none":
        _refuse(options, needed, "there are no logits of token ids", "--moe-lexical")
    if scorer not in LINEAR_SCORERS:
        _refuse(
            options,
            ("moe_gate_lr_factor", "moe_gate_init_scale"),
            f"the logits of the scorer {scorer} are not linear in its weights",
            "--moe-scorer linear",
        )
    return _schedule_warnings(options)


def _schedule_warnings(options: LogitOptions) -> list[str]:
    decay, warmup = options.moe_lexical_decay_updates, options.moe_gate_warmup_updates
    before = options.moe_spawn_updates or 0
    warnings = [
        f"--max-update {options.max_update}: the run ends before {what} does at update "
        f"{before + updates} (--{option} {updates})"
        for what, option, updates in (
            ("the decay of --moe-lexical", "moe-lexical-decay-updates", decay),
            ("the gate's warm-up", "moe-gate-warmup-updates", warmup),
        )
        if options.max_update and updates > gated_updates(options)
    ]
    if 0 < decay < warmup:
        warnings.append(
            f"--moe-lexical-decay-updates {decay}: the table is gone before the scorer is at full "
            f"strength (--moe-gate-warmup-updates {warmup}): give at least that"
        )
    return warnings


def _refuse(options: LogitOptions, names: Sequence[str], reason: str, needed: str) -> None:
    for name in names:
        if getattr(options, name) != getattr(LogitOptions, name):
            raise OptionError(
                name, getattr(options, name), f"{reason}: leave it out, or give {needed}"
            )
