"""A run's state as one file has it, with experts in two layers, and how to compare two."""

import torch
from fairseq import checkpoint_utils

from evomoe_plugin.checkpoint.expert_shards import ExpertShards, manifest_of, merge
from evomoe_plugin.checkpoint.initial_state import initial_checkpoint
from evomoe_plugin.checkpoint.load import read_state
from evomoe_plugin.config.options import MoEOptions

COUNTS = {1: 4, 3: 8}
SHAPES = {"fc1_weight": (6, 5), "fc1_bias": (6,), "fc2_weight": (6, 5), "fc2_bias": (5,)}
UPDATE = 10


def whole_state(seed=0, update=UPDATE, with_optimizer=True):
    """What a run without divided experts would have saved."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator)

    weights = {"decoder.version": numbers(1), "decoder.embed_tokens.weight": numbers(11, 5)}
    for layer in range(4):
        prefix = f"decoder.layers.{layer}."
        weights[f"{prefix}self_attn.out_proj.weight"] = numbers(5, 5)
        if layer not in COUNTS:
            continue
        count = COUNTS[layer]
        weights[f"{prefix}moe.num_updates"] = torch.tensor(update)
        weights[f"{prefix}moe.gate.scorer.weight"] = numbers(count, 5)
        for name, shape in SHAPES.items():
            weights[f"{prefix}moe.experts.{name}"] = numbers(count, *shape)
        weights[f"{prefix}moe.experts.fc1_frozen"] = numbers(count, 6, 5) > 1
        weights[f"{prefix}moe.shared.fc1_weight"] = numbers(1, 6, 5)
    weights["decoder.layer_norm.weight"] = numbers(5)
    model = {
        **vars(MoEOptions()),
        "_name": "transformer_lm_gpt_moe",
        "moe_expert_count": "4,8",
        "moe_max_experts": 0,
        "decoder_layers": 4,
    }
    cfg = {
        "model": model,
        "optimizer": {"_name": "adam"},
        "distributed_training": {"distributed_world_size": 1},
    }
    state = initial_checkpoint(cfg, weights, criterion="MoECrossEntropyCriterion")
    state["optimizer_history"][-1]["num_updates"] = update
    if with_optimizer:
        trained = parameters(state)
        state["last_optimizer_state"] = {
            "state": {
                i: {
                    "step": update,
                    "exp_avg": numbers(*weights[name].shape),
                    "exp_avg_sq": numbers(*weights[name].shape).abs(),
                }
                for i, name in enumerate(trained)
            },
            "param_groups": [{"lr": 0.1, "params": list(range(len(trained)))}],
            "loss_scale": 4.0,
        }
    return state


def parameters(state):
    return [
        name for name in state["model"] if not name.endswith(("version", "num_updates", "_frozen"))
    ]


def save(path, **given):
    state = whole_state(**given)
    torch.save(state, path)
    return state


def assert_same_state(path, wanted):
    """The file holds what `wanted` does, in the same order; fairseq reads its model."""
    state = read_state(str(path))
    manifest = manifest_of(state, str(path))
    if manifest is not None:
        merge(state, ExpertShards(str(path), manifest))
    assert_same(state, wanted)
    model = checkpoint_utils.load_checkpoint_to_cpu(str(path))["model"]
    assert list(model) == list(wanted["model"])
    assert all(torch.equal(value, wanted["model"][name]) for name, value in model.items())


def assert_same(state, wanted):
    """Equal states, names and entries in the same order."""
    assert "moe_experts" not in state
    assert list(state["model"]) == list(wanted["model"])
    for name, value in wanted["model"].items():
        assert torch.equal(state["model"][name], value), name
        assert state["model"][name].dtype == value.dtype
    assert state["optimizer_history"] == wanted["optimizer_history"]
    before, after = wanted["last_optimizer_state"], state["last_optimizer_state"]
    assert (before is None) == (after is None)
    if before is not None:
        assert {**after, "state": None} == {**before, "state": None}
        assert list(after["state"]) == list(before["state"])
        for i, entry in before["state"].items():
            assert after["state"][i].keys() == entry.keys()
            for key, value in entry.items():
                assert torch.equal(
                    torch.as_tensor(after["state"][i][key]), torch.as_tensor(value)
                ), (i, key)
