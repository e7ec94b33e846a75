"""`--moe-init-from-dense`: start a run with experts made from a dense model."""

from __future__ import annotations

import functools
import logging

import torch
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint.parameter_storage import storages
from evomoe_plugin.dispatch.sharded_layers import expert_groups_of, is_expert_parameter
from evomoe_plugin.evolve.dense_checkpoint import read_dense
from evomoe_plugin.evolve.logit_difference import measure_logit_difference
from evomoe_plugin.evolve.parameters import edit_parameters
from evomoe_plugin.evolve.upcycle import Recipe, Upcycling
from evomoe_plugin.models.config import MoELanguageModelConfig
from evomoe_plugin.models.decoder import MoEDecoder

logger = logging.getLogger(__name__)


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
        OptionError: the file is unreadable or does not fit the model.
    """
    model = trainer.get_model()
    decoder = next((m for m in model.modules() if isinstance(m, MoEDecoder)), None)
    if decoder is None or decoder.args.moe_init_from_dense is None:
        return
    path = decoder.args.moe_init_from_dense
    dense = read_dense("moe_init_from_dense", path, decoder.dictionary)
    upcycling = Upcycling(dense, decoder.args, recipe_of(decoder.args))
    trained = {
        name: shape
        for storage in storages(trainer)
        for name, shape, *_ in storage.pieces()
        if not name.startswith("criterion.")
    }
    frozen = {
        name: parameter
        for name, parameter in model.named_parameters()
        if not (parameter.requires_grad or trainer.is_fsdp)
    }
    groups, values = expert_groups_of(model), {}
    # All values are computed before the first is set: an error changes nothing.
    for name, shape in (*trained.items(), *((name, p.shape) for name, p in frozen.items())):
        if groups is not None and is_expert_parameter(name):
            shape = (shape[0] * groups.size, *shape[1:])
        values[name] = upcycling.value(name, shape)
    buffers = [name for name, _ in decoder.named_buffers(prefix="decoder")]
    upcycling.check_complete([*values, *buffers, "decoder.output_projection.weight"])
    found = {name: whole for name, whole in values.items() if whole is not None}
    edit_parameters(
        trainer,
        {name: functools.partial(_set, whole) for name, whole in found.items() if name in trained},
    )
    for name in frozen.keys() & found.keys():
        whole = found[name]
        if groups is not None and is_expert_parameter(name):
            whole = whole[groups.own(len(whole))]
        frozen[name].data.copy_(whole)
    logits: object = (
        "logits not compared with the dense model's, since no rank holds the whole "
        "model: `evomoe upcycle` with the same options compares them"
    )
    if not trainer.is_fsdp and groups is None:
        logits = measure_logit_difference(model, dense)
    logger.info("experts made from %s by %s; %s", path, upcycling.recipe.method, logits)


def _set(wanted: Tensor, value: Tensor) -> Tensor:
    value.copy_(wanted)
    return torch.zeros(1, dtype=torch.bool, device=value.device)  # there are no moments yet
