"""Gates: one a file, registered by name. A gate turns tokens into a `RoutingPlan`."""

from evomoe_plugin.gates.base import Gate, gate_class, gate_names, register_gate
from evomoe_plugin.gates.dense_to_sparse import DenseToSparseGate

__all__ = ["DenseToSparseGate", "Gate", "gate_class", "gate_names", "register_gate"]
