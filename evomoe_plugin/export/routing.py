"""Export a gate in its current training state: routing configuration and tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import Gate, gate_class
from evomoe_plugin.gates.base_layers import BASELayersGate
from evomoe_plugin.gates.dense import DenseGate
from evomoe_plugin.gates.dense_to_sparse import DenseToSparseGate
from evomoe_plugin.gates.dselect_k import DSelectKGate
from evomoe_plugin.gates.expert_choice import ExpertChoiceGate
from evomoe_plugin.gates.gshard import GShardGate
from evomoe_plugin.gates.hash import HashGate
from evomoe_plugin.gates.relu import ReluGate
from evomoe_plugin.gates.scorers import (
    CosineScorer,
    GMMScorer,
    LinearScorer,
    MLPScorer,
    SigmoidScorer,
)
from evomoe_plugin.gates.stable import StableGate
from evomoe_plugin.gates.switch import SwitchGate
from evomoe_plugin.gates.top_any import TopAnyGate
from evomoe_plugin.gates.top_k import TopKGate
from evomoe_plugin.gates.top_p import NEAR_TIE, TopPGate
from evomoe_plugin.layer import MoELayer

_ONE = {"temperature": 1.0, "weight_temperature": 1.0, "scores": "softmax"}


@dataclass(frozen=True)
class ExportedGate:
    """One gate in evaluation mode."""

    routing: Mapping[str, Any]
    """`config.routing` of `modeling_evomoe.Gate`; the same for every layer."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters and buffers by their names in `modeling_evomoe.Gate`."""


def export_gate(layer: MoELayer) -> ExportedGate:
    """The gate of `layer` in its current state; before the spawn there is only expert 0.

    Raises:
        OptionError: a user's gate, which the exported model does not implement.
    """
    gate = layer.gate
    exporter = _EXPORTERS.get(type(gate))
    if exporter is None:
        raise OptionError("moe_gate", gate_name(gate),
                          "only gates of this package can be exported")
    if layer.in_dense_phase:
        return ExportedGate({"fp32": gate.use_fp32, "scorer": "none", "select": "first"})
    exported = exporter(gate, layer.gate_updates(int(layer.num_updates)))
    scorer, tensors = _scorer(gate)
    tensors = {**tensors, **exported.tensors}
    if gate.shared_weights is not None:
        tensors["shared_weight"] = gate.shared_weights.weight
    routing = {"fp32": gate.use_fp32, **scorer, **exported.routing}
    return ExportedGate(routing, tensors)


def gate_name(gate: Gate) -> str:
    """Its registered name, or that of its class."""
    from evomoe_plugin.gates import gate_names

    return next((name for name in gate_names() if gate_class(name) is type(gate)),
                type(gate).__name__)


def _scorer(gate: Gate) -> tuple[dict[str, Any], dict[str, Tensor]]:
    scorer = getattr(gate, "scorer", None)
    if scorer is None:
        return {"scorer": "none"}, {}
    if isinstance(scorer, MLPScorer):
        tensors = {name: getattr(scorer, name) for name in ("hidden_weight", "hidden_bias",
                                                            "weight")}
        return {"scorer": "mlp", "scorer_dim": scorer.weight.size(1)}, tensors
    if isinstance(scorer, CosineScorer):
        tensors = {"weight": scorer.centres,
                   "scale": scorer.log_scale.clamp(max=math.log(100)).exp()}
        if isinstance(scorer, GMMScorer):
            tensors["projection"] = scorer.projection
            return {"scorer": "gmm", "scorer_dim": scorer.centres.size(1)}, tensors
        return {"scorer": "cosine"}, tensors
    if isinstance(scorer, LinearScorer):
        return {"scorer": "linear"}, {"weight": scorer.weight}
    raise OptionError("moe_scorer", type(scorer).__name__,
                      "only scorers of this package can be exported")


def _top_k(top_k: int, rank: str, scores: str = "softmax", normalized: bool = False,
           **further: Any) -> dict[str, Any]:
    return {"select": "top_k", "top_k": top_k, "rank": rank, "normalized": normalized,
            **_ONE, "scores": scores, **further}


