"""Whether an MoE model made from a dense one computes the same: measured on random tokens."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from fairseq import models
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf
from torch import Tensor, nn

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.reading import plain_config
from evomoe_plugin.evolve.dense_checkpoint import DenseCheckpoint
from evomoe_plugin.evolve.initial_values import build_without_memory
from evomoe_plugin.models.language_model import MoELanguageModel

MAX_TOKENS = 64
_RENDERED = ("layernorm_embedding",)  # options that are text in ours and a bool in fairseq's
# fp32 rounding, relative to the largest logit.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class LogitDifference:
    """Logits of an MoE model against those of the dense one, in evaluation mode."""

    largest: float
    """Absolute, over all tokens and vocabulary rows."""
    equal: bool
    """Whether it is no more than rounding."""
    tokens: int

    def __str__(self) -> str:
        verdict = "equal to" if self.equal else "differ from"
        return (
            f"logits {verdict} the dense model's (max difference {self.largest:.2g} on "
            f"{self.tokens} random tokens)"
        )


@contextlib.contextmanager
def streamed(
    model: TransformerLanguageModel,
    weights: Mapping[str, Tensor],
    rounded: torch.dtype | None = None,
) -> Iterator[None]:
    """Inside, a model without memory computes in fp32: each layer has its weights for the time of
    its forward pass.

    Args:
        model: from `initial_values.build_without_memory`.
        weights: its state dict, in any dtypes.
        rounded: a dtype that fp32 weights are rounded to; None: they are not.
    """
    decoder, table = model.decoder, "decoder.embed_tokens."

    def load(module: nn.Module, prefix: str) -> None:
        own = {}
        for name, parameter in module.state_dict().items():
            value = weights[prefix + name]
            if parameter.dtype == torch.float32:
                value = value.to(rounded or value.dtype).float()
            own[name] = value
        module.load_state_dict(own, assign=True)

    def around(module: nn.Module, prefix: str) -> None:
        hooks.append(module.register_forward_pre_hook(lambda *_: load(module, prefix)))
        hooks.append(module.register_forward_hook(lambda *_: module.to("meta") and None))

    hooks: list[Any] = []
    tied = decoder.share_input_output_embed
    load(decoder.embed_tokens, table)
    for n, layer in enumerate(decoder.layers):
        around(layer, f"decoder.layers.{n}.")
    around(decoder.layer_norm, "decoder.layer_norm.")
    if not tied:
        around(decoder.output_projection, "decoder.output_projection.")
    else:
        decoder.output_projection.weight = decoder.embed_tokens.weight
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to("meta")


@torch.no_grad()
def measure_logit_difference(model: MoELanguageModel, dense: DenseCheckpoint) -> LogitDifference:
    """Compare `model` with the dense model on random tokens.

    Both compute in fp32, from weights rounded to the precision of `model`. Its mode, weights and
    routing records, and the random number generators, are left as they were.

    Args:
        model: whole on this rank: no FSDP, no sharded experts.
    Raises:
        OptionError: no model can be built from the dense checkpoint.
    """
    weight, training = next(model.parameters()), model.training
    tensors = {
        name: tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not tensor.is_meta
    }
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), model.not_recording(), contextlib.ExitStack() as stack:
        other = stack.enter_context(_built(dense, weight))
        length = min(16, *_max_positions(model), *_max_positions(other))
        tokens_BT = torch.randint(
            dense.dictionary.nspecial,
            min(dense.vocabulary, len(dense.target_dictionary)),
            (MAX_TOKENS // length, length),
            generator=torch.Generator().manual_seed(1),
        ).to(weight.device)
        given = (tokens_BT, None, tokens_BT) if dense.family == "translation" else (tokens_BT,)
        try:
            logits_BTV = torch.func.functional_call(model.eval(), tensors, given)[0]
        finally:
            model.train(training)
        wanted_BTV = other(*given)[0]
        logits_BTV = logits_BTV[..., : wanted_BTV.size(2)]  # it may have more token ids
    largest = (logits_BTV - wanted_BTV).abs().max().item()
    equal = largest <= _ROUNDING * wanted_BTV.abs().max().item()
    return LogitDifference(largest, equal, tokens_BT.numel())


@contextlib.contextmanager
def _built(dense: DenseCheckpoint, like: Tensor) -> Iterator[TransformerLanguageModel]:
    """The dense model with its weights, in evaluation mode and fp32, on the device of `like`."""
    with report_config_faults(dense.option, dense.path):
        given = {name: value for name, value in dense.model.items() if name not in _RENDERED}
        cfg = OmegaConf.create({**plain_config(dense.cfg.model), **given})
        if dense.keeps_dtype and like.device.type == "cpu":
            model = build_without_memory(cfg, dense.dictionary).eval()
            with streamed(model, dense.weights, like.dtype):
                yield model
            return
        task = types.SimpleNamespace(
            source_dictionary=dense.dictionary, target_dictionary=dense.target_dictionary
        )
        model = models.build_model(cfg, task, from_checkpoint=True)
        model.load_state_dict(dict(dense.weights), strict=not dense.keeps_dtype, model_cfg=cfg)
    yield model.to(like.device, like.dtype).float().eval()


def _max_positions(model: Any) -> tuple[int, ...]:
    """The longest inputs: of a decoder, or of encoder and decoder."""
    longest = model.max_positions()
    return longest if isinstance(longest, tuple) else (longest,)
