"""Criterions: the language-model loss, plus auxiliary losses and statistics of MoE layers."""

from evomoe_plugin.criterions import moe_cross_entropy  # noqa: F401
