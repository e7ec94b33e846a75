"""Design invariants 4, 5, 6 and 10 on whole models, and what stops a run."""

import pytest
import torch

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.models.moe_stack import NonFiniteError
from evomoe_plugin.routing import stats as st
from tests.models.conftest import BOTH_FAMILIES

PAD, EOS = 1, 2
STAGES = {"dense": 0, "annealing": 25, "hard": 60}  # of 100 updates, annealed over 30


def tokens(rows=3, length=12):
    return torch.randint(4, 40, (rows, length))


def check_causality(model, stage):
    model.eval().set_num_updates(STAGES[stage])
    x = tokens()
    y = model(x)[0]
    for t in (1, 5, 11):
        changed = x.clone()
        changed[:, t] = (changed[:, t] - 3) % 36 + 4
        assert torch.allclose(model(changed)[0][:, :t], y[:, :t], atol=1e-5)
        assert not torch.allclose(model(changed)[0][:, t:], y[:, t:], atol=1e-5)


@BOTH_FAMILIES
@pytest.mark.parametrize("stage", STAGES)
def test_causality_in_evaluation(make_model, stage):
    check_causality(make_model(), stage)


def test_causality_with_learned_positions(make_model):
    check_causality(make_model(decoder_learned_pos=True), "annealing")


@BOTH_FAMILIES
@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_depends_on_no_other_sequence_and_no_padding(make_model, stage):
    model = make_model().eval()
    model.set_num_updates(STAGES[stage])
    x = tokens(5)
    whole = model(x)[0]
    for i in range(5):
        assert torch.allclose(model(x[i : i + 1])[0][0], whole[i], atol=1e-5)
    order = torch.randperm(5)
    assert torch.allclose(model(x[order])[0], whole[order], atol=1e-5)
    padded = torch.nn.functional.pad(x, (0, 7), value=PAD)
    assert torch.allclose(model(padded)[0][:, :12], whole, atol=1e-5)


@BOTH_FAMILIES
@pytest.mark.parametrize("stage", STAGES)
def test_incremental_decoding_equals_full(make_model, stage):
    model = make_model().eval()
    model.set_num_updates(STAGES[stage])
    x = tokens()
    full = model(x)[0]
    state = {}
    for t in range(x.size(1)):
        step = model.decoder(x[:, : t + 1], incremental_state=state)[0]
        assert step.size(1) == 1
        assert torch.allclose(step[:, 0], full[:, t], atol=1e-5)


@BOTH_FAMILIES
@pytest.mark.parametrize("stage", STAGES)
def test_activation_checkpointing_changes_nothing(make_model, stage):
    plain = make_model(dropout=0.1, activation_dropout=0.1)
    checkpointed = make_model(dropout=0.1, activation_dropout=0.1, checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = tokens()
    x[0, -3:] = PAD
    results = []
    for model in (plain, checkpointed):
        model.train().set_num_updates(STAGES[stage])
        torch.manual_seed(3)
        y, extra = model(x)
        loss = y.logsumexp(-1).sum() + 0.1 * extra["moe_aux"]["balance"].sum()
        loss.backward()
        results.append((loss, extra["moe_stats"], [p.grad for p in model.parameters()]))
    (loss, stats, grads), (other_loss, other_stats, other_grads) = results
    assert torch.equal(loss, other_loss)
    for name in stats:
        assert torch.equal(stats[name], other_stats[name]), name
    for a, b in zip(grads, other_grads, strict=True):
        assert torch.equal(a, b)


@BOTH_FAMILIES
def test_the_auxiliary_loss_reaches_every_gate(make_model):
    model = make_model(checkpoint_activations=True)
    _, extra = model(tokens())
    assert extra["moe_aux"]["balance"].shape == (2,)
    extra["moe_aux"]["balance"].sum().backward()
    for layer in model.decoder.moe_layers:
        assert layer.gate.scorer.weight.grad.abs().sum() > 0


def test_statistics_of_unequal_layers_are_padded_with_nan(make_model):
    stats = make_model(moe_expert_count="2,5")(tokens())[1]["moe_stats"]
    assert stats[st.LOAD_E].shape == (2, 5)
    assert stats[st.LOAD_E].isnan().tolist() == [[False] * 2 + [True] * 3, [False] * 5]
    assert stats[st.TOKENS].tolist() == [36, 36]


@BOTH_FAMILIES
def test_layer_drop_leaves_statistics_in_place(make_model):
    model = make_model(decoder_layerdrop=0.99)
    stats = model(tokens())[1]["moe_stats"]
    assert stats[st.LOAD_E].shape == (2, 4)


@BOTH_FAMILIES
def test_noise_is_the_same_in_any_split_of_the_batch(make_model):
    model = make_model().train()
    x = tokens(6)
    whole = model(x)[0]
    parts = torch.cat([model(x[:2])[0], model(x[2:])[0]])
    assert torch.allclose(whole, parts, atol=1e-5)


@pytest.mark.parametrize(
    "break_it, where",
    [
        (lambda d: d.layers[3].moe.gate.scorer.weight, "decoder.layers.3.moe: gate logits"),
        (lambda d: d.layers[1].moe.experts.fc2_bias, "decoder.layers.3.moe: gate logits"),
        (lambda d: d.layers[3].moe.experts.fc2_bias, "the output of decoder.layers.3 is NaN"),
        (lambda d: d.layer_norm.bias, "the output of decoder.layer_norm is NaN"),
    ],
)
def test_nan_stops_training_and_names_the_layer(make_model, break_it, where):
    model = make_model()
    break_it(model.decoder).data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=where):
        model(tokens())


BAD = [
    ({"adaptive_input": True}, "--adaptive-input True: not supported by the MoE architectures"),
    ({"adaptive_softmax_cutoff": "10"}, "--adaptive-softmax-cutoff 10"),
    ({"base_layers": 1}, "--base-layers 1"),
    ({"scale_fc": True}, "--scale-fc True"),
    ({"scale_heads": True}, "--scale-heads True"),
    ({"quant_noise_pq": 0.1}, "--quant-noise-pq 0.1"),
    (
        {"decoder_output_dim": 8, "share_decoder_input_output_embed": True},
        "--decoder-output-dim 8: with --share-decoder-input-output-embed it must be 16",
    ),
    ({"moe_freq": 9}, "--moe-freq 9: gives no MoE layer"),
]


@pytest.mark.parametrize("given, message", BAD, ids=[m.split(":")[0] for _, m in BAD])
def test_what_does_not_go_together_is_refused(make_model, given, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        make_model(**given)


@BOTH_FAMILIES
def test_a_checkpoint_of_another_dictionary_is_refused(make_model):
    model = make_model()
    state = model.state_dict()
    state["decoder.embed_tokens.weight"] = torch.zeros(33, 16)
    with pytest.raises(OptionError, match="dict.txt: has 40 token ids, the checkpoint has 33"):
        model.load_state_dict(state)


@BOTH_FAMILIES
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_accurate", "swish"])
def test_activations_of_dense_and_moe_layers(make_model, activation, gated):
    model = make_model(activation_fn=activation, moe_expert_gated=gated)
    model(tokens())[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
