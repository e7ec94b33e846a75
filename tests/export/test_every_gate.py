"""Logits of the exported model equal ours, for every gate in every training state."""

import pytest
import torch

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.export.remote.gate_evomoe import _best
from evomoe_plugin.gates import gate_class
from tests.gates.test_every_gate import cases, label

PAD = 1


def tokens(rows=3, length=11):
    x = torch.randint(4, 40, (rows, length))
    x[:, 0] = 2
    return x


def cases_of_models():
    for given in cases():
        yield given, 0
        if given["moe_gate"] in ("dense_to_sparse", "stable"):
            yield given, 60
    for given in cases(of_the_gate=False, also_of_the_layer=True):
        if "moe_eval_capacity_factor" not in given:
            yield given, 0
    for gate in ("reached", "top1", "dense"):
        yield (
            {"moe_gate": "dense_to_sparse", "moe_eval_gate": gate, "moe_temperature_start": 0.6},
            20,
        )
    yield {"moe_gate": "dense_to_sparse", "moe_gating_use_fp32": "false"}, 20
    yield {"moe_gate": "top_k", "moe_shared_experts": 2, "moe_shared_combine": "sigmoid"}, 20
    for gate in ("top_k", "top_any", "hash"):
        yield {"moe_gate": gate, "moe_spawn_updates": 10, "moe_shared_experts": 1}, 5
        yield {"moe_gate": gate, "moe_spawn_updates": 10, "moe_shared_experts": 1}, 15
    yield (
        {
            "moe_gate": "dense_to_sparse",
            "moe_spawn_updates": 10,
            "moe_null_experts": 1,
            "moe_shared_experts": 1,
            "moe_shared_combine": "mix",
        },
        5,
    )


@pytest.mark.parametrize(
    "given, updates",
    list(cases_of_models()),
    ids=lambda v: label(v) if isinstance(v, dict) else str(v),
)
@torch.no_grad()
def test_logits_are_equal(make_trained, exported, given, updates):
    trained = make_trained(updates, **given)
    model = exported(trained)
    x = tokens()
    wanted = trained.model(x)[0]
    assert wanted.std() > 0.1
    assert torch.allclose(model(x).logits, wanted, atol=1e-5)


@torch.no_grad()
def test_the_bias_of_loss_free_balancing(make_trained, exported):
    trained = make_trained(moe_gate="top_k", moe_bias_update_rate=0.05)
    before = trained.model(tokens())[0]
    for layer in trained.model.decoder.moe_layers:
        layer.gate.bias_C.copy_(torch.tensor([3, -7, 9, 0, -4]) / 10)
    torch.manual_seed(0)
    x = tokens()
    model, wanted = exported(trained), trained.model(x)[0]
    assert torch.allclose(model(x).logits, wanted, atol=1e-5)
    assert not torch.allclose(wanted, before, atol=1e-3)


@pytest.mark.parametrize("updates", [0, 30, 60])
@pytest.mark.parametrize("gate", ["top_k", "dense_to_sparse"])
@torch.no_grad()
def test_running_means_and_a_table_that_decays(make_trained, exported, gate, updates):
    trained = make_trained(
        updates,
        moe_gate=gate,
        moe_lexical="normal:1",
        moe_lexical_decay_updates=60,
        moe_gate_warmup_updates=60,
        moe_gate_lr_factor=2.0,
        moe_gate_centre=0.9,
        moe_weight_scale="mean",
        moe_bias_update_rate=0.05,
    )
    for layer in trained.model.decoder.moe_layers:
        layer.gate.centred_input.mean_D.copy_(torch.randn(16))
        layer.gate.weight_scale.update(torch.rand(()) + 0.1, torch.ones(()))
        layer.gate.bias_C.copy_(torch.randn(5) / 10)
    model, x = exported(trained), tokens()
    assert torch.allclose(model(x).logits, trained.model(x)[0], atol=1e-5)
    assert ("lexical" in model.config.routing) == (updates < 60)


@pytest.mark.parametrize("with_bias", [0, 1])
@torch.no_grad()
def test_the_bias_of_one_layer_alone(make_trained, exported, with_bias):
    trained = make_trained(moe_gate="top_k", moe_bias_update_rate=0.05)
    trained.model.decoder.moe_layers[with_bias].gate.bias_C.copy_(
        torch.tensor([3, -7, 9, 0, -4]) / 10
    )
    model, x = exported(trained), tokens()
    assert torch.allclose(model(x).logits, trained.model(x)[0], atol=1e-5)
    layers = [model.layers[0], model.layers[2]]
    assert [bool(layer.moe.gate.selection_bias.any()) for layer in layers] == [
        with_bias == 0,
        with_bias == 1,
    ]


