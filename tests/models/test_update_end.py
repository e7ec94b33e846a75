"""What gates learn from whole updates: micro-batches summed, some batches left out."""

import pytest
import torch

from evomoe_plugin.routing import stats as st

GIVEN = {"moe_gate": "top_k", "moe_bias_update_rate": 0.01}


def tokens(seed):
    return torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(seed))


def biases(model):
    return torch.stack([layer.gate.bias_C for layer in model.decoder.moe_layers])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bias_follows_the_load_of_all_micro_batches(make_model, checkpointing):
    model = make_model(**GIVEN, checkpoint_activations=checkpointing)
    load = 0
    for seed in (1, 2):
        y, extra = model(tokens(seed))
        load = load + extra["moe_stats"][st.LOAD_E]
        y.sum().backward()  # with checkpointing, a second forward pass
    model.finish_update(1)
    wanted = torch.sign(load.mean(1, keepdim=True) - load)
    assert torch.equal(biases(model), 0.01 * wanted)
    model.finish_update(2)
    assert torch.equal(biases(model), 0.01 * wanted)  # nothing was routed


@pytest.mark.parametrize("checkpointing", [False, True])
def test_running_means_are_of_all_micro_batches(make_model, checkpointing):
    model = make_model(
        moe_gate="switch",
        moe_gate_centre=0.9,
        moe_weight_scale="mean",
        checkpoint_activations=checkpointing,
    )
    inputs, weights = [], []
    gate = model.decoder.moe_layers[1].gate

    def see(module, given, plan):
        inputs.append(given[0].detach())
        weights.append(plan.weights_N.detach())

    for seed in (1, 2):
        hook = gate.register_forward_hook(see)
        y, _ = model(tokens(seed))
        hook.remove()  # before checkpointing's second forward pass
        y.sum().backward()
    model.finish_update(1)
    means = gate.centred_input.mean_D, gate.weight_scale.mean
    assert torch.allclose(means[0], torch.cat(inputs).double().mean(0), atol=1e-6)
    assert torch.allclose(means[1], torch.cat(weights).double().mean(), atol=1e-6)
    model.finish_update(2)  # nothing was routed
    assert torch.equal(means[0], gate.centred_input.mean_D)
    assert torch.equal(means[1], gate.weight_scale.mean)


def test_a_null_expert_has_a_bias_too(make_model):
    model = make_model(**GIVEN, moe_null_experts=1)
    model(tokens(1))
    model.finish_update(1)
    assert biases(model).shape == (2, 5)
    assert biases(model).abs().sum() > 0


@pytest.mark.parametrize("how", ["evaluation", "not recording", "discarded"])
def test_what_does_not_count(make_model, how):
    model = make_model(**GIVEN)
    if how == "evaluation":
        model.eval()(tokens(1))
    elif how == "not recording":
        with model.not_recording():
            model(tokens(1))
    else:
        model(tokens(1))
        model.discard_update()
    model.train().finish_update(1)
    assert not biases(model).any()


def test_the_bias_changes_the_choice_and_not_the_weights(make_model):
    model = make_model(**GIVEN).eval()
    before = model(tokens(1))[1]["moe_stats"][st.LOAD_E]
    for layer in model.decoder.moe_layers:
        layer.gate.bias_C[0] = 1000
    after = model(tokens(1))[1]["moe_stats"][st.LOAD_E]
    assert after[:, 0].tolist() == [36, 36]
    assert before[:, 0].max() < 36


def test_the_bias_survives_half_precision(make_model):
    model = make_model(**GIVEN)
    for layer in model.decoder.moe_layers:
        layer.gate.bias_C[0] = 4.001  # not a number of fp16
    assert (biases(model.half())[:, 0] == 4.001).all()
