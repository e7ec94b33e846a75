"""Kernels of the grouped FFN, for CPUs and GPUs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from evomoe_plugin.experts.activations import Activation


@dataclass(frozen=True)
class Call:
    """Arguments of the grouped FFN other than tensors and row counts."""

    num_rows: int
    """N."""
    activation: Activation
    dropout: float
    """Probability that a hidden value is dropped."""
    grad_scale: float
    """Factor of the gradients of weights and biases."""
    dtype: torch.dtype
    """Dtype of rows and matmuls."""
    keeps: bool
    """Whether a backward pass may follow."""