@torch.no_grad()
def test_a_bias_is_cast_and_averaged_as_numbers(make_trained, exported):
    trained = make_trained(moe_gate="top_k", moe_bias_update_rate=0.05)
    bias_C = torch.tensor([0.1, -0.2, 0.3, 1e-9, 1.0], dtype=torch.float64) + 0.5
    for layer in trained.model.decoder.moe_layers:
        layer.gate.bias_C.copy_(bias_C)
    model = exported(trained, {"dtype": torch.bfloat16})
    for moved in (model, model.half(), model.to("cpu", torch.float32)):
        gates = [moved.layers[layer].moe.gate for layer in (0, 2)]
        assert all(torch.equal(gate.selection_bias, bias_C) for gate in gates)
    stored = [v for name, v in model.state_dict().items() if name.endswith("selection_bias")]
    assert torch.equal(torch.stack([*stored, -bias_C]).mean(0), bias_C / 3)


def test_layers_that_route_differently_are_refused(make_trained, exported):
    trained = make_trained(moe_gate="top_k")
    trained.model.decoder.moe_layers[1].gate.renormalized = True
    with pytest.raises(
        OptionError,
        match="--moe-gate top_k: layer 2 has routing {.*'normalized': "
        "True.*}, an earlier one .*: the exported model has one",
    ):
        exported(trained)


@pytest.mark.parametrize(
    "given",
    [
        {"moe_gate": "top_k", "moe_scorer": "sigmoid", "moe_top_k_weights": "renormalized"},
        {"moe_gate": "top_k", "moe_scorer": "sigmoid"},
        {"moe_gate": "top_k", "moe_top_k_weights": "renormalized"},
        {"moe_gate": "gshard"},
    ],
    ids=label,
)
@torch.no_grad()
def test_logits_of_a_gate_in_the_hundreds(make_trained, exported, given):
    """Where the scores of selected experts are 0 in fp32, their weights still sum to 1."""
    trained = make_trained(**given)
    lowest = []
    for layer in trained.model.decoder.moe_layers:
        layer.gate.scorer.weight.mul_(200)
        layer.gate.scorer.register_forward_hook(
            lambda module, inputs, logits_TC: lowest.append(logits_TC.topk(2, dim=1)[0].min())
        )
    model, x = exported(trained), tokens(8, 16)
    wanted = trained.model(x)[0]
    assert min(lowest) < -100
    assert torch.allclose(model(x).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("gate", ["top_k", "dense_to_sparse"])
@torch.no_grad()
def test_of_equal_scores_the_first_are_taken(make_trained, exported, gate):
    trained = make_trained(moe_gate=gate, moe_top_k=2)
    for layer in trained.model.decoder.moe_layers:
        layer.gate.scorer.weight[1:] = layer.gate.scorer.weight[0]
    model, x = exported(trained), tokens(8, 16)
    assert torch.allclose(model(x).logits, trained.model(x)[0], atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_compiled_the_same_are_taken_without_a_look_at_ties(k):
    scores = torch.randint(3, (50, 6)).float()
    compiled = torch.compile(_best, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, k).sort(1).values, _best(scores, k).sort(1).values)


@torch.no_grad()
def test_experts_that_cannot_be_reached_are_left_out(make_trained, exported):
    trained = make_trained(
        moe_gate="top_any",
        moe_expert_count="3,2",
        moe_max_experts=6,
        moe_top_any_learned_scale=True,
        moe_top_any_scale=3.0,
    )
    layers = trained.model.decoder.moe_layers
    layers[0].gate.active_E.copy_(torch.tensor([1, 0, 0, 1, 1, 0]).bool())
    for layer in layers:
        layer.gate.threshold.copy_(torch.randn(6) * 0.2)
    model, x = exported(trained), tokens()
    assert model.config.num_experts == [3, 0, 2]
    assert torch.allclose(model(x).logits, trained.model(x)[0], atol=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        {"decoder_learned_pos": True},
        {"no_token_positional_embeddings": True},
        {"decoder_input_dim": 12, "decoder_output_dim": 20},
        {"share_decoder_input_output_embed": True, "no_scale_embedding": True},
        {"layernorm_embedding": True, "no_decoder_final_norm": True, "activation_fn": "relu"},
        {"activation_fn": "swish", "moe_expert_gated": True},
        {"activation_fn": "gelu_accurate", "moe_expert_ffn_dim": 10, "moe_expert_count": "2,7"},
        {"checkpoint_activations": True, "decoder_layerdrop": 0.5},
        {"moe_post_norm": True, "layernorm_embedding": True},
        {"arch": "transformer_lm", "decoder_input_dim": 16, "decoder_output_dim": 16},
        {
            "arch": "transformer_lm",
            "activation_fn": "gelu",
            "decoder_input_dim": 16,
            "decoder_output_dim": 16,
            "decoder_normalize_before": True,
        },
    ],
    ids=label,
)
@torch.no_grad()
def test_models_of_every_kind(make_trained, exported, given):
    trained = make_trained(20, **given)
    model, x = exported(trained), tokens()
    assert torch.allclose(model(x).logits, trained.model(x)[0], atol=1e-5)


