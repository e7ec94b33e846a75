"""EvoMoE's expert-diversify: one expert, trained alone, becomes all experts of its layer.

Until the spawn `MoELayer` sends every token to expert 0. Then each expert, the first included, is
made from that one: no expert begins with more than the others, which a gate would soon prefer.

Source: EvoMoE (arXiv 2112.14397). Of this phase no code is published, nor its rates and lengths.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.checkpoint.optimizer_layout import model_layout
from evomoe_plugin.config.options import spawn_rate
from evomoe_plugin.evolve.init_methods import seed_of, spawn_tensor
from evomoe_plugin.evolve.parameters import Edit, edit_parameters
from evomoe_plugin.experts.ffn import frozen_name
from evomoe_plugin.layer import MoELayer
from evomoe_plugin.models.decoder import MoEDecoder

logger = logging.getLogger(__name__)


def spawn_experts(trainer: Any) -> None:
    """Spawn the experts of all MoE layers if this is the update to do so.

    Called after each update, on every rank, before a checkpoint of it is written: one of the
    spawn's update holds the experts, one of an update before leads to the same.

    Moments (`--moe-spawn-moments`): `copy` gives each expert those of the one it was made from,
    and zeros where a weight was masked or drawn afresh; `reset` gives zeros.
    """
    num_updates = trainer.get_num_updates()
    for decoder in trainer.get_model().modules():
        if isinstance(decoder, MoEDecoder) and decoder.args.moe_spawn_updates == num_updates:
            _spawn(trainer, decoder)
            _log(decoder, num_updates)


def _spawn(trainer: Any, decoder: MoEDecoder) -> None:
    options = decoder.args
    edits, moment_edits = {}, {}
    known = model_layout(trainer).names
    for n, layer in enumerate(decoder.moe_layers):
        prefix = f"{decoder.layer_name(n)}.experts."
        for parameter in known:
            if not parameter.startswith(prefix):
                continue
            name = parameter.removeprefix(prefix)
            edits[parameter] = _edit(name, layer, options)
            if options.moe_spawn_moments == "copy":
                moment_edits[parameter] = _as_the_first
    edit_parameters(trainer, edits, moment_edits)


def _edit(name: str, layer: MoELayer, options: Any) -> Edit:
    """Spawns the experts' parameter `name`."""
    spawn = functools.partial(
        spawn_tensor, name, method=options.moe_spawn_method, rate=spawn_rate(options),
        rescale=options.moe_spawn_rescale)
    resets = options.moe_spawn_moments == "reset"
    frozen = getattr(layer.experts, frozen_name(name), None)
    layer_id = layer.gate.info.layer_id
    held = range(layer.num_experts)[layer.held_experts]

    def edit(value: Tensor) -> Tensor:
        source = value[0].clone()
        reset = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        for e in range(value.size(0)):
            value[e], kept = spawn(source, key=seed_of(options.seed, layer_id, e))
            if frozen is not None and e in held:
                frozen[e - held.start] = ~kept
            if not resets:
                reset[e] = ~kept
        return reset

    return edit


def _as_the_first(moment: Tensor) -> None:
    moment[1:] = moment[:1].clone()


def _log(decoder: MoEDecoder, num_updates: int) -> None:
    options, layers = decoder.args, decoder.moe_layers
    how = [f"by {options.moe_spawn_method}"]
    if options.moe_spawn_method != "copy":
        how.append(f"rate {spawn_rate(options):g}")
    if options.moe_spawn_rescale:
        how.append("rescaled")
    if layers[0].experts.freezes:
        how.append("masked weights frozen")
    how.append("moments copied" if options.moe_spawn_moments == "copy" else "moments reset")
    counts = [layer.num_experts for layer in layers]
    least, most = min(counts), max(counts)
    logger.info("update %d: spawned %s experts in each of %d MoE layers from the one that worked "
                "(%s)", num_updates, least if least == most else f"{least} to {most}",
                len(layers), ", ".join(how))
