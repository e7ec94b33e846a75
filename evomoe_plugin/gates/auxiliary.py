"""Auxiliary losses by name: which there are, what each needs, and the option that selects them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.routing import losses
from evomoe_plugin.routing.choice import Choice


@dataclass(frozen=True)
class LossInputs:
    """What a loss is computed from."""

    choice: Choice
    """Of the gate, without padding in its mask."""
    weight_T: Tensor | None
    """Weight of each token; None: 1."""
    active_C: Tensor | None
    """bool, the candidates that can be selected; None: all."""
    vectors_CD: Tensor | None
    """A vector for each candidate; None if no loss needs them."""
    num_null: int
    """Number of null experts, the last candidates."""
    null_rate_target: float | None
    """Mean probability of null experts that the loss `null` aims at."""

    def of_active(self, x_TC: Tensor) -> Tensor:
        """The columns of active candidates: empty slots are not an uneven load."""
        return x_TC if self.active_C is None else x_TC[:, self.active_C]


T = TypeVar("T")


def _needed(value: T | None) -> T:
    assert value is not None, "_check_name refuses losses without what they need"
    return value


@dataclass(frozen=True)
class AuxLoss:
    """A loss that any gate can have."""

    compute: Callable[[LossInputs], Tensor]
    needs: str = ""
    """What a gate must have: logits, vectors, null, or nothing if empty."""


def _balance(given: LossInputs) -> Tensor:
    choice = given.choice
    probs_TC, mask_TC = choice.balance_probs_TC, choice.balance_mask_TC
    return losses.balance_loss(
        probs_TC=choice.probs_TC if probs_TC is None else probs_TC,
        mask_TC=choice.mask_TC if mask_TC is None else mask_TC,
        weight_T=given.weight_T,
    )


LOSSES: dict[str, AuxLoss] = {
    "balance": AuxLoss(_balance),
    "switch": AuxLoss(lambda given: losses.switch_loss(
        probs_TC=given.of_active(given.choice.probs_TC),
        mask_TC=given.of_active(given.choice.mask_TC), weight_T=given.weight_T)),
    "mi": AuxLoss(lambda given: losses.mutual_information_loss(
        probs_TC=given.choice.probs_TC, weight_T=given.weight_T)),
    "importance": AuxLoss(lambda given: losses.importance_loss(
        probs_TC=given.of_active(given.choice.probs_TC), weight_T=given.weight_T)),
    "load": AuxLoss(lambda given: losses.load_loss(
        logits_TC=_needed(given.choice.logits_TC), mask_TC=given.choice.mask_TC,
        noise=1 / given.choice.mask_TC.size(1), weight_T=given.weight_T), needs="logits"),
    "z": AuxLoss(lambda given: losses.z_loss(
        logits_TC=_needed(given.choice.logits_TC), weight_T=given.weight_T), needs="logits"),
    "entropy": AuxLoss(lambda given: losses.entropy_loss(
        probs_TC=given.choice.probs_TC, weight_T=given.weight_T)),
    "diversity": AuxLoss(lambda given: losses.diversity_loss(
        vectors_CD=_needed(given.vectors_CD), active_C=given.active_C), needs="vectors"),
    "simplicity": AuxLoss(lambda given: losses.simplicity_loss(
        vectors_CD=_needed(given.vectors_CD), active_C=given.active_C), needs="vectors"),
    "null": AuxLoss(lambda given: losses.null_rate_loss(
        probs_TC=given.choice.probs_TC, num_null=given.num_null,
        target=_needed(given.null_rate_target), weight_T=given.weight_T), needs="null"),
}


def coefficients(
    options: MoEOptions, capabilities: Capabilities, *, has_vectors: bool
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
    has = {"logits": capabilities.logits, "vectors": has_vectors,
           "null": options.moe_null_experts > 0, "": True}
    usable = [*capabilities.losses,
              *(known for known, loss in LOSSES.items() if has[loss.needs])]
    if name in usable:
        return
    missing = LOSSES[name].needs if name in LOSSES else ""
    no_null = "give --moe-null-experts" if capabilities.null_experts else (
        f"and the gate {options.moe_gate} cannot have any")
    reason = {
        "logits": f"{name}: the gate {options.moe_gate} has no logits",
        "vectors": f"{name}: the gate {options.moe_gate} has no vectors of experts here",
        "null": f"{name}: there are no null experts; {no_null}",
    }.get(missing, f"no loss named {name!r} for the gate {options.moe_gate}")
    raise OptionError("moe_aux", options.moe_aux, f"{reason}; one of: {', '.join(usable)}")
