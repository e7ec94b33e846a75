"""Criterions: the loss of each task, plus auxiliary losses and statistics of MoE layers."""

from evomoe_plugin.criterions import (  # noqa: F401
    moe_cross_entropy,
    moe_label_smoothed_cross_entropy,
    moe_masked_lm,
    moe_sentence_prediction,
)
