"""Auxiliary losses by name: which there are, what each needs, and the option that selects them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.routing import losses


def _balance(
    probs_TC: Tensor,
    mask_TC: Tensor,
    balance_probs_TC: Tensor | None,
    balance_mask_TC: Tensor | None,
    weight_T: Tensor | None,
) -> Tensor:
    return losses.balance_loss(
        probs_TC=probs_TC if balance_probs_TC is None else balance_probs_TC,
        mask_TC=mask_TC if balance_mask_TC is None else balance_mask_TC,
        weight_T=weight_T,
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "balance": _balance,
    "switch": losses.switch_loss,
    "mi": losses.mutual_information_loss,
    "importance": losses.importance_loss,
    "load": losses.load_loss,
    "z": losses.z_loss,
    "entropy": losses.entropy_loss,
    "diversity": losses.diversity_loss,
    "simplicity": losses.simplicity_loss,
    "null": losses.null_rate_loss,
    "consistency": losses.consistency_loss,
}
"""Losses that any gate can have, functions of the values that `compute` is given."""

_ARGUMENTS = {name: set(inspect.signature(loss).parameters) for name, loss in LOSSES.items()}


def takes(name: str, argument: str) -> bool:
    """Whether the loss `name` is one of `LOSSES` that is computed from `argument`."""
    return argument in _ARGUMENTS.get(name, ())


def compute(name: str, given: Mapping[str, Any]) -> Tensor:
    """The loss `name` of `LOSSES` from those of the values `given` that it takes.

    Args:
        given: the fields of a `Choice` without padding in its mask; `weight_T`, the weights of the
            tokens, `prior_TC`, the logits T of `LexicalPrior` or None, `active_C`, the candidates
            that can be selected (bool), and `vectors_CD`, a vector for each, or None; `num_null`,
            the number of null experts, the last candidates, and `target`, the mean of their
            probability that the loss `null` aims at.
    """
    return LOSSES[name](**{key: given[key] for key in _ARGUMENTS[name] & given.keys()})


def coefficients(
    options: MoEOptions, capabilities: Capabilities, has_vectors: bool
) -> Mapping[str, float]:
    """The losses that `--moe-aux` selects and their coefficients, in the order given.

    Losses with coefficient 0 are included: they are logged.

    Raises:
        OptionError: not of the form NAME=NUMBER,…, a loss twice, unknown, or not for this gate.
    """
    text = capabilities.default_aux if options.moe_aux is None else str(options.moe_aux)
    chosen: dict[str, float] = {}
    text = text.replace(" ", "")
    for part in text.split(","):
        if part in ("", "none"):
            continue
        name, equals, number = part.partition("=")
        _check_name(options, capabilities, has_vectors, name)
        if name in chosen:
            raise OptionError("moe_aux", text, f"gives {name} twice")
        try:
            chosen[name] = float(number) if equals else 1.0
        except ValueError:
            raise OptionError("moe_aux", text, f"give a number for {name}: {name}=0.01") from None
        if not (math.isfinite(chosen[name]) and chosen[name] >= 0):
            raise OptionError("moe_aux", text, f"give {name} a coefficient of 0 or more")
    if "none" in text.split(",") and chosen:
        raise OptionError("moe_aux", text, "give none alone, or losses without it")
    return chosen


def _check_name(
    options: MoEOptions, capabilities: Capabilities, has_vectors: bool, name: str
) -> None:
    gate = f"the gate {options.moe_gate}"
    no_null = (
        "give --moe-null-experts" if capabilities.null_experts else (f"and {gate} cannot have any")
    )
    no_prior = "there are no logits of token ids; give --moe-lexical, with a gate that has it"
    lacks = {
        "logits_TC": "" if capabilities.logits else f"{gate} has no logits",
        "vectors_CD": "" if has_vectors else f"{gate} has no vectors of experts here",
        "prior_TC": "" if getattr(options, "moe_lexical", "none") != "none" else no_prior,
        "num_null": "" if options.moe_null_experts else f"there are no null experts; {no_null}",
    }

    def reasons(loss: str) -> list[str]:
        return [reason for argument, reason in lacks.items() if reason and takes(loss, argument)]

    usable = [*capabilities.losses, *(loss for loss in LOSSES if not reasons(loss))]
    if name not in usable:
        reason = (
            f"{name}: {reasons(name)[0]}"
            if name in LOSSES
            else (f"no loss named {name!r} for {gate}")
        )
        raise OptionError("moe_aux", options.moe_aux, f"{reason}; one of: {', '.join(usable)}")
