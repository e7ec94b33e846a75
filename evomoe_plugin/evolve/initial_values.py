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
from evomoe_plugin.evolve.init_methods import seed_of
from evomoe_plugin.experts import ExpertStack
from evomoe_plugin.gates import gate_class
from evomoe_plugin.models.language_model import MoELanguageModel

_STREAM = 0xE0  # separates these random numbers from others of the seed


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


def initial_experts(model: MoELanguageModel, name: str, seed: int) -> Tensor:
    """The initial value of a parameter of experts, fp32, within the bounds of `ExpertStack`.

    Args:
        model: from `build_without_memory`.
        name: of the parameter.
        seed: of this and the other random numbers of the conversion.
    """
    stack = model.get_submodule(name.rpartition(".")[0])
    assert isinstance(stack, ExpertStack), f"{name} has no initial value"
    part = name.rpartition(".")[2]
    generator = torch.Generator().manual_seed(seed_of(seed, _STREAM, *name.encode()))
    _, F, D = stack.fc1_weight.shape
    bound = (F if part.startswith("fc2") else D) ** -0.5
    return torch.empty(stack.get_parameter(part).shape).uniform_(-bound, bound, generator=generator)
