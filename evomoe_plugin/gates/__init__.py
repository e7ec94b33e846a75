"""Gates: one a file, registered by name. A gate turns tokens into a `RoutingPlan`."""

from evomoe_plugin.gates import (  # noqa: F401 - importing registers them
    base_layers,
    dense,
    dense_to_sparse,
    dselect_k,
    expert_choice,
    gshard,
    hash,
    relu,
    stable,
    switch,
    top_any,
    top_k,
    top_p,
)
from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.gate import (
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
    "Capabilities", "Choice", "Gate", "GateContext", "LayerInfo", "ScorerOptions",
    "gate_class", "gate_names", "register_gate",
]