GATES = [
    "base",
    "dense",
    "dense_to_sparse",
    "dselect_k",
    "hash",
    "relu",
    "stable",
    "top_any",
    "top_k",
    "top_p",
]


@pytest.mark.parametrize("gate", GATES)
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(make_trained, exported, gate):
    trained = make_trained(20, moe_gate=gate)
    model, x = exported(trained), tokens(1)
    wanted = trained.model(x)[0]
    pad, ones = torch.full((1, 4), PAD), torch.ones(1, 11, dtype=torch.int64)
    left = model(torch.cat([pad, x], 1), attention_mask=torch.cat([pad * 0, ones], 1)).logits
    right = model(torch.cat([x, pad], 1), attention_mask=torch.cat([ones, pad * 0], 1)).logits
    assert torch.allclose(left[:, 4:], wanted, atol=1e-5)
    assert torch.allclose(right[:, :11], wanted, atol=1e-5)


@pytest.mark.parametrize(
    "gate",
    [
        pytest.param(
            gate, marks=[] if gate in ("dense_to_sparse", "top_k", "hash") else pytest.mark.slow
        )
        for gate in GATES
    ],
)
@torch.no_grad()
def test_the_cache_changes_nothing(make_trained, exported, gate):
    trained = make_trained(20, moe_gate=gate, moe_post_norm=gate == "hash")
    model, x = exported(trained), tokens(2)
    whole, cache, parts = model(x).logits, None, []
    for part in x.split([5, 1, 1, 4], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)

    mask = torch.ones_like(x)
    mask[0, :3] = 0
    settings = {
        "attention_mask": mask,
        "max_new_tokens": 9,
        "min_new_tokens": 9,
        "do_sample": False,
    }
    with_cache = model.generate(x, use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(x, use_cache=False, **settings))
    alone = model.generate(x[:1, 3:], use_cache=True, **{**settings, "attention_mask": None})
    assert torch.equal(alone[0], with_cache[0, 3:])


@torch.no_grad()
def test_only_routed_pairs_are_computed(make_trained, exported):
    from torch.utils.flop_counter import FlopCounterMode

    trained = make_trained(moe_gate="top_k", moe_top_k=1)
    model, x = exported(trained), tokens()
    flops = []
    for k in (1, 2, 3):
        for layer in (model.layers[0], model.layers[2]):
            layer.moe.gate.routing["top_k"] = k
        with FlopCounterMode(display=False) as counter:
            model(x)
        flops.append(counter.get_total_flops())
    per_pair = 2 * 2 * 16 * 24
    assert flops[1] - flops[0] == flops[2] - flops[1] == 2 * x.numel() * per_pair


@torch.no_grad()
def test_the_loss_is_that_of_shifted_labels(make_trained, exported):
    model, x = exported(make_trained()), tokens()
    labels = x.clone()
    labels[:, :4] = -100
    output = model(x, labels=labels)
    wanted = torch.nn.functional.cross_entropy(
        output.logits[:, 3:-1].flatten(0, 1), x[:, 4:].flatten()
    )
    assert torch.allclose(output.loss, wanted)


def test_the_loss_of_an_update_does_not_depend_on_its_batches(make_trained, exported):
    """As transformers' Trainer asks for it: the sum over all labels of the update."""
    model, ids = exported(make_trained()), tokens()
    labels = ids.clone()
    labels[0, :8] = labels[2, :3] = -100
    whole = model(ids, labels=labels).loss
    count = (labels[:, 1:] != -100).sum()
    parts = [
        model(ids[row : row + 1], labels=labels[row : row + 1], num_items_in_batch=count).loss
        for row in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole)
    # As Trainer.evaluate joins them.
    assert model.config.keys_to_ignore_at_inference + ["loss"] == ["past_key_values", "loss"]


def test_a_capacity_of_evaluation_is_refused(make_trained, exported, tmp_path):
    trained = make_trained(moe_gate="top_k", moe_eval_capacity_factor=0.5)
    with pytest.raises(OptionError, match="give --without-eval-capacity"):
        exported(trained)
    assert not (tmp_path / "exported").exists()
    assert exported(trained, without_eval_capacity=True).config.num_experts == [5, 0, 5]


def test_a_gate_of_ones_own_is_refused(make_trained, exported, tmp_path):
    trained = make_trained(moe_gate="top_k")
    for layer in trained.model.decoder.moe_layers:
        layer.gate.__class__ = type("Mine", (gate_class("top_k"),), {})
    with pytest.raises(OptionError, match="--moe-gate Mine: only gates of this package can be"):
        exported(trained)
    assert not (tmp_path / "exported").exists()
