"""`--moe-init-from-dense`: start a run with experts made from a dense model."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.dispatch.sharded_layers import expert_groups_of, is_expert_parameter
from evomoe_plugin.evolve.dense_checkpoint import read_dense
from evomoe_plugin.evolve.logit_difference import measure_logit_difference
from evomoe_plugin.evolve.parameters import edit_parameters
from evomoe_plugin.evolve.upcycle import Recipe, Upcycling
from evomoe_plugin.models.config import MoELanguageModelConfig
from evomoe_plugin.models.moe_model import MoEModel

logger = logging.getLogger(__name__)

# Further names that weights may have in a checkpoint.
_TIED = (
    "decoder.output_projection.weight",
    "decoder.embed_tokens.weight",
    "encoder.lm_head.weight",
)


def recipe_of(options: MoELanguageModelConfig) -> Recipe:
    """The recipe of a run's `--moe-init-…` options."""
    names = ("method", "rate", "rescale", "slices")
    given = {name: getattr(options, f"moe_init_{name}") for name in names}
    return Recipe(**given, gate_init=options.moe_init_gate, seed=options.seed, in_run=True)


def init_from_dense(trainer: Trainer) -> None:
    """Initialise the model from the dense checkpoint that its options name, if any.

    Called on every rank of a run without a checkpoint. Each rank reads the file. Sets what the
    optimizer updates; half-precision copies follow.

    Raises:
        OptionError: the file or folder is unreadable or does not fit the model.
    """
    model = trainer.get_model()
    ours: Any = next((m for m in model.modules() if isinstance(m, MoEModel)), None)
    path = None if ours is None else ours.options.moe_init_from_dense
    if path is None:
        return
    read = next(iter(ours.moe_stacks.values()))
    dense = read_dense("moe_init_from_dense", path, read.dictionary)
    upcycling = Upcycling(dense, ours.options, recipe_of(ours.options))
    trained = {
        name: shape
        for storage in trainer.layout.storages(trainer)
        for name, shape, *_ in storage.pieces()
        if not name.startswith("criterion.")
    }
    frozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not (parameter.requires_grad or trainer.layout.is_fully_sharded)
    }
    groups = expert_groups_of(model)
    shapes = {**trained, **{name: tuple(p.shape) for name, p in frozen.items()}}
    if groups is not None:
        for name, (rows, *others) in shapes.items():
            if is_expert_parameter(name):
                shapes[name] = (rows * groups.size, *others)
    buffers = [name for name, _ in ours.named_buffers()]
    upcycling.check_complete([*shapes, *buffers, *_TIED])
    # Each value is made when it is set: no second model is held in memory.
    edit_parameters(
        trainer,
        {name: functools.partial(_set, upcycling, name, shapes[name]) for name in trained},
    )
    for name, parameter in frozen.items():
        whole = upcycling.value(name, shapes[name])
        if whole is None:
            continue
        if groups is not None and is_expert_parameter(name):
            whole = whole[groups.own(len(whole))]
        parameter.data.copy_(whole)
    logits: object = (
        "logits not compared with the dense model's, since no rank holds the whole "
        "model: `evomoe upcycle` with the same options compares them"
    )
    if not trainer.layout.is_fully_sharded and groups is None:
        logits = measure_logit_difference(model, dense)
    logger.info("experts made from %s by %s; %s", path, upcycling.recipe.method, logits)


def _set(upcycling: Upcycling, name: str, shape: tuple[int, ...], value: Tensor) -> Tensor:
    wanted = upcycling.value(name, shape)
    if wanted is not None:
        value.copy_(wanted)
    return torch.zeros(1, dtype=torch.bool, device=value.device)  # there are no moments yet
