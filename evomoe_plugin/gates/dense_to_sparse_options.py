"""Options of the dense-to-sparse gate."""

# No `from __future__ import annotations`: fairseq reads the types of these fields at run time.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import flag, gated_updates
from evomoe_plugin.config.values import check_choice, check_number
from evomoe_plugin.gates.balance_bias import BalanceBiasOptions
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.routing.schedules import TEMPERATURE_SCHEDULES

TEMPERATURE_SCOPES = ("global", "token")


@dataclass
class DenseToSparseOptions(BalanceBiasOptions, ScorerOptions):
    """The main values of the published code are lost; these are our defaults (docs/options.md)."""

    moe_temperature_start: float = flag(2.0, "temperature of the gate at update 0")
    moe_temperature_end: float = flag(0.3, "temperature at the end of the annealing")
    moe_temperature_updates: Optional[int] = flag(
        None, "length of the annealing in updates (default: --moe-temperature-share)"
    )
    moe_temperature_share: float = flag(
        0.3, "length of the annealing as a share of --max-update, less the updates before a spawn"
    )
    moe_temperature_scope: str = flag(
        "global",
        "what a temperature is relative to: global (nothing), or token (the standard deviation of "
        "the token's logits, which are divided by it)",
    )
    moe_temperature_schedule: str = flag(
        "linear", "temperature schedule: " + ", ".join(TEMPERATURE_SCHEDULES)
    )
    moe_gate_threshold: float = flag(
        0.001,
        "a token goes to the experts whose gate value exceeds this, and always to its best expert",
    )
    moe_hard_updates: Optional[int] = flag(
        None,
        "update from which routing is hard, to --moe-hard-top-k experts; -1: never (default: when "
        "the annealing ends; never with the constant schedule)",
    )
    moe_hard_top_k: int = flag(
        1, "experts per token once routing is hard, and the least number while it is soft"
    )
    moe_gate_noise: str = flag(
        "gumbel", "noise on the gate's logits in training, until routing is hard: gumbel or none"
    )
    moe_combine_weights: str = flag(
        "gate",
        "weights of the experts' outputs: gate (the noisy, tempered softmax) or softmax (of the "
        "logits without noise)",
    )
    moe_eval_gate: str = flag(
        "reached", "routing in evaluation: reached (as training does at that update), top1 or dense"
    )


def annealing_updates(options: DenseToSparseOptions) -> int:
    """Length of the annealing in updates, with the default resolved."""
    if options.moe_temperature_updates is not None:
        return options.moe_temperature_updates
    return round(options.moe_temperature_share * gated_updates(options))


def hard_updates(options: DenseToSparseOptions) -> int:
    """The update from which routing is hard, with the default resolved; -1: never."""
    if options.moe_hard_updates is not None:
        return options.moe_hard_updates
    return -1 if options.moe_temperature_schedule == "constant" else annealing_updates(options)


def validate_dense_to_sparse(
    options: DenseToSparseOptions, expert_counts: Sequence[int]
) -> list[str]:
    """Warnings; raises `OptionError` for options that cannot work."""
    start, end = options.moe_temperature_start, options.moe_temperature_end
    constant = options.moe_temperature_schedule == "constant"
    choices = {
        "moe_temperature_schedule": TEMPERATURE_SCHEDULES,
        "moe_temperature_scope": TEMPERATURE_SCOPES,
        "moe_gate_noise": ("gumbel", "none"),
        "moe_combine_weights": ("gate", "softmax"),
        "moe_eval_gate": ("reached", "top1", "dense"),
    }
    for option, allowed in choices.items():
        check_choice(options, option, allowed)
    for option in ("moe_temperature_start", "moe_temperature_end"):
        check_number(options, option, "(0, inf)", "give a temperature above 0")
    if start < end and not constant:
        raise OptionError(
            "moe_temperature_start",
            start,
            f"the temperature decreases: give at least --moe-temperature-end ({end})",
        )
    check_number(
        options,
        "moe_gate_threshold",
        "[0, 1)",
        "gate values are probabilities: give 0 or more and less than 1",
    )
    check_number(
        options,
        "moe_temperature_updates",
        "[0, inf)",
        "give the length of the annealing in updates, 0 or more",
    )
    check_number(
        options, "moe_temperature_share", "[0, 1]", "it is a share of the run: give 0 to 1"
    )
    check_number(
        options,
        "moe_bias_update_rate",
        "[0, inf)",
        "it is a step of the logits' biases: give 0 or more, such as 0.01",
    )
    candidates = min(expert_counts) + options.moe_null_experts
    check_number(
        options,
        "moe_hard_top_k",
        f"[1, {candidates}]",
        f"an MoE layer has {candidates} candidates: give 1 to {candidates}",
    )
    if options.moe_temperature_updates is None and not constant and not options.max_update:
        raise OptionError(
            "moe_temperature_updates",
            "(not given)",
            "give it, or --max-update, of which the annealing is a share",
        )
    if options.moe_temperature_updates is not None and options.moe_temperature_share != (
        DenseToSparseOptions.moe_temperature_share
    ):
        raise OptionError(
            "moe_temperature_share",
            options.moe_temperature_share,
            "--moe-temperature-updates already sets the length: leave one of them out",
        )
    hard, annealing = hard_updates(options), annealing_updates(options)
    if hard < -1:
        raise OptionError("moe_hard_updates", hard, "give an update number, or -1 for never")
    warnings = []
    if 0 <= hard < annealing and not constant:
        warnings.append(
            f"--moe-hard-updates {hard}: routing turns hard before the annealing ends "
            f"at update {annealing}"
        )
    last = (options.moe_spawn_updates or 0) + max(hard, 0 if constant else annealing)
    if options.max_update and last > options.max_update:
        warnings.append(
            f"--max-update {options.max_update}: the run ends before the gate's "
            f"schedule does at update {last}"
        )
    return warnings
