"""Rotary position embeddings (Su et al., arXiv 2104.09864)."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import CausalLMModelOptions, head_dim

SCALINGS = ("linear", "llama3", "yarn")
"""Scalings that do not depend on the length of the text at hand."""


class Rotary:
    """The angles by which queries and keys are rotated.

    Of each head the first R dimensions are rotated, dimension i with i + R/2, as in Llama. The
    frequencies are kept in fp32 whatever the dtype of the model: in half precision, far positions
    would share an angle.

    Args:
        options: of the model.
    Raises:
        OptionError: an unknown scaling, or one of which transformers is missing.
    """

    def __init__(self, options: CausalLMModelOptions):
        self.options = options
        self.width = int(head_dim(options) * options.rope_fraction)  # R
        self._on: dict[torch.device, Tensor] = {}
        self._frequencies, self.scale = _frequencies(options, self.width)

    def __call__(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, [B, T, R] each, in `dtype`."""
        device = positions_BT.device
        if device not in self._on:
            self._on[device] = self._frequencies.to(device)
        angles = positions_BT.unsqueeze(2).float() * self._on[device]
        angles = torch.cat([angles, angles], 2)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R dimensions of each head.

    Args:
        x: [B, heads, T, head width].
        cos, sin: [B, 1, T, R].
    """
    R = cos.size(-1)
    if R < x.size(-1):
        return torch.cat([rotate(x[..., :R], cos, sin), x[..., R:]], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def read_scaling(options: CausalLMModelOptions) -> dict[str, Any]:
    """The object of `--rope-scaling`; empty if there is none.

    Raises:
        OptionError: it is no JSON object, or its type is unknown.
    """
    text = options.rope_scaling
    if text is None:
        return {}
    try:
        scaling = json.loads(text)
    except ValueError as error:
        raise OptionError("rope_scaling", text, f"is not JSON ({error})") from error
    kind = scaling.get("rope_type") if isinstance(scaling, dict) else None
    if kind not in SCALINGS:
        raise OptionError(
            "rope_scaling",
            text,
            f"give a JSON object with a rope_type of: {', '.join(SCALINGS)}",
        )
    return scaling


def _frequencies(options: CausalLMModelOptions, width: int) -> tuple[Tensor, float]:
    """Radians a position, fp32 [R / 2], and the factor of cosines and sines."""
    with torch.device("cpu"):  # also where the model is built on the meta device
        scaling = read_scaling(options)
        if not scaling:
            exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
            return 1.0 / options.rope_theta**exponents, 1.0
        try:
            from transformers import LlamaConfig
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
        except ImportError as error:
            raise OptionError(
                "rope_scaling",
                options.rope_scaling,
                f"is computed by transformers: pip install 'evomoe_plugin[hf]' ({error})",
            ) from error
        try:
            config = LlamaConfig(
                hidden_size=options.decoder_embed_dim,
                num_attention_heads=options.decoder_attention_heads,
                head_dim=head_dim(options),
                rope_parameters={
                    **scaling,
                    "rope_theta": options.rope_theta,
                    "partial_rotary_factor": options.rope_fraction,
                },
            )
            return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"))
        except Exception as error:  # whatever transformers raises for a missing or odd value
            raise OptionError(
                "rope_scaling", options.rope_scaling, " ".join(str(error).split())[:200]
            ) from error
