"""Checkpoints of fairseq's moe branch, in its own layout of files and names."""

import re

import pytest
import torch
from fairseq import models
from omegaconf import OmegaConf

from evomoe_plugin.cli import main
from tests.evolve.dense_models import (
    VOCABULARY,
    build,
    dense_config,
    dictionary_of,
    task_of,
    tokens,
)

RANKS = 2
OWN = {"moe_freq": 2, "moe_expert_count": 4, "moe_second_expert_policy": "all"}


def theirs(folder, ranks=RANKS, change=lambda states: None, **given):
    """Files of the branch: 4 experts of width 24 in layers 1 and 3, divided over `ranks`."""
    run = dense_config("--decoder-normalize-before")
    torch.manual_seed(3)
    dense = models.build_model(run.model, task_of(dictionary_of()))
    cfg = OmegaConf.to_container(run, resolve=True, enum_to_str=True)
    cfg["model"] |= {**OWN, "moe_top1_expert": False, "moe_gating_use_fp32": True, **given}
    shared, local = {}, [{} for _ in range(ranks)]
    for name, value in dense.state_dict().items():
        match = re.match(r"(decoder\.layers\.[13])\.(fc[12]\.(weight|bias))", name)
        if match is None:
            shared[name] = value
            continue
        for expert in range(4):
            rank, own = divmod(expert, 4 // ranks)
            key = f"{match[1]}.moe_layer.experts.{own}.{match[2]}"
            local[rank][key] = value + 0.2 * torch.randn_like(value)
    for layer in (1, 3):
        shared[f"decoder.layers.{layer}.moe_layer.gate.wg.weight"] = torch.randn(4, 16)
    states = {"shared": shared, **{f"rank-{rank}": w for rank, w in enumerate(local)}}
    change(states)
    for name, weights in states.items():
        torch.save(
            {
                "args": None,
                "cfg": cfg,
                "model": weights,
                "criterion": None,
                "optimizer_history": [
                    {
                        "criterion_name": "MoECriterion",
                        "optimizer_name": "FairseqAdam",
                        "lr_scheduler_state": {},
                        "num_updates": 7,
                    }
                ],
                "task_state": {},
                "extra_state": {
                    "train_iterator": {"version": 2, "epoch": 1, "iterations_in_epoch": 0}
                },
                "last_optimizer_state": None,
            },
            folder / f"model-{name}.pt",
        )
    return dense.eval(), states


class OneByOne(torch.nn.Module):
    """The MoE layer of the branch in the place of fc1, from its formula: without capacity, weights
    g1 and g2 of the two best experts, divided by their sum; or g1 of the best one."""

    def __init__(self, layer, states, ranks, top1):
        super().__init__()
        name = f"decoder.layers.{layer}.moe_layer"
        self.gate = states["shared"][f"{name}.gate.wg.weight"]
        self.k = 1 if top1 else 2
        local = 4 // ranks
        self.experts = [
            {
                part: states[f"rank-{e // local}"][f"{name}.experts.{e % local}.{part}"]
                for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
            }
            for e in range(4)
        ]

    def forward(self, x):
        y = torch.zeros_like(x)
        for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:2])):
            token = x[tuple(place)]
            weights, chosen = (self.gate @ token).softmax(0).topk(self.k)
            if self.k == 2:
                weights = weights / weights.sum()
            for weight, e in zip(weights, chosen, strict=True):
                own = self.experts[e]
                hidden = torch.nn.functional.gelu(own["fc1.weight"] @ token + own["fc1.bias"])
                y[tuple(place)] += weight * (own["fc2.weight"] @ hidden + own["fc2.bias"])
        return y


@torch.no_grad()
@pytest.mark.parametrize("ranks, top1", [(1, False), (2, False), (4, True)])
def test_logits_are_those_of_the_formula(tmp_path, capsys, ranks, top1):
    dense, states = theirs(tmp_path, ranks, moe_top1_expert=top1)
    out = tmp_path / "moe.pt"
    assert main(["checkpoint", "import", str(tmp_path / "model-shared.pt"), str(out)]) == 0
    gate = "switch" if top1 else "gshard"
    assert f"4 layers of width 16, 4 experts, gate {gate}" in capsys.readouterr().out
    for layer in (1, 3):
        block = dense.decoder.layers[layer]
        block.fc1, block.fc2 = OneByOne(layer, states, ranks, top1), torch.nn.Identity()
        block.activation_fn = lambda x: x
    ours = build(torch.load(out, weights_only=True), dictionary_of(VOCABULARY))
    x = tokens()
    real = x != 1
    torch.testing.assert_close(ours(x)[0][real], dense(x)[0][real], rtol=0, atol=1e-5)


BAD = [
    ({}, lambda s: s.pop("rank-1"), "has 4 experts in each layer, the 1 files of ranks"),
    ({}, lambda s: [s.pop("rank-0"), s.pop("rank-1")], "there is no model-rank-0.pt beside it"),
    ({}, lambda s: s["shared"].pop("decoder.layer_norm.bias"), "have no decoder.layer_norm.bias"),
    ({}, lambda s: s["shared"].update(extra=torch.ones(1)), "have extra, which has no place"),
    (
        {},
        lambda s: s["rank-1"].pop("decoder.layers.3.moe_layer.experts.0.fc1.weight"),
        "an expert of decoder.layers.3.moe.experts.fc1_weight is missing or not finite",
    ),
    ({"use_xmoe": True}, lambda s: None, "was trained with --use-xmoe True"),
    ({"moe_freq": 4}, lambda s: None, "its experts are not in the layers [3]"),
]


@pytest.mark.parametrize("given, change, message", BAD, ids=[m[:30] for *_, m in BAD])
def test_what_cannot_be_imported_is_one_line(tmp_path, capsys, given, change, message):
    theirs(tmp_path, change=change, **given)
    out = tmp_path / "moe.pt"
    assert main(["checkpoint", "import", str(tmp_path / "model-shared.pt"), str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()
