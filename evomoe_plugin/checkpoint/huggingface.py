"""Convert GPT-2 models of Hugging Face to dense fairseq checkpoints with equal logits.

Architecture: GPT-2 (Radford et al., 2019) as in transformers' GPT2LMHeadModel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from fairseq import options as fairseq_options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from torch import Tensor

from evomoe_plugin.checkpoint.gpt2_config import GPT2Config, misfit, read_config
from evomoe_plugin.checkpoint.hf_tensors import HFTensors
from evomoe_plugin.checkpoint.initial_state import initial_checkpoint
from evomoe_plugin.checkpoint.masked_vocab_row import masked_vocab_row
from evomoe_plugin.checkpoint.reading import plain_config
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import CONFIG

# Causal masks in old files, which are computed here.
_BUFFERS = (".attn.bias", ".attn.masked_bias")


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
    """Read a GPT-2 from `folder`.

    The dictionary entry of token id n is n in decimal, as for fairseq's `--bpe gpt2`. The end of
    text becomes end-of-sentence. Rows that are then unused, the original end-of-text id among
    them, get an embedding with a low logit after every input (`masked_vocab_row`), so that
    probabilities stay those of the Hugging Face model; if there is none, the end of text's.

    Args:
        folder: with config.json and model.safetensors, or its parts and their index.
        dictionary: gives the order of rows; None: that of the token ids.
    Raises:
        OptionError: files are missing or invalid, or fairseq cannot compute this model.
    """
    config = read_config(folder)
    weights = _Weights(folder)
    if dictionary is None:
        dictionary = Dictionary()
        for n in range(config.vocab_size):
            dictionary.add_symbol(str(n))
    rows_V = _rows(dictionary, config)
    model, has_masked_rows = _model(config, weights, rows_V)
    weights.check_all_taken()
    state = initial_checkpoint(_run_config(config), model, criterion="CrossEntropyCriterion")
    return Imported(state, dictionary, has_masked_rows)


class _Weights:
    """The tensors of the model; each may be taken once."""

    def __init__(self, folder: str):
        self._folder = folder
        self._tensors = HFTensors("DIR", folder)
        self._left: dict[str, str] = {}  # Full names
        for name in self._tensors:
            short = name.removeprefix("transformer.")
            if short in self._left:
                twice = f"its weights have {short} twice, with and without transformer. before it"
                raise misfit(folder, twice)
            self._left[short] = name

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor, fp32."""
        full = self._left.pop(name, None)
        if full is None:
            raise misfit(self._folder, f"its weights have no {name}")
        self._tensors.check(full, shape)
        return self._tensors.read(full).float()

    def take_head(self, is_tied: bool, table: Tensor) -> Tensor:
        """The output embedding, fp32; `table` is the input embedding."""
        name = "lm_head.weight"
        if is_tied and name not in self._left:
            return table
        head = self.take(name, *table.shape)
        if is_tied and not torch.equal(head, table):
            raise misfit(
                self._folder,
                f"its weights have {name} beside wte.weight, though "
                f"{CONFIG} has tie_word_embeddings true: say false there, "
                "or remove one",
            )
        return head

    def check_all_taken(self) -> None:
        left = sorted(name for name in self._left if not name.endswith(_BUFFERS))
        if left:
            raise misfit(
                self._folder,
                f"its weights have {left[0]}, for which fairseq's transformer_lm has no place",
            )


_NO_TOKEN = -1


def _rows(dictionary: Dictionary, config: GPT2Config) -> Tensor:
    """The token id whose embedding each row of the dictionary gets, int64 [V]; or `_NO_TOKEN`."""
    size, rows = config.vocab_size, []
    special = {dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()}
    for row, entry in enumerate(dictionary.symbols):
        is_token = entry.isascii() and entry.isdigit() and int(entry) < size
        if not is_token and row not in special and not entry.startswith("madeupword"):
            raise OptionError(
                "dict",
                entry,
                f"is no token id of the model (0 to {size - 1}): "
                "give a dictionary made with --gpt2-bpe or --tokenizer",
            )
        # The end of text in one row: two would halve its probability.
        is_unused = not is_token or int(entry) == config.eos_token_id
        rows.append(_NO_TOKEN if is_unused else int(entry))
    rows[dictionary.eos()] = config.eos_token_id
    return torch.tensor(rows)


def _model(config: GPT2Config, weights: _Weights, rows_V: Tensor) -> tuple[dict[str, Tensor], bool]:
    """The weights by fairseq's names, and whether unused rows are masked."""
    D, F = config.n_embd, config.ffn_dim
    table = weights.take("wte.weight", config.vocab_size, D)
    positions = weights.take("wpe.weight", config.n_positions, D)
    model = {"decoder.version": torch.tensor([3.0])}

    def put(name: str, source: str, *shape: int) -> None:
        # Conv1D weights are nn.Linear's transposed.
        model[f"decoder.{name}.weight"] = weights.take(f"{source}.weight", *shape).t().contiguous()
        model[f"decoder.{name}.bias"] = weights.take(f"{source}.bias", shape[-1])

    for n in range(config.n_layer):
        ours, theirs = f"layers.{n}", f"h.{n}"
        put(f"{ours}.self_attn_layer_norm", f"{theirs}.ln_1", D)
        put(f"{ours}.final_layer_norm", f"{theirs}.ln_2", D)
        weight = weights.take(f"{theirs}.attn.c_attn.weight", D, 3 * D).t()
        bias = weights.take(f"{theirs}.attn.c_attn.bias", 3 * D)
        for part, w, b in zip("qkv", weight.chunk(3), bias.chunk(3), strict=True):
            model[f"decoder.{ours}.self_attn.{part}_proj.weight"] = w.contiguous()
            model[f"decoder.{ours}.self_attn.{part}_proj.bias"] = b.clone()
        put(f"{ours}.self_attn.out_proj", f"{theirs}.attn.c_proj", D, D)
        put(f"{ours}.fc1", f"{theirs}.mlp.c_fc", D, F)
        put(f"{ours}.fc2", f"{theirs}.mlp.c_proj", F, D)
    put("layer_norm", "ln_f", D)
    head = weights.take_head(config.tie_word_embeddings, table)
    end, is_token_V1 = config.eos_token_id, (rows_V != _NO_TOKEN).unsqueeze(1)
    row_D = masked_vocab_row(
        model["decoder.layer_norm.weight"],
        model["decoder.layer_norm.bias"],
        head[rows_V[rows_V != _NO_TOKEN]],
    )
    tokens_V = torch.where(rows_V == _NO_TOKEN, end, rows_V)
    output = torch.where(is_token_V1, head[tokens_V], head[end] if row_D is None else row_D)
    # fairseq counts positions from padding index + 1 = 2.
    model["decoder.embed_positions.weight"] = torch.cat([torch.zeros(2, D), positions])
    model["decoder.output_projection.weight"] = output
    model["decoder.embed_tokens.weight"] = output if config.tie_word_embeddings else table[tokens_V]
    return model, row_D is not None


def _run_config(config: GPT2Config) -> dict[str, Any]:
    """fairseq's configuration of a run that trains such a model."""
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
