"""DynMoE's adaptive process: remove and add experts by the recorded routing.

It runs between updates on what all ranks routed in the recorded ones (`gates.record`), so that
neither activation checkpointing nor the split of a batch into micro-batches and ranks matters.

Source: DynMoE (arXiv 2405.14297, Algorithm 1).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.evolve.init_methods import seed_of
from evomoe_plugin.evolve.parameters import Edit, edit_parameters
from evomoe_plugin.gates.top_any import TopAnyGate
from evomoe_plugin.models.moe_stack import MoEStack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """Of a layer's experts; a slot may be emptied and filled again."""

    removed: tuple[int, ...]
    added: int | None
    most_used: int
    """The expert that took the most tokens, which stays."""

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
    for stack in trainer.get_model().modules():
        if not isinstance(stack, MoEStack):
            continue
        for n, layer in enumerate(stack.moe_layers):
            gate = layer.gate
            if isinstance(gate, TopAnyGate) and gate.record.is_complete(
                layer.gate_updates(num_updates)
            ):
                _adapt_layer(trainer, stack.layer_name(n), gate, num_updates)


def _adapt_layer(trainer: Trainer, name: str, gate: TopAnyGate, num_updates: int) -> None:
    record = gate.record
    # On the CPU: a few small numbers, read one by one.
    routed_E, unrouted = record.routed_E.cpu(), int(record.unrouted)
    direction_D = torch.nn.functional.normalize(record.unrouted_sum_D, dim=0)
    if not direction_D.any():
        unrouted = 0  # no direction to initialise a new expert's gate with
    change = decide(gate.active_E.cpu(), routed_E, unrouted)
    record.clear()
    if not change.slots:
        return
    edit_parameters(trainer, _edits(trainer, name, gate, change, direction_D, num_updates))
    gate.active_E[list(change.removed)] = False
    if change.added is not None:
        gate.active_E[change.added] = True
    _log(name, gate, change, unrouted, num_updates)


def _edits(
    trainer: Trainer,
    name: str,
    gate: TopAnyGate,
    change: Change,
    direction_D: Tensor,
    num_updates: int,
) -> dict[str, Edit]:
    """Edits of the layer's parameters.

    Moments of every slot that changes are reset: in a filled one they are another expert's, in an
    emptied one they would move weights that should stay.
    """

    def edit(make: Callable[[Tensor], Tensor | float] | None = None) -> Edit:
        """Give an added expert what `make` makes of all experts' values."""

        def apply(value: Tensor) -> Tensor:
            if change.added is not None and make is not None:
                value[change.added] = make(value)
            reset = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
            reset[change.slots] = True
            return reset

        return apply

    def noisy_copy(key: int, value: Tensor) -> Tensor:
        source = value[change.most_used]
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(key))
        return source + gate.adapt_noise * source.std(correction=0) * noise.to(source)

    edits = {
        f"{name}.gate.weight": edit(lambda _: direction_D.float()),
        f"{name}.gate.threshold": edit(lambda _: 0.0),
    }
    trained = trainer.layout.optimizer_layout(trainer).names
    experts = [p for p in trained if p.startswith(f"{name}.experts.")]
    for i, parameter in enumerate(experts):
        key = seed_of(gate.info.seed, gate.info.layer_id, num_updates, i)
        is_copy = gate.adapt_source == "most_used"
        edits[parameter] = edit(functools.partial(noisy_copy, key) if is_copy else None)
    return edits


def _log(name: str, gate: TopAnyGate, change: Change, unrouted: int, num_updates: int) -> None:
    done = []
    if change.removed:
        experts = "expert" if len(change.removed) == 1 else "experts"
        numbers = ", ".join(map(str, change.removed))
        done.append(f"removed {experts} {numbers}, which no token reached")
    if change.added is not None:
        source = "its network as it was"
        if gate.adapt_source == "most_used":
            source = f"its network a copy of expert {change.most_used}'s"
        tokens = f"{unrouted} tokens that reached none"
        done.append(f"added expert {change.added} for {tokens}, {source}")
    done.append(f"{int(gate.active_E.sum())} of {gate.num_experts} experts now")
    logger.info("%s, update %d: %s", name, num_updates, "; ".join(done))
