"""`--moe-init-from-dense`: start a run with experts made from a dense model."""

from __future__ import annotations

import logging

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint.optimizer_layout import fsdp_layout
from evomoe_plugin.dispatch.sharded_layers import expert_groups_of, is_expert_parameter
from evomoe_plugin.evolve.dense_checkpoint import read_dense_checkpoint
from evomoe_plugin.evolve.logit_difference import measure_logit_difference
from evomoe_plugin.evolve.parameters import Edit, edit_parameters
from evomoe_plugin.evolve.upcycle import Recipe, Upcycling
from evomoe_plugin.models.config import MoELanguageModelConfig
from evomoe_plugin.models.decoder import MoEDecoder

logger = logging.getLogger(__name__)


def recipe_of(options: MoELanguageModelConfig) -> Recipe:
    """The recipe of a run's `--moe-init-…` options."""
    return Recipe(
        method=options.moe_init_method,
        rate=options.moe_init_rate,
        rescale=options.moe_init_rescale,
        slices=options.moe_init_slices,
        gate_init=options.moe_init_gate,
        seed=options.seed,
        in_run=True,
    )


def init_from_dense(trainer: Trainer) -> None:
    """Initialise the model from the dense checkpoint that its options name, if any.

    Called on every rank of a run without a checkpoint. Each rank reads the file. Sets what the
    optimizer updates; half-precision copies follow.

    Raises:
        OptionError: the file is unreadable or does not fit the model.
    """
    model = trainer.get_model()
    decoder = next((m for m in model.modules() if isinstance(m, MoEDecoder)), None)
    if decoder is None or decoder.args.moe_init_from_dense is None:
        return
    path = decoder.args.moe_init_from_dense
    dense = read_dense_checkpoint("moe_init_from_dense", path)
    upcycling = Upcycling(dense, decoder.args, recipe_of(decoder.args))
    trained, frozen = _parameters(trainer)
    # All values are computed before the first is set: an error changes nothing.
    groups = expert_groups_of(model)

    def value(name: str, shape: torch.Size) -> Tensor | None:
        if groups is not None and is_expert_parameter(name):
            shape = torch.Size([shape[0] * groups.size, *shape[1:]])
        return upcycling.value(name, shape)

    values = {name: value(name, shape) for name, shape in trained.items()}
    values |= {name: value(name, p.shape) for name, p in frozen.items()}
    buffers = [name for name, _ in decoder.named_buffers(prefix="decoder")]
    upcycling.check_complete([*values, *buffers, "decoder.output_projection.weight"])
    edit_parameters(trainer, {name: _set(values[name]) for name in trained
                              if values[name] is not None})
    with torch.no_grad():
        for name, parameter in frozen.items():
            if values[name] is not None:
                whole = values[name]
                is_sharded = groups is not None and is_expert_parameter(name)
                parameter.copy_(whole[groups.own(len(whole))] if is_sharded else whole)
    if trainer.is_fsdp or groups is not None:
        logits = ("logits not compared with the dense model's, since no rank holds the whole "
                  "model: `evomoe upcycle` with the same options compares them")
    else:
        logits = str(measure_logit_difference(model, dense))
    logger.info("experts made from %s by %s; %s", path, upcycling.recipe.method, logits)


def _parameters(trainer: Trainer) -> tuple[dict[str, torch.Size], dict[str, torch.nn.Parameter]]:
    """Shapes of what `edit_parameters` can edit, and the frozen parameters, which it cannot."""
    if trainer.is_fsdp:
        layout = fsdp_layout({"fsdp_metadata": trainer.model.local_metadata_dict()})
        return dict(zip(layout.names, layout.shapes, strict=True)), {}
    named = dict(trainer.get_model().named_parameters())
    return ({name: p.shape for name, p in named.items() if p.requires_grad},
            {name: p for name, p in named.items() if not p.requires_grad})


def _set(wanted: Tensor) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value.copy_(wanted)
        return torch.zeros(1, dtype=torch.bool, device=value.device)  # there are no moments yet

    return edit
