"""Add fields to fairseq's option dataclasses, for the command line and for Hydra."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from fairseq.dataclass.configs import (
    CheckpointConfig,
    DistributedTrainingConfig,
    EvalLMConfig,
    FairseqConfig,
)
from fairseq.dataclass.constants import ChoiceEnum
from fairseq.models import MODEL_DATACLASS_REGISTRY
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import OmegaConf

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def add_field(
    options: type[DataclassInstance], name: str, kind: Any, default: Any, help: str
) -> None:
    """Add a field to the dataclass `options`, unless it has it.

    Parsers made afterwards have the flag, and Hydra configurations composed afterwards the
    field, if `options` is one of the groups of `FairseqConfig` or of a registered model, after a
    call of `store_schemas`. Do this before either is made.

    Args:
        kind: a type that fairseq can parse: bool, int, float, str, or Optional of one.
    """
    if name in options.__dataclass_fields__:
        return
    extra: Any = dataclasses.make_dataclass(
        "Extra", [(name, kind, dataclasses.field(default=default, metadata={"help": help}))]
    )
    # The generated __init__ does not take the new field; a class attribute gives it its default.
    options.__dataclass_fields__[name] = extra.__dataclass_fields__[name]
    options.__annotations__[name] = kind
    setattr(options, name, default)


def add_choice(options: type[DataclassInstance], name: str, choice: str) -> None:
    """Add a choice to a field whose type is a `ChoiceEnum` of fairseq, as `add_field` a field."""
    field = options.__dataclass_fields__[name]
    kind: Any = field.type
    if choice not in kind.__members__:
        field.type = options.__annotations__[name] = ChoiceEnum([*kind.__members__, choice])


def store_schemas(changed: Collection[type[DataclassInstance]]) -> None:
    """Store fairseq's Hydra schemas of these dataclasses again, with what has been added.

    A schema takes about 10 ms.
    """
    store = ConfigStore.instance()
    for arch, model_options in MODEL_DATACLASS_REGISTRY.items():
        if model_options in changed:
            node = model_options()
            node._name = arch
            store.store(name=arch, group="model", node=node, provider="fairseq")
    groups = {
        group: field.default
        for group, field in FairseqConfig.__dataclass_fields__.items()
        if any(field.default is options for options in changed)
    }
    if not groups:
        return
    # fairseq stores the whole as "config", and again under the name that --config-name gives.
    whole = [
        stored
        for stored, kept in store.repo.items()
        if isinstance(kept, ConfigNode) and OmegaConf.get_type(kept.node) is FairseqConfig
    ]
    for stored in whole:
        store.store(name=stored, node=FairseqConfig)
    for group, node in groups.items():
        store.store(name=group, node=node)


def add_fields() -> None:
    """Add `--symlink` to checkpoints, which the published command lines give: the EvoMoE authors'
    fork of fairseq has it; `--moe-expert-parallel-size` to fairseq-eval-lm, whose model and its
    options come from a checkpoint; and `--ddp-backend fsdp2`."""
    add_field(
        CheckpointConfig,
        "symlink",
        bool,
        default=False,
        help="make checkpoint_last.pt and checkpoint_best.pt relative links to the numbered "
        "file they equal, instead of copies",
    )
    add_field(
        EvalLMConfig,
        "moe_expert_parallel_size",
        int,
        default=1,
        help="number of ranks that the experts of each layer are sharded over; 1: every rank has "
        "all experts, however they were trained",
    )
    add_choice(DistributedTrainingConfig, "ddp_backend", "fsdp2")
    store_schemas([CheckpointConfig, EvalLMConfig, DistributedTrainingConfig])
