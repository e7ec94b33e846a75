"""Expert networks: stacks of them, the grouped kernels, and the loop oracle."""

from evomoe_plugin.experts.ffn import ExpertFFN, ExpertStack
from evomoe_plugin.experts.shared import SharedExperts

__all__ = ["ExpertFFN", "ExpertStack", "SharedExperts"]
