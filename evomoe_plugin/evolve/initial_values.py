"""Initial values of a model that was built without memory for its weights."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates import gate_class
from evomoe_plugin.models.language_model import MoELanguageModel


def build_without_memory(options: Any, dictionary: Dictionary) -> MoELanguageModel:
    """The model, on torch's meta device."""
    task = types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    with torch.device("meta"):
        return models.build_model(OmegaConf.create(options), task)


def initial_gates(
    model: MoELanguageModel, options: ModelOptions, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Names and initial values of the gates' parameters and buffers, and of the other buffers of
    MoE layers, which start at 0.

    Args:
        model: from `build_without_memory`.
        options: its options, resolved.
        seed: of torch's generator, which is left as it was.
    """
    yield "decoder.version", torch.tensor([3.0])  # fairseq's format of attention weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for n, layer in enumerate(model.decoder.moe_layers):
            name = model.decoder.layer_name(n)
            for key, buffer in layer.named_buffers():
                if not key.startswith("gate."):
                    yield f"{name}.{key}", torch.zeros(buffer.shape, dtype=buffer.dtype)
            gate = gate_class(options.moe_gate)(layer.gate.info, options)
            for key, value in gate.state_dict().items():
                yield f"{name}.gate.{key}", value
