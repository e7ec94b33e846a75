"""What every test shares."""

import types

import pytest
import torch

from evomoe_plugin.gates.base import option_fields
from evomoe_plugin.options import MoEOptions


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def moe_options():
    """A maker of MoE options with defaults, 100 updates, 4 layers, and what is given."""

    def make(**given):
        fields = {
            **vars(MoEOptions()),
            **{name: option.default for name, option in option_fields().items()},
            "max_update": 100, "decoder_layers": 4, "decoder_embed_dim": 8,
            "decoder_ffn_embed_dim": 32, "activation_fn": "gelu",
            "decoder_input_dim": 0, "decoder_output_dim": 0,
            "share_decoder_input_output_embed": False,
        }
        unknown = given.keys() - fields.keys()
        assert not unknown, unknown
        return types.SimpleNamespace(**{**fields, **given})

    return make
