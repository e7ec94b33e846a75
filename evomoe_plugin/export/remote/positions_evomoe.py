"""Positions of tokens: rotary, as in Llama, and sinusoidal, as in fairseq."""

import math

import torch
import torch.nn.functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Rotary:
    """Cosines and sines of positions. Frequencies stay in fp32, whatever the model's dtype."""

    def __init__(self, config):
        self.config, self.on = config, {}

    def __call__(self, positions_BL, dtype):
        """[B, 1, L, R] each."""
        device = positions_BL.device
        if device not in self.on:
            self.on[device] = self._frequencies(device)
        frequencies, scale = self.on[device]
        angles = positions_BL.unsqueeze(-1).float() * frequencies
        angles = torch.cat([angles, angles], -1).unsqueeze(1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _frequencies(self, device):
        given = self.config.rope_parameters
        if given["rope_type"] != "default":
            return ROPE_INIT_FUNCTIONS[given["rope_type"]](self.config, device)
        width = int(self.config.head_dim * given.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        return 1.0 / given["rope_theta"] ** exponents, 1.0


def rotate(x, cos, sin):
    """Rotate the first R dimensions of each head."""
    R = cos.size(-1)
    if R < x.size(-1):
        return torch.cat([rotate(x[..., :R], cos, sin), x[..., R:]], -1)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def sinusoids(indices_BL, width):
    """Embeddings [B, L, width] of positions, fp32."""
    half = width // 2
    step = -math.log(10000) / (half - 1)
    rates = torch.exp(torch.arange(half, dtype=torch.float, device=indices_BL.device) * step)
    angles = indices_BL.float().unsqueeze(-1) * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width % 2))
