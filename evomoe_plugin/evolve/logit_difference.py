"""Whether an MoE model made from a dense one computes the same: measured on random tokens."""

from __future__ import annotations

import types
from dataclasses import dataclass

import torch
from fairseq import models
from fairseq.models.transformer_lm import TransformerLanguageModel
from omegaconf import OmegaConf

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.checkpoint.reading import plain_config
from evomoe_plugin.evolve.dense_checkpoint import DenseCheckpoint
from evomoe_plugin.models.language_model import MoELanguageModel

MAX_TOKENS = 64
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
    }
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices), model.not_recording():
        other = _build(dense).to(weight.device, weight.dtype).float()
        length = min(16, model.max_positions(), other.max_positions())
        tokens_BT = torch.randint(
            dense.dictionary.nspecial,
            dense.vocabulary,
            (MAX_TOKENS // length, length),
            generator=torch.Generator().manual_seed(1),
        ).to(weight.device)
        try:
            logits_BTV = torch.func.functional_call(model.eval(), tensors, (tokens_BT,))[0]
        finally:
            model.train(training)
        wanted_BTV = other(tokens_BT)[0]
    largest = (logits_BTV - wanted_BTV).abs().max().item()
    equal = largest <= _ROUNDING * wanted_BTV.abs().max().item()
    return LogitDifference(largest, equal, tokens_BT.numel())


def _build(dense: DenseCheckpoint) -> TransformerLanguageModel:
    """The dense model with its weights, fp32, in evaluation mode."""
    with report_config_faults(dense.option, dense.path):
        task = types.SimpleNamespace(
            source_dictionary=dense.dictionary, target_dictionary=dense.dictionary
        )
        cfg = OmegaConf.create({**plain_config(dense.cfg.model), **dense.model})
        model = models.build_model(cfg, task, from_checkpoint=True)
        model.load_state_dict(dict(dense.weights), strict=True, model_cfg=cfg)
    return model.eval()
