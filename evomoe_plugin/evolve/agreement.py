"""Whether a model that was made from a dense one computes the same, told from its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evomoe_plugin.config.options import SPAWN_RATES, expert_counts, moe_layer_indices
from evomoe_plugin.evolve.upcycle import Upcycling
from evomoe_plugin.gates import WeightSum, gate_class


@dataclass(frozen=True)
class Agreement:
    """Whether the MoE model computes what the dense one did, in evaluation, before any update."""

    equal: bool | None
    """None: nobody can tell but a measurement."""
    why: str


def agreement(upcycling: Upcycling) -> Agreement:
    """Whether the logits are those of the dense model.

    They are where every expert is the whole network and the weights of experts sum to 1; or where
    all slices come together with the weights that they were scaled for.
    """
    options, recipe = upcycling.options, upcycling.recipe
    if recipe.method == "none":
        return Agreement(False, "the experts start afresh")
    if recipe.method in SPAWN_RATES:
        return Agreement(False, f"the method {recipe.method} changes what experts compute")
    if options.moe_eval_capacity_factor is not None or (
            options.moe_eval_capacity_token_fraction != -1):
        return Agreement(None, "a capacity in evaluation drops what the batch has too much of")
    if options.moe_null_experts:
        return Agreement(None, "null experts take a part of the weight and give nothing")
    if upcycling.num_shared_slices > 1:
        return Agreement(False, "shared experts hold only slices of the dense network, beside "
                                "routed ones that hold it too")
    if options.moe_shared_experts and not _shared_sum_to_one(options):
        return Agreement(False, f"{options.moe_shared_experts} shared experts add what routed ones "
                                "give already; --moe-shared-combine softmax weighs them")
    if options.moe_spawn_updates and options.moe_shared_experts:
        return Agreement(False, "until --moe-spawn-updates the first expert works alone, beside "
                                "shared experts that count in full")
    if options.moe_spawn_updates:
        return Agreement(True, "until --moe-spawn-updates the first expert works alone")
    if upcycling.num_slices > 1:
        return _agreement_of_slices(upcycling)
    weights = _weight_sum(upcycling)
    return Agreement(weights.is_one, weights.why)


def _shared_sum_to_one(options: Any) -> bool:
    if options.moe_shared_combine == "softmax":
        return True
    return options.moe_shared_combine == "mix" and options.moe_shared_experts == 1


def _agreement_of_slices(upcycling: Upcycling) -> Agreement:
    options, slices = upcycling.options, upcycling.num_slices
    if not upcycling.recipe.rescale:
        return Agreement(False, f"one of each of the {slices} slices sum to the dense network with "
                                "weights of 1; gates give less")
    weights = _weight_sum(upcycling)
    if weights.all_equal and weights.is_one and not options.moe_shared_experts:
        return Agreement(True, "all slices work with equal weights, which they were scaled for")
    return Agreement(None, "slices were scaled for equal weights of all of them; the gate "
                           f"{options.moe_gate} gives others")


def _weight_sum(upcycling: Upcycling) -> WeightSum:
    """What the gate says of itself."""
    options = upcycling.options
    counts = expert_counts(options, len(moe_layer_indices(options, options.decoder_layers)))
    zero_logits = upcycling.recipe.gate_deviation == 0.0
    return gate_class(options.moe_gate).weight_sum(options, counts, zero_logits)
