"""Convert a dense checkpoint to an MoE checkpoint that fairseq's commands load."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import os
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import models
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY, CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.models import (
    ARCH_CONFIG_REGISTRY,
    ARCH_MODEL_NAME_REGISTRY,
    MODEL_DATACLASS_REGISTRY,
)
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from evomoe_plugin.checkpoint.atomic_files import write_files
from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.initial_state import initial_checkpoint
from evomoe_plugin.checkpoint.output import check_output
from evomoe_plugin.checkpoint.reading import plain_config
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import NO_LAYERS
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.data.dictionary import load_dictionary
from evomoe_plugin.evolve.dense_checkpoint import (
    DEFAULT_ARCHS,
    ENCODER_FAMILIES,
    ENCODER_SIZES,
    SIZES,
    DenseCheckpoint,
    read_dense,
)
from evomoe_plugin.evolve.initial_values import (
    build_without_memory,
    initial_experts,
    initial_gates,
)
from evomoe_plugin.evolve.logit_difference import (
    LogitDifference,
    measure_logit_difference,
    streamed,
)
from evomoe_plugin.evolve.upcycle import Recipe, Upcycling, check_family, check_structure
from evomoe_plugin.models.language_model import MoELanguageModel

# Options that may differ from the dense run's without changing what the model computes.
_FREE = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "relu_dropout",
    "decoder_layerdrop",
    "checkpoint_activations",
    "offload_activations",
    "min_params_to_wrap",
)


# With gate losses, by the dense run's.
_CRITERIONS = {
    "masked_lm": "moe_masked_lm",
    "label_smoothed_cross_entropy": "moe_label_smoothed_cross_entropy",
}


@dataclass(frozen=True)
class Converted:
    """A finished conversion, not yet written."""

    state: dict[str, Any]
    """fairseq's checkpoint."""
    upcycling: Upcycling
    logits: LogitDifference


def convert(
    path: str,
    given: Mapping[str, Any],
    recipe: Recipe,
    *,
    arch: str | None = None,
    data: str | None = None,
    max_update: int | None = None,
    user_dir: str | None = None,
) -> Converted:
    """Make an MoE model from a dense one.

    Args:
        path: the dense checkpoint, or a folder of Hugging Face.
        given: model options that override the dense model's and the defaults.
        recipe: how experts and gates are initialised.
        arch: an MoE architecture, ours or a user's; sizes are the dense model's. None: the one of
            `DEFAULT_ARCHS` of its family.
        data: the folder with the dictionary; gates that look at token ids need it.
        max_update: of the run to come; schedules are fractions of it.
        user_dir: the package that registered the user's gate or architecture, for the checkpoint's
            configuration; None: ours.
    Raises:
        OptionError: unreadable or unfit input, or options that cannot work.
    """
    known = None if data is None else _data_dictionary(data)
    dense = read_dense("DENSE", path, known)
    if dense.family in ENCODER_FAMILIES:
        known = None  # their tasks add token ids to the dictionary
    if arch is None:
        arch = DEFAULT_ARCHS[dense.family]
    options = _model_options(dense, given, recipe, arch, max_update)
    dictionary = _dictionary(dense, options, data, known)
    target = dense.target_dictionary if dense.family == "translation" else dictionary
    task = types.SimpleNamespace(source_dictionary=dictionary, target_dictionary=target)
    with report_config_faults("DENSE", path), torch.random.fork_rng(devices=[]):
        if dense.keeps_dtype:
            model = build_without_memory(options, dictionary)
        else:
            torch.manual_seed(recipe.seed)
            model = models.build_model(OmegaConf.create(options), task)
            options |= {name: model.options[name] for name in dense.model}
        cfg = _run_config(dense.cfg, options, recipe.seed, data, max_update, user_dir)
    upcycling = Upcycling(dense, types.SimpleNamespace(**options), recipe)
    weights = _weights(model, upcycling)
    criterion = CRITERION_REGISTRY[cfg["criterion"]["_name"]].__name__
    state = initial_checkpoint(cfg, weights, criterion=criterion)
    with streamed(model, weights) if dense.keeps_dtype else contextlib.nullcontext():
        return Converted(state, upcycling, measure_logit_difference(model, dense))


def write(state: dict[str, Any], path: str, overwrite: bool = False) -> None:
    """Write a checkpoint atomically.

    Raises:
        OptionError: the file exists already, or its folder does not.
        RunFailed: it cannot be written.
    """
    check_output("MOE", path, overwrite=overwrite)
    write_files({path: lambda file: torch.save(state, file)})


def _model_options(
    dense: DenseCheckpoint,
    given: Mapping[str, Any],
    recipe: Recipe,
    arch: str,
    max_update: int | None,
) -> dict[str, Any]:
    """Every option of the MoE model: given ones before the dense model's before the architecture's.

    Raises:
        OptionError: a given option contradicts the dense model.
    """
    options = _arch_options(dense, arch, given)
    options.update(dense.model, moe_post_norm=dense.post_norm)
    options.update(given, _name=arch, seed=recipe.seed, max_update=max_update)
    decided = [name for name in given if name in dense.model and name not in _FREE]
    check_structure(dense, types.SimpleNamespace(**options), decided)
    return options


