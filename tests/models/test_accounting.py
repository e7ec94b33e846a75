"""FLOPs from a model's options against a count by hand and against what torch counts."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evomoe_plugin.models.accounting import count_flops
from evomoe_plugin.routing import stats as st

CONTEXT, VOCABULARY = 64, 40  # Of the fixtures
VARIANTS = {
    "as it is": {},
    "projections": {"decoder_input_dim": 24, "decoder_output_dim": 40},
    "one projection": {"decoder_output_dim": 12},
    "tied, projected": {
        "decoder_input_dim": 8,
        "decoder_output_dim": 8,
        "share_decoder_input_output_embed": True,
    },
    "gated experts": {"moe_expert_gated": True, "moe_expert_ffn_dim": 33, "moe_freq": 1},
    "growing experts": {"moe_expert_count": "2:7", "moe_freq": 1},
    "shared experts": {"moe_shared_experts": 2, "moe_shared_ffn_dim": 5},
    "softmax with shared experts": {"moe_shared_experts": 2, "moe_shared_combine": "softmax"},
    "mix with shared experts": {"moe_shared_experts": 3, "moe_shared_combine": "mix"},
    "null experts": {"moe_gate": "top_p", "moe_null_experts": 2},
    **{scorer: {"moe_scorer": scorer} for scorer in ("mlp", "gmm", "cosine")},
    **{
        gate: {"moe_gate": gate}
        for gate in ("base", "dense", "dselect_k", "gshard", "hash", "relu", "switch", "top_k")
    },
    "sigmoid": {"moe_gate": "top_k", "moe_scorer": "sigmoid"},
    # The default losses multiply the experts' vectors by each other, once for all tokens.
    "top_any": {"moe_gate": "top_any", "moe_max_experts": 6, "moe_aux": "none"},
    "stable": {"moe_gate": "stable", "moe_stable_updates": 10},
}


def test_by_hand(make_config):
    cfg = make_config(
        decoder_layers=3,
        decoder_embed_dim=16,
        decoder_ffn_embed_dim=24,
        decoder_input_dim=6,
        decoder_output_dim=10,
        moe_layers="1",
        moe_expert_count="4",
        moe_shared_experts=1,
    )
    attention = 4 * 2 * 16 * 16 + 2 * 2 * 16 * CONTEXT  # q, k, v, out; scores, sums of values
    ffn = 2 * 2 * 16 * 24
    gate = 2 * 16 * 4
    projections = 2 * 6 * 16 + 2 * 16 * 10
    counted = count_flops(cfg, VOCABULARY)
    # A shared expert is as wide as a dense FFN, of which there are two.
    assert counted.per_token == 3 * attention + 3 * ffn + gate + projections + 2 * 10 * VOCABULARY
    assert counted.per_pair == ffn
    assert counted.gates == gate


@pytest.mark.parametrize("variant", VARIANTS)
def test_as_torch_counts(make_model, variant):
    model = make_model(**VARIANTS[variant]).train()
    x = torch.randint(4, VOCABULARY, (3, CONTEXT))
    # torch does not count the fused attention of a CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, extra = model(x)
    flops, pairs = model.forward_flops[""], int(extra["moe_stats"][st.PAIRS].sum())
    assert counter.get_total_flops() == x.numel() * flops.per_token + pairs * flops.per_pair
