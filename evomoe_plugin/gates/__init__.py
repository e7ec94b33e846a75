"""Gates: one a file, registered by name. A gate turns tokens into a `RoutingPlan`."""

from evomoe_plugin.gates import dense_to_sparse, top_k  # noqa: F401
from evomoe_plugin.gates.base import (
    Gate,
    GateContext,
    LayerInfo,
    gate_class,
    gate_names,
    register_gate,
)
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.routing.choice import Choice

__all__ = [
    "Choice", "Gate", "GateContext", "LayerInfo", "ScorerOptions", "gate_class", "gate_names",
    "register_gate",
]
