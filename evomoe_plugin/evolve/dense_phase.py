"""Until the spawn a step is one of the first expert alone: those that wait take no part in it.

Between steps all is as ever: parameters, moments and buffers have a row for each expert, and
checkpoints, the spawn and restarts see nothing else. For the time of a step the first rows stand in
their place, so that gradients, their norm, what processes exchange and what the optimizer goes over
are those of the dense model.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.checkpoint.parameter_storage import Storage, storages
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.decoder import MoEDecoder

# Optimizers whose state is numbers for single elements; of a mean over rows no first row is that
# of the first expert.
ELEMENTWISE = ("adadelta", "adagrad", "adam", "adamax", "fused_adamw", "nag", "sgd")


@contextlib.contextmanager
def first_expert_alone(trainer: Any) -> Iterator[None]:
    """Inside, layers that are not spawned have a first expert only; nothing else changes.

    Under FSDP, where experts are divided over processes, and with an optimizer that is not in
    `ELEMENTWISE`, nothing changes at all: gradients and optimizer steps stay those of all experts.

    Args:
        trainer: fairseq's, between updates.
    """
    layers = [layer for layer in _layers(trainer) if layer.is_single and layer.num_experts > 1]
    if not layers or not can_step_alone(trainer):
        _wrap_anew(trainer, first_rows=False)
        yield
        return
    rows = _FirstRows(trainer, layers)
    try:
        rows.take()
        _wrap_anew(trainer, first_rows=True)
        yield
    finally:
        rows.give_back()


def can_step_alone(trainer: Any) -> bool:
    """Whether the first expert's parameters and moments can be told from those of the others."""
    return (
        not trainer.is_fsdp
        and trainer.cfg.optimizer._name in ELEMENTWISE
        and all(layer.groups is None for layer in _layers(trainer))
    )


def _layers(trainer: Any) -> list[MoELayer]:
    return [layer for decoder in trainer.get_model().modules() if isinstance(decoder, MoEDecoder)
            for layer in decoder.moe_layers]


def _wrap_anew(trainer: Any, first_rows: bool) -> None:
    """torch's DDP knows shapes, and has to be told of others."""
    if getattr(trainer, "wraps_first_rows", False) == first_rows:
        return
    trainer.wraps_first_rows = first_rows
    trainer._wrapped_model = None
    gc.collect()  # a wrapper that is not gone keeps its hooks on the parameters


class _FirstRows:
    """Parameters, buffers and moments of which the first expert's part stands for the whole."""

    def __init__(self, trainer: Any, layers: list[MoELayer]):
        self.layers = layers
        self.state = trainer.optimizer.optimizer.state
        stacks = [p for layer in layers for p in layer.experts.parameters()]
        self.parts = [_Part(tensor) for tensor in (*stacks, *_frozen(layers))]
        known = {id(p) for p in stacks}
        for storage in storages(trainer):
            if any(id(copy) in known for copy in storage.copies):
                self.parts.append(_master(storage, known))

    def take(self) -> None:
        for part in self.parts:
            part.take(self.state.get(part.tensor, {}))
        for layer in self.layers:
            layer.first_alone = True

    @torch.no_grad()
    def give_back(self) -> None:
        for layer in self.layers:
            layer.first_alone = False
        for part in self.parts:
            part.give_back(self.state.get(part.tensor, {}))


def _frozen(layers: list[MoELayer]) -> list[Tensor]:
    """What says which weights are held, beside the weights."""
    return [b for layer in layers for b in layer.experts.buffers()
            if b.dim() and b.size(0) == layer.num_experts]


def _master(storage: Storage, stacks: set[int]) -> _Part:
    """Of a stack, or of all parameters end to end."""
    if storage.owner.shape == storage.copies[0].shape:
        return _Part(storage.owner)
    spans = [(begin, begin + (end - begin) // (shape[0] if id(copy) in stacks else 1))
             for copy, (_, shape, begin, end) in zip(
                 storage.copies, storage.pieces(), strict=True)]
    return _FlatPart(storage.owner, spans)


class _Part:
    """A tensor [E, ...], and its first row [1, ...]."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.whole: Tensor | None = None
        self.moments: dict[str, Tensor] = {}

    def take(self, state: dict[str, Any]) -> None:
        self.whole = self.tensor.data
        self.moments = _of_shape(self.whole.shape, state)
        self.tensor.data = self.first(self.whole)
        self.tensor.grad = None  # of the whole: a smaller one would be copied to all its rows
        state.update({key: self.first(value) for key, value in self.moments.items()})

    def give_back(self, state: dict[str, Any]) -> None:
        if self.whole is None:  # it was not taken
            return
        # What the first step made is part of no whole yet.
        for key, value in _of_shape(self.tensor.shape, state).items():
            moment = self.moments.get(key)
            if moment is None:
                moment = value.new_zeros(self.whole.shape)
            state[key] = self.with_first(moment, value)
        self.tensor.data = self.with_first(self.whole, self.tensor.data)
        self.tensor.grad = None
        self.whole = None

    def first(self, whole: Tensor) -> Tensor:
        return whole[:1]

    def with_first(self, whole: Tensor, first: Tensor) -> Tensor:
        if first.data_ptr() != whole.data_ptr():  # optimizers may make tensors anew
            whole[:1] = first
        return whole


class _FlatPart(_Part):
    """Parameters end to end, and what is left of them without the experts that wait.

    Args:
        tensor: the whole.
        spans: begin and end of what is left of each parameter.
    """

    def __init__(self, tensor: Tensor, spans: list[tuple[int, int]]):
        super().__init__(tensor)
        self.spans: list[list[int]] = []
        for begin, end in spans:
            if self.spans and self.spans[-1][1] == begin:
                self.spans[-1][1] = end
            else:
                self.spans.append([begin, end])
        self.grad = tensor.grad

    def take(self, state: dict[str, Any]) -> None:
        super().take(state)
        self.tensor.grad = torch.zeros_like(self.tensor)  # it is filled, and never None

    def give_back(self, state: dict[str, Any]) -> None:
        super().give_back(state)
        self.tensor.grad = self.grad

    def first(self, whole: Tensor) -> Tensor:
        return torch.cat([whole[begin:end] for begin, end in self.spans])

    def with_first(self, whole: Tensor, first: Tensor) -> Tensor:
        sizes = [end - begin for begin, end in self.spans]
        for (begin, end), part in zip(self.spans, first.split(sizes), strict=True):
            whole[begin:end] = part
        return whole


def _of_shape(shape: torch.Size, state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items()
            if torch.is_tensor(value) and value.shape == shape}
