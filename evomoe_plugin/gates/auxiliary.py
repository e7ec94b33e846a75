"""Auxiliary losses by name: which there are, what each needs, and the option that chooses them."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.routing import losses
from evomoe_plugin.routing.choice import Choice

if TYPE_CHECKING:
    from evomoe_plugin.gates.gate import Gate


@dataclass(frozen=True)
class AuxLoss:
    """A loss that any gate may have."""

    compute: Callable[["Gate", Choice, Tensor | None], Tensor]
    """From the gate, its choice (no padding in it) and the tokens' weights."""
    needs: str = ""
    """logits, vectors or null: what a gate must have; empty: nothing."""


def _balance(gate: "Gate", choice: Choice, weight_T: Tensor | None) -> Tensor:
    probs_TC, mask_TC = choice.balance_probs_TC, choice.balance_mask_TC
    return losses.balance_loss(
        probs_TC=choice.probs_TC if probs_TC is None else probs_TC,
        mask_TC=choice.mask_TC if mask_TC is None else mask_TC,
        weight_T=weight_T,
    )


def _of_active(gate: "Gate", x_TC: Tensor) -> Tensor:
    """The columns of candidates that can be chosen: empty places are no uneven load."""
    active_C = gate.active()
    return x_TC if active_C is None else x_TC[:, active_C]


def _vectors(gate: "Gate", choice: Choice) -> Tensor:
    """As precise as the gate computes, whatever the parameters are kept in."""
    return gate.vectors().to(choice.probs_TC.dtype)


LOSSES: dict[str, AuxLoss] = {
    "balance": AuxLoss(_balance),
    "switch": AuxLoss(lambda gate, choice, weight_T: losses.switch_loss(
        probs_TC=_of_active(gate, choice.probs_TC), mask_TC=_of_active(gate, choice.mask_TC),
        weight_T=weight_T)),
    "mi": AuxLoss(lambda gate, choice, weight_T: losses.mutual_information_loss(
        probs_TC=choice.probs_TC, weight_T=weight_T)),
    "importance": AuxLoss(lambda gate, choice, weight_T: losses.importance_loss(
        probs_TC=_of_active(gate, choice.probs_TC), weight_T=weight_T)),
    "load": AuxLoss(lambda gate, choice, weight_T: losses.load_loss(
        logits_TC=choice.logits_TC, mask_TC=choice.mask_TC,
        noise=1 / choice.mask_TC.size(1), weight_T=weight_T), needs="logits"),
    "z": AuxLoss(lambda gate, choice, weight_T: losses.z_loss(
        logits_TC=choice.logits_TC, weight_T=weight_T), needs="logits"),
    "entropy": AuxLoss(lambda gate, choice, weight_T: losses.entropy_loss(
        probs_TC=choice.probs_TC, weight_T=weight_T)),
    "diversity": AuxLoss(lambda gate, choice, weight_T: losses.diversity_loss(
        vectors_CD=_vectors(gate, choice), active_C=gate.active()), needs="vectors"),
    "simplicity": AuxLoss(lambda gate, choice, weight_T: losses.simplicity_loss(
        vectors_CD=_vectors(gate, choice), active_C=gate.active()), needs="vectors"),
    "null": AuxLoss(lambda gate, choice, weight_T: losses.null_rate_loss(
        probs_TC=choice.probs_TC, num_null=gate.info.num_null, target=gate.null_rate_target,
        weight_T=weight_T), needs="null"),
}


def coefficients(options: Any, gate: type["Gate"]) -> Mapping[str, float]:
    """The chosen losses and their coefficients, in the order given.

    Losses of coefficient 0 are among them: they are logged.

    Raises:
        OptionError: not of the form NAME=NUMBER,…, a loss twice, unknown, or not for this gate.
    """
    text = gate.capabilities.default_aux if options.moe_aux is None else str(options.moe_aux)
    chosen: dict[str, float] = {}
    text = text.replace(" ", "")
    for part in text.split(","):
        if part in ("", "none"):
            continue
        name, equals, number = part.partition("=")
        _check_name(options, gate, name)
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


def _check_name(options: Any, gate: type["Gate"], name: str) -> None:
    has = {"logits": gate.capabilities.logits, "vectors": gate.has_vectors(options),
           "null": options.moe_null_experts > 0, "": True}
    usable = [*gate.capabilities.losses,
              *(known for known, loss in LOSSES.items() if has[loss.needs])]
    if name in usable:
        return
    missing = LOSSES[name].needs if name in LOSSES else None
    no_null = "give --moe-null-experts" if gate.capabilities.null_experts else (
        f"and the gate {options.moe_gate} can have none")
    reason = {
        "logits": f"{name}: the gate {options.moe_gate} has no logits",
        "vectors": f"{name}: the gate {options.moe_gate} has no vectors of experts here",
        "null": f"{name}: there are no null experts; {no_null}",
    }.get(missing, f"no loss named {name!r} for the gate {options.moe_gate}")
    raise OptionError("moe_aux", options.moe_aux, f"{reason}; one of: {', '.join(usable)}")
