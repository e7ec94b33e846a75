"""Checks of the options of the selected gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import gate_class, gate_names, option_fields, own_options
from evomoe_plugin.gates.scorers import ScorerOptions, validate_scorer


def validate_gate(options: ModelOptions, expert_counts: Sequence[int]) -> list[str]:
    """Check the options of the selected gate, and that it uses all gate options given.

    Returns:
        warnings.
    Raises:
        OptionError: with the option, its value and the remedy.
    """
    cls = gate_class(options.moe_gate)
    used = {field.name for field in own_options(cls)}
    for name, field in option_fields().items():
        if name not in used and getattr(options, name, field.default) != field.default:
            users = [gate for gate in gate_names() if hasattr(gate_class(gate).Options, name)]
            raise OptionError(
                name,
                getattr(options, name),
                f"the gate {options.moe_gate} does not use it: leave it out, or "
                f"use a gate that does ({', '.join(users)})",
            )
    if options.moe_null_experts and not cls.capabilities.null_experts:
        raise OptionError(
            "moe_null_experts",
            options.moe_null_experts,
            f"the gate {options.moe_gate} cannot select null experts: give 0",
        )
    warnings = _weight_scale_warnings(cls, options)
    if "moe_scorer" in used:
        warnings += validate_scorer(cast(ScorerOptions, options), cls.capabilities.scorers)
    if (
        options.moe_shared_experts
        and options.moe_shared_combine == "softmax"
        and (not cls.capabilities.logits)
    ):
        raise OptionError(
            "moe_shared_combine",
            "softmax",
            f"the gate {options.moe_gate} has no logits: give add or mix",
        )
    cls.aux_coefficients(options)
    return warnings + cls.validate(options, expert_counts)


def _weight_scale_warnings(cls: type[Gate], options: ModelOptions) -> list[str]:
    scale = options.moe_weight_scale
    has_effect = scale not in ("unit", "mean") or options.moe_weight_total != 1.0
    if has_effect or not cls.weights_sum_to_one(options):
        return []
    return [
        f"--moe-weight-scale {scale}: a token's weights already sum to 1 with the gate "
        f"{options.moe_gate} and these options; this changes nothing"
    ]
