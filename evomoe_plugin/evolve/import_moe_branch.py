"""Convert checkpoints of fairseq's moe branch, one file a rank, to one checkpoint to train on.

X-shared.pt holds all weights but the experts', X-rank-r.pt those of rank r: expert j of its L is
expert r L + j of the layer, decoder.layers.N.moe_layer.experts.j.fc1 and fc2; its gate is
moe_layer.gate.wg (fairseq's moe_checkpoint_utils.py and modules/moe/moe_layer.py).
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
from typing import Any

import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from torch import Tensor

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.initial_state import initial_checkpoint
from evomoe_plugin.checkpoint.reading import plain_config, read_checkpoint
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.moe_layers import moe_layer_indices
from evomoe_plugin.config.options import UNSUPPORTED
from evomoe_plugin.evolve.dense_checkpoint import transformer_options
from evomoe_plugin.evolve.import_hf import placeholder_dictionary
from evomoe_plugin.evolve.initial_values import build_without_memory, initial_gates
from evomoe_plugin.models.config import MoELanguageModelConfig

_SHARED = "-shared.pt"
_GATE = re.compile(r"(decoder\.layers\.\d+)\.moe_layer\.gate\.wg\.weight$")
_EXPERT = re.compile(
    r"(decoder\.layers\.\d+)\.moe_layer\.experts\.(\d+)\.(fc1|fc2)\.(weight|bias)$"
)
# Options of the branch and of EvoMoE's fork that change what a model computes.
_NO_COUNTERPART = (
    "use_xmoe",
    "use_stable_embedding",
    "alternate_decoder_ffn_embed_dim",
    "moe_topk_expert",
)


def import_moe_branch(option: str, path: str) -> dict[str, Any]:
    """The checkpoint, in the dtype of the files and without optimizer state.

    Files are read one at a time. Capacities are left out: none is dropped in evaluation.

    Args:
        option: what the user named the file with, for messages.
        path: X-shared.pt, beside X-rank-0.pt and the others.
    Raises:
        OptionError: a file is missing or unreadable, or the model cannot be expressed.
    """
    if not path.endswith(_SHARED):
        raise OptionError(option, path, f"give the file of the other weights, X{_SHARED}")
    shared = read_checkpoint(option, path)
    ranks = _rank_files(option, path)
    weights = {_ours(name): value for name, value in shared["model"].items()}
    with report_config_faults(option, path):
        options = _options(option, path, shared["cfg"], weights)
    experts = _experts(option, ranks)
    by_layer = {name.rpartition(".moe.")[0]: v for name, v in experts.items()}
    counts = {len(value) for value in by_layer.values()}
    resolved: Any = types.SimpleNamespace(**options)
    layers = moe_layer_indices(resolved, options["decoder_layers"])
    if by_layer.keys() != {f"decoder.layers.{n}" for n in layers}:
        raise OptionError(option, path, f"its experts are not in the layers {layers}")
    if counts != {int(options["moe_expert_count"])}:
        raise OptionError(
            option,
            path,
            f"has {options['moe_expert_count']} experts in each layer, the {len(ranks)} files of "
            f"ranks beside it {', '.join(map(str, sorted(counts)))}: give all files",
        )
    first = experts[f"decoder.layers.{layers[0]}.moe.experts.fc1_weight"]
    options["moe_expert_ffn_dim"] = first.size(1)
    table = weights["decoder.embed_tokens.weight"]
    with report_config_faults(option, path):
        model = build_without_memory(options, placeholder_dictionary(len(table)))
    weights |= experts
    weights = {**dict(initial_gates(model, resolved, seed=1)), **weights}
    made: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name not in weights or weights[name].shape != value.shape:
            raise OptionError(option, path, f"its weights have no {name} of {tuple(value.shape)}")
        made[name] = weights.pop(name)
    if weights:
        raise OptionError(option, path, f"its weights have {min(weights)}, which has no place here")
    cfg = plain_config(shared["cfg"])
    cfg["model"] = options
    criterion = dataclasses.asdict(CRITERION_DATACLASS_REGISTRY["moe_cross_entropy"]())
    cfg["criterion"] = {**criterion, "_name": "moe_cross_entropy", "sentence_avg": False}
    cfg["common"]["user_dir"] = "evomoe_plugin"
    return initial_checkpoint(cfg, made, criterion="MoECrossEntropyCriterion")


def _rank_files(option: str, path: str) -> list[str]:
    """In the order of ranks."""
    files: list[str] = []
    while os.path.isfile(name := f"{path.removesuffix(_SHARED)}-rank-{len(files)}.pt"):
        files.append(name)
    if not files:
        raise OptionError(option, path, f"there is no {os.path.basename(name)} beside it")
    return files


def _ours(name: str) -> str:
    return _GATE.sub(r"\1.moe.gate.scorer.weight", name)


def _experts(option: str, ranks: list[str]) -> dict[str, Tensor]:
    """The stacks of all ranks, by our names."""
    stacks: dict[str, Tensor] = {}
    for rank, path in enumerate(ranks):
        weights = read_checkpoint(option, path)["model"]
        found = {name: _EXPERT.match(name) for name in weights}
        for name, match in found.items():
            if match is None:
                raise OptionError(option, path, f"has {name}, which is no expert's")
        local = 1 + max(int(match[2]) for match in found.values() if match is not None)
        for name, match in found.items():
            assert match is not None
            layer, expert, part, kind = match.groups()
            value = weights[name].t() if (part, kind) == ("fc2", "weight") else weights[name]
            key = f"{layer}.moe.experts.{part}_{kind}"
            if key not in stacks:
                stacks[key] = value.new_full((len(ranks) * local, *value.shape), float("nan"))
            place = rank * local + int(expert)
            if place >= len(stacks[key]) or stacks[key][place].shape != value.shape:
                raise OptionError(option, path, f"{name} does not fit the experts of other ranks")
            stacks[key][place] = value
    for name, stack in stacks.items():
        if not torch.isfinite(stack).all():
            raise OptionError(option, ranks[0], f"an expert of {name} is missing or not finite")
    return stacks


def _options(option: str, path: str, cfg: Any, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Of `transformer_lm_moe`."""
    theirs = plain_config(cfg.model)
    for field in (*UNSUPPORTED, *_NO_COUNTERPART):
        if theirs.get(field):
            raise OptionError(
                option,
                path,
                f"was trained with --{field.replace('_', '-')} {theirs[field]}, which no MoE "
                "architecture has",
            )
    options: dict[str, Any] = {}
    for known in dataclasses.fields(MoELanguageModelConfig):
        default = getattr(MoELanguageModelConfig, known.name, None)
        options[known.name] = getattr(default, "value", default)
    options |= transformer_options(cfg, weights)
    policy = theirs.get("moe_second_expert_policy", "sampling")
    is_top1 = bool(theirs.get("moe_top1_expert"))
    options |= {
        "_name": "transformer_lm_moe",
        "seed": 1,
        "max_update": None,
        "moe_freq": theirs.get("moe_freq", 2),
        "moe_expert_count": str(theirs["moe_expert_count"]),
        "moe_gate": "switch" if is_top1 else "gshard",
        "moe_post_norm": not options["decoder_normalize_before"],
    }
    if not is_top1:
        options["moe_second_expert_policy"] = policy
    return options
