"""The gate top_k with gated experts against the MoE blocks of Mixtral and OLMoE in transformers."""

import importlib

import pytest
import torch
from torch import nn

from evomoe_plugin.config.checks import validate
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer

B, LENGTH, D, F, E = 3, 7, 8, 12, 6

# Name in transformers, options of its own, our --moe-top-k-weights.
BLOCKS = {
    "mixtral": ("Mixtral", {"num_local_experts": E}, "renormalized"),
    "olmoe": ("Olmoe", {"num_experts": E, "norm_topk_prob": False}, "raw"),
    "olmoe-renormalized": ("Olmoe", {"num_experts": E, "norm_topk_prob": True}, "renormalized"),
}


def modeling(name):
    """transformers' module of a model and the class of its configuration."""
    module = importlib.import_module(f"transformers.models.{name.lower()}.modeling_{name.lower()}")
    return module, getattr(module, f"{name}Config")


def pair_of_layers(moe_options, name, top_k):
    """transformers' block and our layer, with the same random weights, and their loss."""
    model, own, weights = BLOCKS[name]
    module, config_class = modeling(model)
    config = config_class(
        hidden_size=D, intermediate_size=F, num_experts_per_tok=top_k, hidden_act="silu", **own
    )
    theirs = getattr(module, f"{model}SparseMoeBlock")(config)
    options = moe_options(
        decoder_embed_dim=D,
        decoder_ffn_embed_dim=F,
        moe_expert_count=str(E),
        moe_gate="top_k",
        moe_top_k=top_k,
        moe_top_k_weights=weights,
        moe_expert_gated=True,
    )
    validate(options)
    ours = build_layer(LayerInfo(D, E), options, nn.functional.silu)
    with torch.no_grad():
        ours.gate.scorer.weight.mul_(3)
        theirs.gate.weight.copy_(ours.gate.scorer.weight)
        theirs.experts.gate_up_proj.copy_(
            torch.cat([ours.experts.fc1_weight, ours.experts.fc3_weight], dim=1)
        )
        theirs.experts.down_proj.copy_(ours.experts.fc2_weight.transpose(1, 2))
    return theirs, ours, module.load_balancing_loss_func


def gradients(theirs):
    """In our names and shapes."""
    gate_grad, up_grad = theirs.experts.gate_up_proj.grad.chunk(2, dim=1)
    return {
        "gate.scorer.weight": theirs.gate.weight.grad,
        "experts.fc1_weight": gate_grad,
        "experts.fc3_weight": up_grad,
        "experts.fc2_weight": theirs.experts.down_proj.grad.transpose(1, 2),
    }


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padding", [False, True])
def test_outputs_gradients_and_loss(moe_options, name, top_k, padding):
    theirs, ours, balance_loss = pair_of_layers(moe_options, name, top_k)
    mask = torch.rand(B, LENGTH) < 0.7 if padding else torch.ones(B, LENGTH, dtype=torch.bool)
    x = torch.randn(B, LENGTH, D)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, aux, _ = ours(ours_x.view(-1, D), mask.view(-1) if padding else None)
    y = y.view(B, LENGTH, D)
    theirs_y = theirs(theirs_x)
    assert torch.allclose(y[mask], theirs_y[mask], atol=1e-6)
    assert not y[~mask].any()  # their block works on padding too
    logits = theirs_x.view(-1, D) @ theirs.gate.weight.t()
    theirs_aux = balance_loss((logits,), E, top_k, mask.long() if padding else None)
    assert torch.allclose(aux, theirs_aux, atol=1e-6)

    seed = torch.randn(B, LENGTH, D) * mask.unsqueeze(2)
    ((y * seed).sum() + aux.sum()).backward()
    ((theirs_y * seed).sum() + theirs_aux).backward()
    assert torch.allclose(ours_x.grad, theirs_x.grad, atol=1e-5)
    wanted = gradients(theirs)
    for parameter_name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, wanted.pop(parameter_name), atol=1e-5), parameter_name
    assert not wanted
