"""EvoMoE's expert-diversify: spawn all experts of a layer from expert 0.

Dense phase: only expert 0 is trained; `MoELayer` sends every token to it, the others have gradients
of zero. At the spawn every expert, expert 0 included, is made from it: a whole one among masked
ones would soon be preferred by the gate.

Source: EvoMoE (arXiv 2112.14397). Code, rates and lengths of this phase are not published.
"""

from __future__ import annotations

import logging

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.config.rates import spawn_rate
from evomoe_plugin.evolve.init_methods import seed_of, spawn_tensor
from evomoe_plugin.evolve.parameters import Edit, edit_parameters
from evomoe_plugin.experts.ffn import frozen_name
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.moe_stack import MoEStack

logger = logging.getLogger(__name__)


def spawn_experts(trainer: Trainer) -> None:
    """Spawn the experts of all MoE layers if this is the update to do so.

    Called after each update on every rank, before its checkpoint is written.

    Moments (`--moe-spawn-moments`): `copy` gives each expert those of expert 0, and zeros where a
    weight was masked or drawn anew; `reset` gives zeros.
    """
    num_updates = trainer.get_num_updates()
    for stack in trainer.get_model().modules():
        if not (isinstance(stack, MoEStack) and stack.moe_layers):
            continue
        if stack.options.moe_spawn_updates == num_updates:
            _spawn(trainer, stack)
            _log(stack, num_updates)


def _spawn(trainer: Trainer, stack: MoEStack) -> None:
    options = stack.options
    edits = {}
    for n, layer in enumerate(stack.moe_layers):
        prefix = f"{stack.layer_name(n)}.experts."
        for parameter in trainer.layout.optimizer_layout(trainer).names:
            if parameter.startswith(prefix):
                edits[parameter] = _edit(parameter.removeprefix(prefix), layer, options)
    copies = options.moe_spawn_moments == "copy"
    edit_parameters(trainer, edits, dict.fromkeys(edits, _copy_first) if copies else None)


def _edit(name: str, layer: MoELayer, options: ModelOptions) -> Edit:
    """Spawn the experts' parameter `name`."""
    method, rescale = options.moe_spawn_method, options.moe_spawn_rescale
    rate, resets = spawn_rate(options), options.moe_spawn_moments == "reset"
    frozen = getattr(layer.experts, frozen_name(name), None)
    layer_id = layer.gate.info.layer_id
    held = range(layer.num_experts)[layer.held_experts]

    def edit(value: Tensor) -> Tensor:
        source = value[0].clone()
        reset = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        for e in range(value.size(0)):
            key = seed_of(options.seed, layer_id, e)
            value[e], kept = spawn_tensor(name, source, method, key=key, rate=rate, rescale=rescale)
            if frozen is not None and e in held:
                frozen[e - held.start] = ~kept
            if not resets:
                reset[e] = ~kept
        return reset

    return edit


def _copy_first(moment: Tensor) -> None:
    moment[1:] = moment[:1].clone()


def _log(stack: MoEStack, num_updates: int) -> None:
    options, layers = stack.options, stack.moe_layers
    method = [f"by {options.moe_spawn_method}"]
    if options.moe_spawn_method != "copy":
        method.append(f"rate {spawn_rate(options):g}")
    if options.moe_spawn_rescale:
        method.append("rescaled")
    if layers[0].experts.freezes:
        method.append("masked weights frozen")
    method.append("moments copied" if options.moe_spawn_moments == "copy" else "moments reset")
    counts = sorted({layer.num_experts for layer in layers})
    experts = " to ".join(map(str, (counts[0], counts[-1])[: len(counts)]))
    done = f"spawned {experts} experts in each of {len(layers)} MoE layers from expert 0"
    logger.info("update %d: %s (%s)", num_updates, done, ", ".join(method))
