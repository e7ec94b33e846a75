"""Expert networks over rows sorted by expert: the grouped kernel and its loop oracle."""

from evomoe_plugin.experts.ffn import ExpertFFN
from evomoe_plugin.experts.shared import SharedExperts

__all__ = ["ExpertFFN", "SharedExperts"]