def _base(gate: BASELayersGate, num_updates: int) -> ExportedGate:
    return ExportedGate(_top_k(1, "logits", scores="sigmoid"))


def _dense(gate: DenseGate, num_updates: int) -> ExportedGate:
    return ExportedGate({"select": "threshold", "threshold": -1.0, **_ONE})


def _dense_to_sparse(gate: DenseToSparseGate, num_updates: int) -> ExportedGate:
    tau = gate.temperature(num_updates)
    temperatures = {"temperature": tau,
                    "weight_temperature": tau if gate.combine_weights == "gate" else 1.0}
    if gate.is_hard(num_updates):
        return ExportedGate(_top_k(1, "scores", **temperatures))
    threshold = -1.0 if gate.eval_gate == "dense" else gate.threshold
    return ExportedGate({"select": "threshold", "threshold": threshold, **_ONE, **temperatures})


def _dselect_k(gate: DSelectKGate, num_updates: int) -> ExportedGate:
    return ExportedGate(
        {"scorer": "bits", "select": "bits", "top_k": gate.selectors, "width": gate.width},
        {"weight": gate.weight})


def _expert_choice(gate: ExpertChoiceGate, num_updates: int) -> ExportedGate:
    return ExportedGate(_top_k(gate.top_k, "logits"))


def _gshard(gate: GShardGate, num_updates: int) -> ExportedGate:
    return ExportedGate(_top_k(2, "logits", normalized=True))


def _hash(gate: HashGate, num_updates: int) -> ExportedGate:
    return ExportedGate({"select": "table"}, {"table": gate.table_V})


def _relu(gate: ReluGate, num_updates: int) -> ExportedGate:
    return ExportedGate({"select": "positive"})


def _stable(gate: StableGate, num_updates: int) -> ExportedGate:
    if not gate._is_frozen(num_updates):  # also builds the table if needed
        return ExportedGate(_top_k(1, "logits", scores="sigmoid"))
    return ExportedGate({"select": "table"}, {"table": gate.table_V})


def _switch(gate: SwitchGate, num_updates: int) -> ExportedGate:
    return ExportedGate(_top_k(1, "logits"))


def _top_any(gate: TopAnyGate, num_updates: int) -> ExportedGate:
    active_E = gate.active_E  # inactive experts are unreachable, and omitted
    scale = gate._scale(torch.float32)
    return ExportedGate(
        {"scorer": "cosine", "select": "top_any",
         "weights": "score" if gate.weighted_by_score else "uniform"},
        {"weight": gate.weight[active_E], "threshold": gate.threshold[active_E],
         "scale": torch.as_tensor(scale, dtype=gate.weight.dtype).reshape(1)})


def _top_k_gate(gate: TopKGate, num_updates: int) -> ExportedGate:
    scores = "sigmoid" if isinstance(gate.scorer, SigmoidScorer) else "softmax"
    routing = _top_k(gate.top_k, "scores", scores=scores, normalized=gate.renormalized)
    return ExportedGate({**routing, "bias": True}, {"bias_bits": gate.bias_C_bits})


def _top_p(gate: TopPGate, num_updates: int) -> ExportedGate:
    return ExportedGate({"select": "top_p", "top_p": gate.top_p, "top_k": gate.top_k,
                         "weights": gate.weights, "near_tie": NEAR_TIE})


_EXPORTERS: dict[type[Gate], Callable[[Any, int], ExportedGate]] = {
    BASELayersGate: _base, DenseGate: _dense, DenseToSparseGate: _dense_to_sparse,
    DSelectKGate: _dselect_k, ExpertChoiceGate: _expert_choice, GShardGate: _gshard,
    HashGate: _hash, ReluGate: _relu, StableGate: _stable, SwitchGate: _switch,
    TopAnyGate: _top_any, TopKGate: _top_k_gate, TopPGate: _top_p,
}
