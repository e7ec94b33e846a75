"""The gate gshard against fairscale's Top2Gate and MOELayer, with the same weights."""

import pytest
import torch
import torch.distributed as dist
from fairscale.nn.moe import MOELayer, Top2Gate, top2gate
from torch import nn

from evomoe_plugin.config.checks import validate
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer
from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.noise import gumbel, sequence_keys

T, B, D, F, E = 24, 2, 8, 10, 6


@pytest.fixture(scope="module")
def group():
    """fairscale exchanges tokens over a process group even if it is of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def fairscale_layer(ours, group):
    """fairscale's layer with the weights of ours."""
    gate, experts = Top2Gate(D, E), nn.ModuleList()
    with torch.no_grad():
        gate.wg.weight.copy_(ours.gate.scorer.weight)
        for e in range(E):
            expert = nn.Sequential(nn.Linear(D, F), nn.ReLU(), nn.Linear(F, D))
            expert[0].weight.copy_(ours.experts.fc1_weight[e])
            expert[0].bias.copy_(ours.experts.fc1_bias[e])
            expert[2].weight.copy_(ours.experts.fc2_weight[e].t())
            expert[2].bias.copy_(ours.experts.fc2_bias[e])
            experts.append(expert)
    return MOELayer(gate, experts, group)


def gradients(layer):
    """Of a layer of fairscale, in our order and shapes."""

    def stacked(part, name):
        return torch.stack([getattr(expert[part], name).grad for expert in layer.experts])

    return {
        "gate.scorer.weight": layer.gate.wg.weight.grad,
        "experts.fc1_weight": stacked(0, "weight"),
        "experts.fc1_bias": stacked(0, "bias"),
        "experts.fc2_weight": stacked(2, "weight").transpose(1, 2),
        "experts.fc2_bias": stacked(2, "bias"),
    }


def tokens(ours, kind):
    """[T, D], of which none or many are dropped."""
    if kind == "uneven":
        return torch.randn(T, D) + 6 * ours.gate.scorer.weight[1].detach()
    # Expert t first and t + 1 second: every expert is asked for 2 T / E times.
    wanted = torch.stack(
        [2.0 * (torch.arange(E) == t % E) + (torch.arange(E) == (t + 1) % E) for t in range(T)]
    )
    with torch.no_grad():
        ours.gate.scorer.weight.copy_(torch.eye(E, D) + 0.01 * torch.randn(E, D))
    return torch.cat([wanted, torch.randn(T, D - E)], dim=1)


@pytest.mark.parametrize("kind", ["even", "uneven"])
@pytest.mark.parametrize("policy", ["all", "sampling"])
def test_outputs_gradients_and_loss(moe_options, group, monkeypatch, kind, policy):
    options = moe_options(
        decoder_embed_dim=D,
        decoder_ffn_embed_dim=F,
        moe_expert_count=str(E),
        moe_gate="gshard",
        moe_second_expert_policy=policy,
        moe_capacity_factor=1.0,
    )
    validate(options)
    ours = build_layer(LayerInfo(D, E), options, nn.functional.relu)
    x = tokens(ours, kind)
    theirs = fairscale_layer(ours, group)
    keys = sequence_keys(torch.arange(T).unsqueeze(0))[0]
    noise = torch.zeros(T, E)
    if policy == "sampling":
        noise = gumbel(ours.context(token_keys_T=keys).noise_keys_T, E)
        if kind == "even":
            noise = 1e-3 * noise  # more would make the load uneven
            monkeypatch.setattr("evomoe_plugin.gates.gshard.gumbel", lambda *_: noise)
    monkeypatch.setattr(top2gate, "gumbel_rsample", lambda shape, device: noise)

    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, aux, stats = ours(ours_x, None, keys)
    dropped = stats[st.DROPPED]
    assert dropped == 0 if kind == "even" else dropped > T / 4
    theirs_y = theirs(theirs_x.view(T // B, B, D)).view(T, D)
    assert torch.allclose(y, theirs_y, atol=1e-6)
    # It averages over experts where the formula, and fairseq's gate after it, sums and multiplies.
    theirs_aux = E**2 * theirs.l_aux
    assert torch.allclose(aux, theirs_aux, atol=1e-6)

    seed = torch.randn(T, D)
    ((y * seed).sum() + aux.sum()).backward()
    ((theirs_y * seed).sum() + theirs_aux).backward()
    assert torch.allclose(ours_x.grad, theirs_x.grad, atol=1e-5)
    wanted = gradients(theirs)
    for name, parameter in ours.named_parameters():
        assert torch.allclose(parameter.grad, wanted.pop(name), atol=1e-5), name
    assert not wanted
