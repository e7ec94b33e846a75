"""The weights of a Hugging Face GPT-2 by the names of fairseq's transformer_lm."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from fairseq.data import Dictionary
from torch import Tensor

from evomoe_plugin.checkpoint.gpt2_config import GPT2Config, misfit
from evomoe_plugin.checkpoint.hf_tensors import HFTensors
from evomoe_plugin.checkpoint.masked_vocab_row import masked_vocab_row
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.hf_config import CONFIG

# Causal masks in old files, which are computed here.
_BUFFERS = (".attn.bias", ".attn.masked_bias")
_PREFIX = "transformer."
_NO_TOKEN = -1
_PART = 2**18  # numbers of a table, converted at a time

TABLE, HEAD = "decoder.embed_tokens.weight", "decoder.output_projection.weight"
_POSITIONS, _VERSION = "decoder.embed_positions.weight", "decoder.version"


@dataclass(frozen=True)
class _Source:
    """The tensor of the folder that one of ours is made of."""

    name: str
    shape: tuple[int, ...]
    is_matrix: bool = False
    """Conv1D's, which is nn.Linear's transposed."""
    third: int | None = None
    """Of c_attn: queries, keys or values."""


class GPT2Weights(Mapping[str, Tensor]):
    """Tensors by our names, each read when it is asked for, in the dtype of the folder.

    The rows of the tables are those of a dictionary, whose entry of token id n is n in decimal.
    Rows that are unused, the original end-of-text id among them, get an embedding with a low logit
    after every input (`masked_vocab_row`); if there is none, the end of text's.

    Args:
        folder: with safetensors files.
        config: of the model.
        dictionary: of the rows.
    Raises:
        OptionError: the tensors are not those that the config asks for, or the dictionary has
            entries that are no token ids.
    """

    def __init__(self, folder: str, config: GPT2Config, dictionary: Dictionary):
        self._config = config
        self._tensors = HFTensors("DIR", folder)
        self._full: dict[str, str] = {}
        for name in self._tensors:
            short = name.removeprefix(_PREFIX)
            if short in self._full:
                twice = f"its weights have {short} twice, with and without {_PREFIX} before it"
                raise misfit(folder, twice)
            self._full[short] = name
        self._sources = _sources(config)
        self._head = "lm_head.weight"
        if config.tie_word_embeddings and self._head not in self._full:
            self._head = "wte.weight"
        shapes = {source.name: source.shape for source in self._sources.values()}
        shapes |= {"wte.weight": (config.vocab_size, config.n_embd)}
        shapes |= {"wpe.weight": (config.n_positions, config.n_embd)}
        shapes |= {self._head: (config.vocab_size, config.n_embd)}
        for name, shape in shapes.items():
            if name not in self._full:
                raise misfit(folder, f"its weights have no {name}")
            self._tensors.check(self._full[name], shape)
        left = sorted(n for n in self._full if n not in shapes and not n.endswith(_BUFFERS))
        if left:
            raise misfit(
                folder,
                f"its weights have {left[0]}, for which fairseq's transformer_lm has no place",
            )
        self._rows_V = _rows(dictionary, config)
        given_twice = config.tie_word_embeddings and self._head != "wte.weight"
        if given_twice and not torch.equal(self._read(self._head), self._read("wte.weight")):
            raise misfit(
                folder,
                f"its weights have {self._head} beside wte.weight, though {CONFIG} has "
                "tie_word_embeddings true: say false there, or remove one",
            )

    @property
    def has_masked_rows(self) -> bool:
        """Whether unused rows have a negligible probability; else they have the end of text's."""
        return self._masked_row is not None

    def __getitem__(self, name: str) -> Tensor:
        if name == _VERSION:
            return torch.tensor([3.0])
        if name == _POSITIONS:
            # fairseq counts positions from padding index + 1 = 2.
            return torch.nn.functional.pad(self._read("wpe.weight"), (0, 0, 2, 0))
        if name == TABLE and not self._config.tie_word_embeddings:
            return self._table("wte.weight", None)
        if name in (TABLE, HEAD):
            return self._table(self._head, self._masked_row)
        source = self._sources[name]
        value = self._read(source.name)
        value = value.t() if source.is_matrix else value
        return (value if source.third is None else value.chunk(3)[source.third]).contiguous()

    def __contains__(self, name: object) -> bool:
        return name in self._sources or name in (_VERSION, _POSITIONS, TABLE, HEAD)

    def __iter__(self) -> Iterator[str]:
        return iter((_VERSION, *self._sources, _POSITIONS, HEAD, TABLE))

    def __len__(self) -> int:
        return len(self._sources) + 4

    def _read(self, name: str) -> Tensor:
        return self._tensors.read(self._full[name])

    def _parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        return self._tensors.read_rows(self._full[name], max(1, _PART // self._config.n_embd))

    def _table(self, name: str, unused_D: Tensor | None) -> Tensor:
        """A table of the folder in the order of the rows."""
        is_unused_V = self._rows_V == _NO_TOKEN
        rows_V = torch.where(is_unused_V, self._config.eos_token_id, self._rows_V)
        out_VD: Tensor | None = None
        for start, part in self._parts(name):
            if out_VD is None:
                out_VD = part.new_empty(len(rows_V), part.size(1))
            here_V = (rows_V >= start) & (rows_V < start + len(part))
            out_VD[here_V] = part[rows_V[here_V] - start]
        assert out_VD is not None
        if unused_D is not None:
            out_VD[is_unused_V] = unused_D
        return out_VD

    @functools.cached_property
    def _masked_row(self) -> Tensor | None:
        used_V = torch.bincount(
            self._rows_V[self._rows_V != _NO_TOKEN], minlength=self._config.vocab_size
        ).double()
        mean_D = torch.zeros(self._config.n_embd, dtype=torch.float64)
        for start, part in self._parts(self._head):
            mean_D += used_V[start : start + len(part)] @ part.double() / used_V.sum()
        weight_D, bias_D = self._read("ln_f.weight"), self._read("ln_f.bias")
        return masked_vocab_row(weight_D, bias_D, mean_D, weight_D.dtype)


def _sources(config: GPT2Config) -> dict[str, _Source]:
    """Where each parameter comes from, but for the tables."""
    D, F = config.n_embd, config.ffn_dim
    made = {}

    def put(name: str, source: str, *shape: int, third: int | None = None) -> None:
        matrix = len(shape) == 2
        weight = _Source(f"{source}.weight", shape, matrix, third)
        made[f"decoder.{name}.weight"] = weight
        made[f"decoder.{name}.bias"] = _Source(f"{source}.bias", shape[-1:], third=third)

    for n in range(config.n_layer):
        ours, theirs = f"layers.{n}", f"h.{n}"
        put(f"{ours}.self_attn_layer_norm", f"{theirs}.ln_1", D)
        put(f"{ours}.final_layer_norm", f"{theirs}.ln_2", D)
        for third, part in enumerate("qkv"):
            attention = f"{ours}.self_attn.{part}_proj"
            put(attention, f"{theirs}.attn.c_attn", D, 3 * D, third=third)
        put(f"{ours}.self_attn.out_proj", f"{theirs}.attn.c_proj", D, D)
        put(f"{ours}.fc1", f"{theirs}.mlp.c_fc", D, F)
        put(f"{ours}.fc2", f"{theirs}.mlp.c_proj", F, D)
    put("layer_norm", "ln_f", D)
    return made


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
