"""Convert Hugging Face models to checkpoints of `causal_lm` architectures with equal logits."""

from __future__ import annotations

import types
from typing import Any

from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor

from evomoe_plugin.checkpoint.hf_weights import HFWeights, with_rows
from evomoe_plugin.checkpoint.initial_state import initial_checkpoint
from evomoe_plugin.checkpoint.reading import plain_config
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import HFConfig
from evomoe_plugin.evolve.initial_values import build_without_memory, initial_gates

_LONGEST = 4096
"""Tokens of a row of a run with the model, unless its options say otherwise."""


def placeholder_dictionary(rows: int) -> Dictionary:
    """A dictionary of so many rows."""
    dictionary = Dictionary()
    for n in range(rows - len(dictionary)):
        dictionary.add_symbol(f"token{n}")
    return dictionary


def import_hf(option: str, folder: str, dictionary: Dictionary | None = None) -> dict[str, Any]:
    """A checkpoint of the model in `folder`, in the dtype of its weights.

    Row n of the embeddings is token id n of the model. Tensors are read one at a time.

    Args:
        option: what the user named the folder with, for messages.
        dictionary: with as many entries as the model has token ids, or more (`with_rows`).
    Raises:
        OptionError: as `HFWeights`, or the dictionary has fewer.
    """
    weights = HFWeights(option, folder)
    rows = weights.config.vocabulary
    if dictionary is not None:
        if len(dictionary) < rows:
            raise OptionError(
                "dict",
                f"({len(dictionary)} entries)",
                f"the model has {rows} token ids: give the dict.txt that belongs to it",
            )
        rows = len(dictionary)
    cfg = run_config(weights.config)
    options: Any = types.SimpleNamespace(**cfg["model"])
    model = build_without_memory(cfg["model"], placeholder_dictionary(rows))
    own = dict(initial_gates(model, options, seed=1))
    made: dict[str, Tensor] = {}
    for name in model.state_dict():
        if name == "decoder.output_projection.weight" and options.share_decoder_input_output_embed:
            made[name] = made["decoder.embed_tokens.weight"]
        else:
            made[name] = with_rows(name, weights[name], rows) if name in weights else own[name]
    assert made.keys() >= weights.keys(), weights.keys() - made.keys()
    name = "MoECrossEntropyCriterion" if weights.config.is_moe else "CrossEntropyCriterion"
    return initial_checkpoint(cfg, made, criterion=name)


def run_config(config: HFConfig) -> dict[str, Any]:
    """fairseq's configuration of a run that trains such a model, a plain dictionary."""
    options = config.options
    arch = "causal_lm_moe" if config.is_moe else "causal_lm"
    length = min(options["max_target_positions"], _LONGEST)
    arguments = (
        f"data-bin --task language_modeling --arch {arch} --optimizer adam "
        f"--tokens-per-sample {length} --max-tokens {length}"
    ).split()
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments += [flag] if value else []
        elif value is not None and (config.is_moe or name != "moe_layers"):
            arguments += [flag, str(value)]
    if config.is_moe:
        arguments += ["--criterion", "moe_cross_entropy"]
    parser = fairseq_options.get_training_parser(default_task="language_modeling")
    args = fairseq_options.parse_args_and_arch(parser, arguments)
    cfg = plain_config(convert_namespace_to_omegaconf(args))
    cfg["common"]["user_dir"] = "evomoe_plugin"
    return cfg
