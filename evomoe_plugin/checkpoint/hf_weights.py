"""The weights of a Hugging Face folder by the names of `causal_lm` decoders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.checkpoint.hf_tensors import HFTensors
from evomoe_plugin.config.hf_config import HFConfig, read_hf_config, read_json
from evomoe_plugin.config.options import CausalLMModelOptions

# Tables that are computed here.
_COMPUTED = (".rotary_emb.inv_freq", ".masked_bias")
_TOKENIZER = "tokenizer.json"
_TABLES = ("decoder.embed_tokens.", "decoder.output_projection.")


@dataclass(frozen=True)
class Source:
    """The tensors of a folder that one of ours is made of."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # Of each
    stacked: bool = False
    transposed: bool = False


class HFWeights(Mapping[str, Tensor]):
    """Tensors by our names, each read when it is asked for, in the dtype of the folder.

    Args:
        option: what the user named the folder with, for messages.
        folder: with config.json and safetensors files.
    Raises:
        OptionError: as `read_hf_config` and `HFTensors`, or the tensors are not those that the
            config asks for.
    """

    def __init__(self, option: str, folder: str):
        self.config = read_hf_config(option, folder)
        self._tensors = HFTensors(option, folder)
        self._sources = sources(self.config)
        head = "decoder.output_projection.weight"
        tied = self.config.options["share_decoder_input_output_embed"]
        if tied and self._sources[head].names[0] not in self._tensors:
            self._sources[head] = self._sources["decoder.embed_tokens.weight"]
        taken = set()
        for source in self._sources.values():
            for name in source.names:
                self._tensors.check(name, source.shape)
                taken.add(name)
        for name in self._tensors:
            if name not in taken and not name.endswith(_COMPUTED):
                raise self._tensors.misfit(
                    f"its weights have {name}, for which a {self.config.kind} has no place"
                )
        table = "decoder.embed_tokens.weight"
        given_twice = self._sources[head] != self._sources[table]
        if tied and given_twice and not torch.equal(self[head], self[table]):
            raise self._tensors.misfit(
                "its input and output embeddings differ, though its config.json has "
                "tie_word_embeddings true: say false there"
            )
        _check_tokenizer(self._tensors, option, folder, self.config)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        if not source.stacked:
            value = self._tensors.read(source.names[0])
            return value.t().contiguous() if source.transposed else value
        # Into one buffer, so that no more than one tensor of the folder is held beside it.
        out: Tensor | None = None
        for n, part in enumerate(source.names):
            value = self._tensors.read(part)
            value = value.t() if source.transposed else value
            if out is None:
                out = value.new_empty(len(source.names), *value.shape)
            out[n] = value
        assert out is not None
        return out

    def __contains__(self, name: object) -> bool:
        return name in self._sources  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def with_rows(name: str, value: Tensor, rows: int) -> Tensor:
    """A table of embeddings with more rows, for tokens that the model does not have; any other
    tensor as it is.

    New rows are the mean of the others: a logit that is the mean of n logits adds at most 1/n to
    the sum of their exponentials (Jensen's inequality; Hewitt, "Initializing New Word Embeddings
    for Pretrained Language Models", 2021).

    Args:
        name: of a parameter of the model.
        rows: of the dictionary.
    """
    if not name.startswith(_TABLES) or len(value) >= rows:
        return value
    mean = value.mean(0, keepdim=True, dtype=torch.float32).to(value.dtype)
    return torch.cat([value, mean.expand(rows - len(value), *value.shape[1:])])


