"""Layers of every gate, at the smallest size that shows something."""

import pytest
import torch
from torch import nn

from evomoe_plugin.config.checks import validate
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer

T, D, F, E, V = 19, 6, 10, 5, 40


@pytest.fixture
def make_layer(moe_options):
    """A checked fp64 layer, with scores far enough apart that choices bite."""

    def make(num_experts=E, dtype=torch.float64, layer_id=0, **given):
        options = moe_options(
            **{
                "decoder_embed_dim": D,
                "decoder_ffn_embed_dim": F,
                "moe_expert_count": str(num_experts),
                **given,
            }
        )
        validate(options)
        counts = tuple(1000 // (rank + 1) for rank in range(V))
        info = LayerInfo(
            D, num_experts, options.moe_null_experts, layer_id=layer_id, token_counts_V=counts
        )
        layer = build_layer(info, options, nn.functional.gelu).to(dtype)
        with torch.no_grad():
            for name, parameter in layer.gate.named_parameters():
                if parameter.dim() == 2 and "shared" not in name:
                    parameter.mul_(3)
        return layer

    return make
