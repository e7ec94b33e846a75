"""Whether a model that was made from a dense one computes the same, told from its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evomoe_plugin.evolve.methods import METHODS as SPAWN_METHODS
from evomoe_plugin.evolve.upcycle import Recipe, Upcycling
from evomoe_plugin.options import expert_counts, moe_layer_indices


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
    if recipe.method in SPAWN_METHODS and recipe.method != "copy" and recipe.rate != 0:
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
    if options.moe_spawn_updates and (options.moe_shared_experts or upcycling.num_slices > 1):
        return Agreement(False, "until --moe-spawn-updates the first expert works alone, beside "
                                "shared experts that count in full")
    if options.moe_spawn_updates:
        return Agreement(True, "until --moe-spawn-updates the first expert works alone")
    if upcycling.num_slices > 1:
        return _agreement_of_slices(upcycling)
    return _weights_sum_to_one(options, recipe)


def _shared_sum_to_one(options: Any) -> bool:
    if options.moe_shared_combine == "softmax":
        return True
    return options.moe_shared_combine == "mix" and options.moe_shared_experts == 1


def _agreement_of_slices(upcycling: Upcycling) -> Agreement:
    options, recipe = upcycling.options, upcycling.recipe
    slices = upcycling.num_slices
    if not recipe.rescale:
        return Agreement(False, f"one of each of the {slices} slices sum to the dense network with "
                                "weights of 1; gates give less")
    even = options.moe_gate in ("dense", "dense_to_sparse") and recipe.gate_deviation == 0.0
    whole = _weights_sum_to_one(options, recipe)
    if even and whole.equal and not options.moe_shared_experts:
        return Agreement(True, "all slices work with equal weights, which they were scaled for")
    return Agreement(None, "slices were scaled for equal weights of all of them; the gate "
                           f"{options.moe_gate} gives others")


def _weights_sum_to_one(options: Any, recipe: Recipe) -> Agreement:
    """Of the routed experts' weights, in evaluation at update 0."""
    gate = options.moe_gate
    layers = len(moe_layer_indices(options, options.decoder_layers))
    counts = expert_counts(options, layers)
    if max(counts) == 1 and gate in ("switch", "top_k", "expert_choice") and (
            getattr(options, "moe_scorer", "linear") != "sigmoid"):
        return Agreement(True, "a lone expert has the weight 1")
    if gate == "dense_to_sparse":
        return _dense_to_sparse(options, recipe, counts)
    if gate == "top_k":
        if options.moe_top_k_weights == "renormalized":
            return Agreement(True, "the weights of the picks sum to 1")
        if options.moe_top_k == min(counts) == max(counts) and options.moe_scorer != "sigmoid":
            return Agreement(True, "all experts are picked, and their weights sum to 1")
        return Agreement(False, "raw weights of the picks sum to less than 1; "
                                "--moe-top-k-weights renormalized makes them equal")
    if gate == "expert_choice" and int(options.moe_expert_choice_factor + 0.5) >= max(counts):
        return Agreement(True, "all experts work, and their weights sum to 1")
    sums = {
        "dense": (True, "the weights of all experts sum to 1"),
        "gshard": (True, "the weights of both picks sum to 1"),
        "top_p": (True, "the weights of the picks sum to 1"),
        "top_any": (True, "the weights of a token's experts sum to 1, and one that reaches none "
                          "has its best in evaluation; in training it has none"),
        "dselect_k": (True, "the weights of all selectors sum to 1"),
        "hash": (True, "each token has one expert, of weight 1"),
        "switch": (False, "the weight of the one pick is its probability, below 1"),
        "base": (False, "the weight of the one pick is a sigmoid, below 1"),
        "stable": (False, "the weight of the one pick is a sigmoid, below 1"),
        "relu": (False, "the weights are positive logits, of any sum"),
        "expert_choice": (False, "a token's weights are probabilities that sum to less than 1"),
    }
    return Agreement(*sums.get(gate, (None, f"nothing is known of the gate {gate}")))


def _dense_to_sparse(options: Any, recipe: Recipe, counts: list[int]) -> Agreement:
    from evomoe_plugin.gates.dense_to_sparse_options import hard_updates

    if options.moe_eval_gate == "dense":
        return Agreement(True, "all experts work, and their weights sum to 1")
    if options.moe_eval_gate == "top1" or hard_updates(options) == 0:
        return Agreement(False, "routing is hard: the weight of the one expert is below 1")
    threshold, most = options.moe_gate_threshold, max(counts)
    even = recipe.gate_deviation == 0.0 and options.moe_scorer == "linear"
    if threshold == 0 or (even and threshold < 1 / most):
        return Agreement(True, "routing is soft, and the weights of all experts sum to 1")
    if options.moe_combine_weights == "gate":
        return Agreement(None, "equal where every expert passes --moe-gate-threshold; else a token "
                               f"loses at most {(most - 1) * threshold:.2g} of its weight")
    return Agreement(None, "equal where every expert passes --moe-gate-threshold; else a token "
                           "loses the weight of those that do not")
