"""Expert networks: stacks of them, the grouped kernels, and the loop oracle."""

from evomoe_plugin.experts.ffn import ExpertFFN as ExpertFFN
from evomoe_plugin.experts.ffn import ExpertStack as ExpertStack
from evomoe_plugin.experts.shared import SharedExperts as SharedExperts
