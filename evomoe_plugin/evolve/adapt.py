"""DynMoE's adaptive process: remove and add experts by the recorded routing.

It runs between updates on what all ranks routed in the recorded ones (`gates.record`), so that
neither activation checkpointing nor the split of a batch into micro-batches and ranks matters.

Source: DynMoE (arXiv 2405.14297, Algorithm 1).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint.parameter_storage import model_layout
from evomoe_plugin.evolve.init_methods import seed_of
from evomoe_plugin.evolve.parameters import Edit, edit_parameters
from evomoe_plugin.gates.top_any import TopAnyGate
from evomoe_plugin.models.decoder import MoEDecoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Of a layer's experts; a slot may be emptied and filled again."""

    removed: tuple[int, ...]
    added: int | None
    most_used: int
    """The expert that took the most tokens, which stays."""

    def __bool__(self) -> bool:
        return bool(self.removed) or self.added is not None

    @property
    def slots(self) -> list[int]:
        """The slots that change."""
        return sorted({*self.removed, *(() if self.added is None else (self.added,))})


def decide(active_E: Tensor, routed_E: Tensor, unrouted: int) -> Change:
    """Remove the experts that no token reached, then add one if some tokens reached none.

    The expert that took the most tokens, the first of equals, always stays. Where nothing was
    routed at all, nothing changes.

    Args:
        active_E: bool.
        routed_E: tokens of each expert.
        unrouted: tokens without an expert.
    """
    most_used = int(routed_E.masked_fill(~active_E, -1).argmax())
    if not unrouted and not routed_E.any():
        return Change((), None, most_used)
    removed_E = active_E & (routed_E == 0)
    removed_E[most_used] = False
    free = (~active_E | removed_E).nonzero().flatten().tolist()
    added = free[0] if unrouted and free else None
    return Change(tuple(removed_E.nonzero().flatten().tolist()), added, most_used)


def adapt_experts(trainer: Trainer) -> None:
    """Adapt the layers whose record is complete; called after each update, on every rank."""
    num_updates = trainer.get_num_updates()
    for decoder in trainer.get_model().modules():
        if not isinstance(decoder, MoEDecoder):
            continue
        for n, layer in enumerate(decoder.moe_layers):
            gate = layer.gate
            if isinstance(gate, TopAnyGate) and gate.record.is_complete(
                    layer.gate_updates(num_updates)):
                _adapt_layer(trainer, decoder.layer_name(n), gate, num_updates)


def _adapt_layer(trainer: Trainer, name: str, gate: TopAnyGate, num_updates: int) -> None:
    record = gate.record
    # On the CPU: a few small numbers, read one by one.
    routed_E, unrouted = record.routed_E.cpu(), int(record.unrouted)
    direction_D = torch.nn.functional.normalize(record.unrouted_sum_D, dim=0)
    if not direction_D.any():
        unrouted = 0  # no direction to initialise a new expert's gate with
    change = decide(gate.active_E.cpu(), routed_E, unrouted)
    record.clear()
    if not change:
        return
    edit_parameters(trainer, _edits(trainer, name, gate, change, direction_D, num_updates))
    gate.active_E[list(change.removed)] = False
    if change.added is not None:
        gate.active_E[change.added] = True
    _log(name, gate, change, unrouted, num_updates)


def _edits(trainer: Trainer, name: str, gate: TopAnyGate, change: Change, direction_D: Tensor,
           num_updates: int) -> dict[str, Edit]:
    """Edits of the layer's parameters.

    Moments of every slot that changes are reset: in a filled one they are another expert's, in an
    emptied one they would move weights that should stay.
    """
    added, slots = change.added, change.slots

    def initialise(value: Tensor, row: Tensor | float) -> Tensor:
        if added is not None:
            value[added] = row
        return _rows(value, slots)

    def copy(key: int, value: Tensor) -> Tensor:
        if added is not None:
            source = value[change.most_used]
            generator = torch.Generator().manual_seed(key)
            noise = torch.randn(source.shape, generator=generator).to(source)
            value[added] = source + gate.adapt_noise * source.std(correction=0) * noise
        return _rows(value, slots)

    edits: dict[str, Edit] = {
        f"{name}.gate.weight": functools.partial(initialise, row=direction_D.float()),
        f"{name}.gate.threshold": functools.partial(initialise, row=0.0),
    }
    experts = [p for p in model_layout(trainer).names if p.startswith(f"{name}.experts.")]
    for i, parameter in enumerate(experts):
        key = seed_of(gate.info.seed, gate.info.layer_id, num_updates, i)
        copies = gate.adapt_source == "most_used"
        edits[parameter] = functools.partial(copy, key) if copies else (
            lambda value: _rows(value, slots))
    return edits


def _rows(value: Tensor, slots: Sequence[int]) -> Tensor:
    """bool, the elements of the experts `slots`."""
    mask = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
    mask[list(slots)] = True
    return mask


def _log(name: str, gate: TopAnyGate, change: Change, unrouted: int, num_updates: int) -> None:
    done = []
    if change.removed:
        numbers = ", ".join(map(str, change.removed))
        done.append(f"removed {_experts(change.removed)} {numbers}, which no token reached")
    if change.added is not None:
        source = "its network as it was"
        if gate.adapt_source == "most_used":
            source = f"its network a copy of expert {change.most_used}'s"
        done.append(f"added expert {change.added} for {unrouted} tokens that reached none, "
                    f"{source}")
    logger.info("%s, update %d: %s; %d of %d experts now", name, num_updates, "; ".join(done),
                int(gate.active_E.sum()), gate.num_experts)


def _experts(numbers: Sequence[int]) -> str:
    return "expert" if len(numbers) == 1 else "experts"
