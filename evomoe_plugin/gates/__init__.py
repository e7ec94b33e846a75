"""Gates: one a file, registered by name. A gate turns tokens into a `RoutingPlan`."""

import importlib
import pkgutil

from evomoe_plugin.gates.capabilities import Capabilities
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.gate import Gate
from evomoe_plugin.gates.registry import gate_class, gate_names, register_gate
from evomoe_plugin.gates.scorers import ScorerOptions
from evomoe_plugin.routing.choice import Choice

__all__ = [
    "Capabilities",
    "Choice",
    "Gate",
    "GateContext",
    "LayerInfo",
    "ScorerOptions",
    "gate_class",
    "gate_names",
    "register_gate",
]

for _module in pkgutil.iter_modules(__path__):  # importing a gate's module registers it
    importlib.import_module(f"{__name__}.{_module.name}")
