"""Convert GPT-2 models of Hugging Face to dense fairseq checkpoints with equal logits.

Architecture: GPT-2 (Radford et al., 2019) as in transformers' GPT2LMHeadModel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from evomoe_plugin.checkpoint.gpt2_config import GPT2Config, read_config
from evomoe_plugin.checkpoint.gpt2_weights import HEAD, TABLE, GPT2Weights
from evomoe_plugin.checkpoint.initial_state import initial_checkpoint
from evomoe_plugin.checkpoint.reading import plain_config


@dataclass(frozen=True)
class Imported:
    """A Hugging Face model in fairseq's format, not yet written."""

    state: dict[str, Any]
    """fairseq's checkpoint."""
    dictionary: Dictionary
    has_masked_rows: bool
    """Whether rows without a token have a negligible probability (`masked_vocab_row`); else they
    have the logit of the end of text."""


def import_gpt2(folder: str, dictionary: Dictionary | None = None) -> Imported:
    """Read a GPT-2 from `folder`, in the dtype of its weights, a tensor at a time.

    The dictionary entry of token id n is n in decimal, as for fairseq's `--bpe gpt2`. The end of
    text becomes end-of-sentence. Rows that are then unused have a negligible probability where
    that can be (`GPT2Weights`), so that probabilities stay those of the Hugging Face model.

    Args:
        folder: with config.json and model.safetensors, or its parts and their index.
        dictionary: gives the order of rows; None: that of the token ids.
    Raises:
        OptionError: files are missing or invalid, or fairseq cannot compute this model.
    """
    config, weights, dictionary = read_gpt2(folder, dictionary)
    model = {name: weights[name] for name in weights if name != TABLE}
    model[TABLE] = model[HEAD] if config.tie_word_embeddings else weights[TABLE]
    state = initial_checkpoint(run_config(config), model, criterion="CrossEntropyCriterion")
    return Imported(state, dictionary, weights.has_masked_rows)


def read_gpt2(
    folder: str, dictionary: Dictionary | None = None
) -> tuple[GPT2Config, GPT2Weights, Dictionary]:
    """As `import_gpt2`: the config, the weights, read when they are asked for, and the rows."""
    config = read_config(folder)
    if dictionary is None:
        dictionary = Dictionary()
        for n in range(config.vocab_size):
            dictionary.add_symbol(str(n))
    return config, GPT2Weights(folder, config, dictionary), dictionary


def run_config(config: GPT2Config) -> dict[str, Any]:
    """fairseq's configuration of a run that trains such a model, a plain dictionary."""
    width, length = config.n_embd, config.n_positions
    arguments = (
        "data-bin --task language_modeling --arch transformer_lm --optimizer adam "
        f"--decoder-layers {config.n_layer} --decoder-attention-heads {config.n_head} "
        f"--decoder-embed-dim {width} --decoder-input-dim {width} --decoder-output-dim {width} "
        f"--decoder-ffn-embed-dim {config.ffn_dim} --activation-fn {config.activation} "
        f"--dropout {config.resid_pdrop} --attention-dropout {config.attn_pdrop} "
        f"--tokens-per-sample {length} --max-target-positions {length} --max-tokens {length} "
        "--decoder-normalize-before --decoder-learned-pos --no-scale-embedding"
    ).split()
    if config.tie_word_embeddings:
        arguments.append("--share-decoder-input-output-embed")
    parser = fairseq_options.get_training_parser(default_task="language_modeling")
    args = fairseq_options.parse_args_and_arch(parser, arguments)
    return plain_config(convert_namespace_to_omegaconf(args))
