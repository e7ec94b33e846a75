"""Decoders and inputs that several files of tests export."""

import torch

LLAMA = {"arch": "causal_lm_moe", "decoder_kv_heads": 1}
# A layer of Phi, but for its activation.
PHI = {
    **LLAMA,
    "decoder_norm": "layer",
    "decoder_qkv_bias": True,
    "decoder_out_bias": True,
    "decoder_ffn": "plain",
    "decoder_ffn_bias": True,
    "decoder_parallel": True,
    "decoder_logits_bias": True,
    "rope_fraction": 0.5,
}


def tokens(rows=3, length=11):
    """Token ids [rows, length], the same at every call, that begin with the end of a text."""
    x = torch.randint(4, 40, (rows, length), generator=torch.Generator().manual_seed(3))
    x[:, 0] = 2
    return x
