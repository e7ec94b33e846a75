"""Export a gate in its current training state: routing configuration and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import Gate, gate_class, gate_names, scorers
from evomoe_plugin.gates.top_p import NEAR_TIE
from evomoe_plugin.layer import MoELayer


def export_gate(layer: MoELayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The gate of `layer` in its current state; before the spawn there is only expert 0.

    Returns:
        `config.routing` of `remote.gate_evomoe.Gate`, the same for every layer; and parameters and
        buffers by their names there.
    Raises:
        OptionError: a user's gate, which the exported model does not implement.
    """
    gate = layer.gate
    name = gate_name(gate)
    if name not in _EXPORTERS:
        raise OptionError("moe_gate", name, "only gates of this package can be exported")
    if layer.in_dense_phase:
        return {"fp32": gate.use_fp32, "scorer": "none", "select": "first"}, {}
    num_updates = layer.gate_updates(int(layer.get_buffer("num_updates")))
    given = {
        "fp32": gate.use_fp32,
        **_scorer(getattr(gate, "scorer", None), gate.scorer_factor(num_updates)),
        **_EXPORTERS[name](gate, num_updates),
        **_added(gate, num_updates),
    }
    if gate.shared_weights is not None:
        given["shared_weight"] = gate.shared_weights.weight
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return {name: value for name, value in given.items() if name not in tensors}, tensors


def gate_name(gate: Gate) -> str:
    """Its registered name, or that of its class."""
    return next(
        (name for name in gate_names() if gate_class(name) is type(gate)), type(gate).__name__
    )


# Routing configuration and tensors, by name.


def _scorer(scorer: scorers.Scorer | None, factor: float) -> dict[str, Any]:
    """The scorer, whose logits are multiplied by `factor`."""
    if scorer is None:
        return {"scorer": "none"}
    if isinstance(scorer, scorers.MLPScorer):
        return {
            "scorer": "mlp",
            "scorer_dim": scorer.weight.size(1),
            "weight": factor * scorer.weight,
            "hidden_weight": scorer.hidden_weight,
            "hidden_bias": scorer.hidden_bias,
        }
    if isinstance(scorer, scorers.CosineScorer):
        given: dict[str, Any] = {
            "scorer": "cosine",
            "weight": scorer.centres,
            "scale": factor * scorer.log_scale.clamp(max=math.log(100)).exp(),
        }
        if isinstance(scorer, scorers.GMMScorer):
            given |= {
                "scorer": "gmm",
                "scorer_dim": scorer.centres.size(1),
                "projection": scorer.projection,
            }
        return given
    if isinstance(scorer, scorers.LinearScorer):
        return {"scorer": "linear", "weight": factor * scorer.weight}
    raise OptionError(
        "moe_scorer", type(scorer).__name__, "only scorers of this package can be exported"
    )


def _added(gate: Gate, num_updates: int) -> dict[str, Any]:
    """What is subtracted from the input, added to the logits, and scales the weights."""
    given: dict[str, Any] = {}
    if gate.centred_input is not None:
        given |= {"centred": True, "input_mean": gate.centred_input.mean_D.float()}
    if gate.lexical is not None and gate.lexical.strength(num_updates) > 0:
        given |= {"lexical": True, "lexical_logits": gate.lexical.logits(num_updates)}
    scale = gate.weight_scale
    if scale is not None and scale.kind == "unit":
        given |= {"unit_weights": True, "weight_total": scale.total}
    elif scale is not None:
        gain: Tensor | None = scale.gain
        if gain is None:
            gain = (scale.total / scale.mean).float().expand(gate.info.num_candidates)
        given |= {"gains": True, "gain": gain}
    return given


_SCORES = {"scores": "softmax", "temperature": 1.0, "weight_temperature": 1.0}


def _top_k(top_k: int, **given: Any) -> dict[str, Any]:
    return {
        "select": "top_k",
        "top_k": top_k,
        "rank": "logits",
        "normalized": False,
        **_SCORES,
        **given,
    }


def _dense_to_sparse(gate: Any, num_updates: int) -> dict[str, Any]:
    tau = gate.temperature(num_updates)
    taus = {
        "temperature": tau,
        "weight_temperature": tau if gate.combine_weights == "gate" else 1.0,
    }
    given: dict[str, Any] = {"standardized": True} if gate.standardized else {}
    if gate.bias_update_rate:
        given |= {"logit_bias": True, "selection_bias": gate.bias_C}
    if gate.is_hard(num_updates):
        return _top_k(
            1 if gate.eval_gate == "top1" else gate.hard_top_k, rank="scores", **taus, **given
        )
    given["top_k"] = gate.hard_top_k
    threshold = -1.0 if gate.eval_gate == "dense" else gate.threshold
    return {"select": "threshold", "threshold": threshold, **_SCORES, **taus, **given}


def _stable(gate: Any, num_updates: int) -> dict[str, Any]:
    if not gate._is_frozen(num_updates):  # also builds the table if needed
        return _top_k(1, scores="sigmoid")
    return {"select": "table", "table": gate.table_V}


def _top_any(gate: Any, num_updates: int) -> dict[str, Any]:
    active_E = gate.active_E  # inactive experts are unreachable, and omitted
    scale = torch.as_tensor(gate._scale(torch.float32), dtype=gate.weight.dtype).reshape(1)
    return {
        "scorer": "cosine",
        "select": "top_any",
        "scale": scale,
        "weights": "score" if gate.weighted_by_score else "uniform",
        "weight": gate.weight[active_E],
        "threshold": gate.threshold[active_E],
    }


def _top_k_gate(gate: Any, num_updates: int) -> dict[str, Any]:
    scores = "sigmoid" if isinstance(gate.scorer, scorers.SigmoidScorer) else "softmax"
    return _top_k(
        gate.top_k,
        rank="scores",
        scores=scores,
        normalized=gate.renormalized,
        bias=True,
        selection_bias=gate.bias_C,
    )


# By registered name: from a gate and its number of updates.
_EXPORTERS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "base": lambda gate, _: _top_k(1, scores="sigmoid"),
    "dense": lambda gate, _: {"select": "threshold", "threshold": -1.0, "top_k": 1, **_SCORES},
    "dense_to_sparse": _dense_to_sparse,
    "dselect_k": lambda gate, _: {
        "scorer": "bits",
        "select": "bits",
        "top_k": gate.selectors,
        "width": gate.width,
        "weight": gate.weight,
    },
    "expert_choice": lambda gate, _: _top_k(gate.top_k),
    "gshard": lambda gate, _: _top_k(2, normalized=True),
    "hash": lambda gate, _: {"select": "table", "table": gate.table_V},
    "relu": lambda gate, _: {"select": "positive"},
    "stable": _stable,
    "switch": lambda gate, _: _top_k(1),
    "top_any": _top_any,
    "top_k": _top_k_gate,
    "top_p": lambda gate, _: {
        "select": "top_p",
        "top_p": gate.top_p,
        "top_k": gate.top_k,
        "weights": gate.weights,
        "near_tie": NEAR_TIE,
    },
}