def sources(config: HFConfig) -> dict[str, Source]:
    """Where each parameter of the decoder comes from, by our names."""
    made: dict[str, Source] = {}
    # Fields that no family sets have their defaults.
    options = CausalLMModelOptions(
        **{
            k: v
            for k, v in config.options.items()
            if k in CausalLMModelOptions.__dataclass_fields__
        }
    )
    width, heads = options.decoder_embed_dim, options.decoder_attention_heads
    kv, dim = options.decoder_kv_heads, options.decoder_head_dim
    is_phi, has_bias = config.kind == "phi", options.decoder_norm == "layer"

    def put(ours: str, theirs: str, *shape: int, bias: bool = False) -> None:
        made[f"decoder.{ours}.weight"] = Source((f"{theirs}.weight",), shape)
        if bias:
            made[f"decoder.{ours}.bias"] = Source((f"{theirs}.bias",), shape[:1])

    put("embed_tokens", "model.embed_tokens", config.vocabulary, width)
    moe_layers = set()
    if config.is_moe:
        moe_layers = {int(n) for n in config.options["moe_layers"].split(",")}
    for n in range(options.decoder_layers):
        ours, theirs = f"layers.{n}", f"model.layers.{n}"
        attention, of = f"{ours}.self_attn", f"{theirs}.self_attn"
        for part, count in (("q", heads), ("k", kv), ("v", kv)):
            put(
                f"{attention}.{part}_proj",
                f"{of}.{part}_proj",
                count * dim,
                width,
                bias=options.decoder_qkv_bias,
            )
        put(
            f"{attention}.out_proj",
            f"{of}.{'dense' if is_phi else 'o_proj'}",
            width,
            heads * dim,
            bias=options.decoder_out_bias,
        )
        for part, count in (("q", heads), ("k", kv)):
            norm = f"{attention}.{part}_norm"
            if options.decoder_qk_norm == "separate":
                names = tuple(f"{of}.{part}_layernorm.norms.{h}.weight" for h in range(count))
                made[f"decoder.{norm}.weight"] = Source(names, (dim,), stacked=True)
            elif options.decoder_qk_norm != "none":
                size = dim * (count if options.decoder_qk_norm == "joint" else 1)
                name = f"{of}.{part}_{'layernorm' if is_phi else 'norm'}"
                put(norm, name, size, bias=has_bias)
        put(f"{ours}.self_attn_layer_norm", f"{theirs}.input_layernorm", width, bias=has_bias)
        if not options.decoder_parallel:
            norm = f"{theirs}.post_attention_layernorm"
            put(f"{ours}.final_layer_norm", norm, width, bias=has_bias)
        if n in moe_layers:
            made |= _moe_sources(config, f"decoder.{ours}.moe", theirs, width)
            continue
        parts = {"fc1": "gate_proj", "fc2": "down_proj", "fc3": "up_proj"}
        if options.decoder_ffn == "plain":
            parts = {"fc1": "fc1", "fc2": "fc2"}
        for part, name in parts.items():
            shape = [options.decoder_ffn_embed_dim, width]
            put(
                f"{ours}.{part}",
                f"{theirs}.mlp.{name}",
                *(reversed(shape) if part == "fc2" else shape),
                bias=options.decoder_ffn_bias,
            )
    put("layer_norm", f"model.{'final_layernorm' if is_phi else 'norm'}", width, bias=has_bias)
    put(
        "output_projection",
        "lm_head",
        config.vocabulary,
        width,
        bias=options.decoder_logits_bias,
    )
    return made


def _moe_sources(config: HFConfig, ours: str, theirs: str, width: int) -> dict[str, Source]:
    options = config.options
    count, ffn_dim = int(options["moe_expert_count"]), options["moe_expert_ffn_dim"]
    inside, parts = f"{theirs}.mlp", {"fc1": "gate_proj", "fc2": "down_proj", "fc3": "up_proj"}
    if config.kind == "mixtral":
        inside, parts = f"{theirs}.block_sparse_moe", {"fc1": "w1", "fc2": "w2", "fc3": "w3"}

    def stack(prefixes: list[str], ffn_dim: int, part: str) -> Source:
        names = tuple(f"{prefix}.{parts[part]}.weight" for prefix in prefixes)
        if part == "fc2":
            return Source(names, (width, ffn_dim), stacked=True, transposed=True)
        return Source(names, (ffn_dim, width), stacked=True)

    made = {f"{ours}.gate.scorer.weight": Source((f"{inside}.gate.weight",), (count, width))}
    experts = [f"{inside}.experts.{e}" for e in range(count)]
    for part in parts:
        made[f"{ours}.experts.{part}_weight"] = stack(experts, ffn_dim, part)
    if options.get("moe_shared_experts"):
        shared = [f"{inside}.shared_expert"]
        for part in parts:
            made[f"{ours}.shared.experts.{part}_weight"] = stack(
                shared, options["moe_shared_ffn_dim"], part
            )
        made[f"{ours}.gate.shared_weights.weight"] = Source(
            (f"{inside}.shared_expert_gate.weight",), (1, width)
        )
    return made


def _check_tokenizer(tensors: HFTensors, option: str, folder: str, config: HFConfig) -> None:
    """Raise `OptionError` if the folder's tokenizer has an id without an embedding."""
    if not os.path.isfile(os.path.join(folder, _TOKENIZER)):
        return
    content = read_json(option, folder, _TOKENIZER)
    model: Any = content.get("model")
    known = model.get("vocab") if isinstance(model, dict) else None
    ids = list(known.values()) if isinstance(known, dict) else list(range(len(known or [])))
    ids += [token["id"] for token in content.get("added_tokens") or [] if "id" in token]
    largest = max((n for n in ids if isinstance(n, int)), default=-1)
    if largest >= config.vocabulary:
        raise tensors.misfit(
            f"its {_TOKENIZER} has the id {json.dumps(largest)}, its embeddings only "
            f"{config.vocabulary} rows"
        )
