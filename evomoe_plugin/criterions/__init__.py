"""Criterions: the language-model loss, plus what the MoE layers add and report."""

from evomoe_plugin.criterions import moe_cross_entropy  # noqa: F401