def _arch_options(dense: DenseCheckpoint, arch: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """An architecture's options: its dataclass's defaults and what its registered function sets.

    Raises:
        OptionError: no such MoE architecture, or one of other sizes.
    """
    kind = _dataclass_of(arch)
    if kind is None:
        known = sorted(name for name in ARCH_MODEL_NAME_REGISTRY if _dataclass_of(name))
        raise OptionError("arch", arch, f"one of: {', '.join(known)}; --user-dir brings your own")
    check_family(dense, arch, kind)
    options = {}
    for field in dataclasses.fields(kind):
        default = getattr(kind, field.name, None)
        options[field.name] = getattr(default, "value", default)
    args = argparse.Namespace(**given)
    ARCH_CONFIG_REGISTRY[arch](args)
    chosen = {name: value for name, value in vars(args).items() if name not in given}
    options.update(chosen)
    # Sizes of the default architectures' dataclasses are fairseq's defaults, not a choice.
    sizes = chosen if kind in map(_dataclass_of, DEFAULT_ARCHS.values()) else options
    for name in (*SIZES, *ENCODER_SIZES):
        if name in sizes and name in dense.model and sizes[name] != dense.model[name]:
            raise OptionError(
                "arch",
                arch,
                f"has {name} {sizes[name]}, the dense checkpoint {dense.path} "
                f"{dense.model[name]}: leave it out, sizes are the dense model's",
            )
    return options


def _dataclass_of(arch: str) -> type[MoEOptions] | None:
    """None: no MoE architecture."""
    kind = MODEL_DATACLASS_REGISTRY.get(ARCH_MODEL_NAME_REGISTRY.get(arch))
    is_ours = isinstance(kind, type) and issubclass(kind, MoEOptions)
    return kind if is_ours and kind.moe_layers != NO_LAYERS else None


def _data_dictionary(data: str) -> Dictionary | None:
    path = os.path.join(data, "dict.txt")
    if glob.glob(os.path.join(data, "dict.*.txt")) and not os.path.isfile(path):
        return None  # of a translation model
    if not os.path.isfile(path):
        raise OptionError(
            "data",
            data,
            "has no dict.txt; give a folder made by `evomoe prepare` or fairseq-preprocess",
        )
    return load_dictionary("data", path)


def _dictionary(
    dense: DenseCheckpoint, options: Mapping[str, Any], data: str | None, known: Dictionary | None
) -> Dictionary:
    """The data's; without data a placeholder of that many rows."""
    if known is not None:
        fits = len(known) == dense.vocabulary
        if not (fits or (dense.keeps_dtype and len(known) > dense.vocabulary)):
            raise OptionError(
                "data",
                data,
                f"its dict.txt has {len(known)} tokens, the dense checkpoint "
                f"was trained with {dense.vocabulary}: give its data",
            )
        return known
    if options["moe_gate"] == "hash" and options["moe_hash"] != "random":
        raise OptionError(
            "moe_hash",
            options["moe_hash"],
            "needs the token counts of the data's dictionary: give --data (or, of an encoder, "
            "--moe-init-from-dense in the run), or --moe-hash random",
        )
    return dense.dictionary


def _weights(model: MoELanguageModel, upcycling: Upcycling) -> dict[str, Tensor]:
    """The MoE model's state dict: its own tensors, with their initial values. Of a model without
    memory they are made one by one, and it stays without."""
    options, recipe = upcycling.options, upcycling.recipe
    weights = dict(model.state_dict())
    upcycling.check_complete(weights)
    if next(model.parameters()).is_meta:
        gates = initial_gates(model, options, recipe.seed)
        weights |= {name: value for name, value in gates if name in weights}
    values: dict[torch.nn.Parameter, Tensor | None] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter not in values:
            value = upcycling.value(name, parameter.shape)
            if value is None and weights[name].is_meta:
                value = initial_experts(model, name, recipe.seed).to(upcycling.dense.dtype)
            values[parameter] = value
        value = values[parameter]
        if value is None:
            continue
        if parameter.is_meta:
            weights[name] = value.contiguous()
        else:
            parameter.data.copy_(value)
            values[parameter] = None
    return weights


def _run_config(
    cfg: DictConfig,
    model: Mapping[str, Any],
    seed: int,
    data: str | None,
    max_update: int | None,
    user_dir: str | None,
) -> dict[str, Any]:
    """The dense run's configuration, with the new model and the criterion that goes with it."""
    run = plain_config(cfg)
    run["model"] = dict(model)
    name = _CRITERIONS.get(str(run["criterion"].get("_name")), "moe_cross_entropy")
    kept = {"sentence_avg": run["optimization"].get("sentence_avg", False), "tpu": False}
    fields = dataclasses.asdict(CRITERION_DATACLASS_REGISTRY[name]())
    kept |= {key: value for key, value in run["criterion"].items() if name in _CRITERIONS.values()}
    run["criterion"] = {
        key: kept.get(key, value) for key, value in fields.items() if key != "_name"
    } | {"_name": name}
    run["common"].update(seed=seed, user_dir=user_dir or "evomoe_plugin")
    if max_update is not None:
        run["optimization"]["max_update"] = max_update
    if data is not None:
        run["task"]["data"] = data
    return run
