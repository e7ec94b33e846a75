"""RoBERTa and the Transformer with MoE layers: the invariants of language models, and equality with
fairseq's own models."""

import types

import pytest
import torch
from fairseq.models import build_model
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerModel
from omegaconf import OmegaConf

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropy
from evomoe_plugin.gates import gate_names
from evomoe_plugin.models.accounting import count_parameters
from evomoe_plugin.routing import stats as st
from tests.models.test_every_gate_in_models import GIVEN

PAD, EOS = 1, 2
SMALL = {
    "moe_expert_count": "4",
    "moe_freq": 2,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "encoder_layers": 2,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 24,
    "encoder_attention_heads": 2,
}
DECODER = {name.replace("encoder", "decoder"): v for name, v in SMALL.items() if "encoder" in name}
ARCHS = {
    "roberta": {"arch": "roberta_tiny_moe", "max_positions": 64, **SMALL},
    "transformer": {"arch": "transformer_tiny_moe", **SMALL, **DECODER},
}
BOTH = pytest.mark.parametrize("family", ARCHS)
GATES = [name for name in gate_names() if name not in ("cautious", "expert_choice")]


@pytest.fixture
def make(task, make_config):
    def build(family, **given):
        return build_model(make_config(**{**ARCHS[family], **given}), task)

    return build


def sentences(lengths, left=False):
    """Token ids of sentences that end with </s>, padded."""
    longest = max(lengths)
    rows = torch.full((len(lengths), longest), PAD)
    for row, n in zip(rows, lengths, strict=True):
        row[slice(longest - n, None) if left else slice(n)] = torch.cat(
            [torch.randint(4, 40, (n - 1,)), torch.tensor([EOS])]
        )
    return rows


def batch(family, lengths=(9, 5, 7)):
    """Inputs of the model, as fairseq's data sets pad them."""
    if family == "roberta":
        return {"src_tokens": sentences(lengths)}
    return {
        "src_tokens": sentences(lengths, left=True),
        "src_lengths": torch.tensor(lengths),
        "prev_output_tokens": sentences([n - 2 for n in lengths]),
    }


def alone(family, given, row):
    """One sentence of a batch, without padding."""
    return {
        name: value[row : row + 1]
        if value.dim() == 1
        else value[row][value[row] != PAD].unsqueeze(0)
        for name, value in given.items()
    }


def last_tokens(family, given):
    return given["src_tokens" if family == "roberta" else "prev_output_tokens"] != PAD


def with_distinct_scores(model):
    """Fresh scores are so close that rounding could change a choice."""
    with torch.no_grad():
        for stack in model.moe_stacks.values():
            for layer in stack.moe_layers:
                for parameter in layer.gate.parameters():
                    if parameter.dim() == 2:
                        parameter.mul_(3)
    return model


# --- equality with fairseq's own models


def stock(family, model, task):
    """fairseq's model with the weights of one with a single expert."""
    given = {name: value for name, value in model.args.items() if not name.startswith("moe_")}
    if family == "roberta":
        given |= {"layernorm_embedding": True, "tokens_per_sample": 64}
    cfg = types.SimpleNamespace(
        **{**given, "adaptive_input": False, "adaptive_softmax_cutoff": None}
    )
    other = (RobertaModel if family == "roberta" else TransformerModel).build_model(cfg, task)
    weights = {}
    for name, value in model.state_dict().items():
        if ".moe.experts." in name:
            layer, part = name.split(".moe.experts.")
            matrix, kind = part.split("_")
            value = value[0].t() if part == "fc2_weight" else value[0]
            weights[f"{layer}.{matrix}.{kind}"] = value
        elif ".moe." not in name:
            weights[name] = value
    other.load_state_dict(weights)
    return other.eval()


@BOTH
@pytest.mark.parametrize("pre_norm", [False, True])
def test_one_expert_equals_the_dense_model(make, task, family, pre_norm):
    given = {"moe_expert_count": "1", "encoder_normalize_before": pre_norm}
    if family == "transformer":
        given |= {"decoder_normalize_before": pre_norm, "share_all_embeddings": pre_norm}
    model = make(family, **given).eval()
    inputs = batch(family)
    real = last_tokens(family, inputs)
    y, extra = model(**inputs)
    wanted, wanted_extra = stock(family, model, task)(**inputs)
    assert torch.allclose(y[real], wanted[real], atol=1e-5)
    if family == "transformer":
        assert torch.allclose(extra["attn"][0][real], wanted_extra["attn"][0][real], atol=1e-5)


def test_stock_attention_is_the_same(make):
    for family in ARCHS:
        inputs = batch(family)
        model = make(family).eval()
        other = make(family, moe_attention="stock").eval()
        other.load_state_dict(model.state_dict())
        real = last_tokens(family, inputs)
        assert torch.allclose(model(**inputs)[0][real], other(**inputs)[0][real], atol=1e-5)


# --- invariants


@BOTH
@pytest.mark.parametrize("gate", GATES)
def test_every_gate(make, task, family, gate):
    """Evaluation depends on no other sentence and no padding; activation checkpointing changes
    neither loss, statistics nor gradients; parameters are counted."""
    options = {"moe_gate": gate, **GIVEN.get(gate, {})}
    options.pop("moe_layers", None)
    model = with_distinct_scores(make(family, **options))
    assert count_parameters(model.args, 40).total == sum(p.numel() for p in model.parameters())
    inputs = batch(family)
    whole = model.eval()(**inputs)[0]
    real = last_tokens(family, inputs)
    for row in range(3):
        y = model(**alone(family, inputs, row))[0][0]
        assert torch.allclose(y, whole[row][real[row]], atol=1e-5)

    checkpointed = make(family, **options, checkpoint_activations=True)
    checkpointed.load_state_dict(model.state_dict())
    results = []
    for each in (model, checkpointed):
        each.train().set_num_updates(3)
        torch.manual_seed(3)
        y, extra = each(**inputs)
        loss = y[real].logsumexp(-1).sum() + sum(aux.sum() for aux in extra["moe_aux"].values())
        loss.backward()
        each.finish_update(4)
        results.append((loss, extra["moe_stats"], dict(each.named_parameters())))
    (loss, stats, parameters), (other_loss, other_stats, others) = results
    assert torch.equal(loss, other_loss)
    for name, value in stats.items():
        assert torch.equal(value.nan_to_num(), other_stats[name].nan_to_num()), name
        if name.endswith(st.TOKENS):  # padding is not routed
            side = "src_tokens" if name != "decoder_tokens" else "prev_output_tokens"
            assert (value == (inputs[side] != PAD).sum()).all()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        # The encoder's is summed over decoder layers in another order.
        assert torch.allclose(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6), name


@BOTH
def test_noise_is_of_the_sentence(make, family):
    """Whatever its neighbours and its padding, on either side."""
    model = make(family).train()
    model.set_num_updates(5)
    inputs = batch(family)
    whole = model(**inputs)[0]
    real = last_tokens(family, inputs)
    for row in range(3):
        y = model(**alone(family, inputs, row))[0][0]
        assert torch.allclose(y, whole[row][real[row]], atol=1e-5)


@pytest.mark.parametrize("gate", ["dense_to_sparse", "top_any", "switch"])
def test_incremental_decoding_equals_full(make, gate):
    model = with_distinct_scores(make("transformer", moe_gate=gate, **GIVEN.get(gate, {}))).eval()
    inputs = batch("transformer")
    full = model(**inputs)[0]
    real = last_tokens("transformer", inputs)
    encoder_out = model.encoder(inputs["src_tokens"])
    order = torch.tensor([2, 0, 1])
    encoder_out = model.encoder.reorder_encoder_out(encoder_out, order)
    written, state = inputs["prev_output_tokens"][order], {}
    for t in range(written.size(1)):
        step = model.decoder(written[:, : t + 1], encoder_out, incremental_state=state)[0]
        here = real[order, t]
        assert torch.allclose(step[here, 0], full[order, t][here], atol=1e-5)


def test_label_smoothing_in_chunks_changes_nothing(make, task):
    model, given = make("transformer"), batch("transformer")
    target = sentences([7, 3, 5])
    sample = {"net_input": given, "target": target, "ntokens": int((target != PAD).sum())}
    results = []
    for chunk in (4, 0):
        model.train().zero_grad()
        criterion = MoELabelSmoothedCrossEntropy(task, False, 0.1, 1, moe_vocab_chunk=chunk)
        loss, size, log = criterion.train()(model, sample)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), log["inner_loss"], log["nll_loss"], *gradients))
        assert size == log["sample_size"] == sample["ntokens"]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_decoder_is_causal_and_the_encoder_is_not(make):
    model = make("transformer").eval()
    inputs = batch("transformer", (6, 6, 6))
    y = model(**inputs)[0]
    changed = inputs["prev_output_tokens"].clone()
    changed[:, 2] = (changed[:, 2] - 3) % 36 + 4
    z = model(**{**inputs, "prev_output_tokens": changed})[0]
    assert torch.allclose(z[:, :2], y[:, :2], atol=1e-5) and not torch.allclose(z[:, 2:], y[:, 2:])
    source = inputs["src_tokens"].clone()
    source[:, 4] = (source[:, 4] - 3) % 36 + 4
    assert not torch.allclose(model(**{**inputs, "src_tokens": source})[0][:, :1], y[:, :1])


def test_experts_of_roberta_start_as_its_other_weights(make):
    model = make("roberta", encoder_embed_dim=64, encoder_ffn_embed_dim=96, moe_shared_experts=1)
    (layer,) = model.encoder.sentence_encoder.moe_layers
    for experts in (layer.experts, layer.shared.experts):
        for name, weight in experts.named_parameters():
            wanted = 0.02 if name.endswith("weight") else 0.0
            assert weight.std().item() == pytest.approx(wanted, rel=0.05)


def test_encoder_and_decoder_place_their_own_layers(make):
    model = make(
        "transformer",
        encoder_layers=4,
        decoder_layers=3,
        encoder_moe_freq=4,
        decoder_moe_layers="0,2",
    )
    assert [model.encoder.layer_name(0)] == ["encoder.layers.3.moe"]
    names = [model.decoder.layer_name(n) for n in range(2)]
    assert names == ["decoder.layers.0.moe", "decoder.layers.2.moe"]
    ids = [layer.gate.info.layer_id for s in model.moe_stacks.values() for layer in s.moe_layers]
    assert ids == [0, 1, 2]
    for given in ({"encoder_moe_layers": "none", "moe_layers": "1"}, {"encoder_moe_freq": 0}):
        dense = make("transformer", **given)
        assert not dense.encoder.moe_layers and len(dense.decoder.moe_layers) == 1
    assert all(
        name.startswith("decoder_") for name in dense(**batch("transformer"))[1]["moe_stats"]
    )


BAD = [
    (
        "transformer",
        {"encoder_moe_freq": 3},
        "--encoder-moe-freq 3: gives no MoE layer in 2 encoder",
    ),
    ("roberta", {"moe_freq": 0}, "--moe-freq 0: give 1 or more; for a model without MoE layers"),
    (
        "transformer",
        {"decoder_moe_layers": "2"},
        "--decoder-moe-layers 2: give layer numbers from 0",
    ),
    ("transformer", {"encoder_moe_start_layer": 2}, "the 2 encoder layers are 0 to 1"),
    ("roberta", {"moe_freq": 3}, "--moe-freq 3: gives no MoE layer in 2 encoder layers"),
    ("roberta", {"moe_expert_size_factor": 5}, r"give a divisor of --encoder-ffn-embed-dim \(24"),
    ("roberta", {"moe_post_norm": True}, "--moe-post-norm True: only language models have it"),
    (
        "transformer",
        {"moe_gate": "expert_choice"},
        "--moe-gate expert_choice: experts choose among",
    ),
    (
        "transformer",
        {"share_all_embeddings": True, "decoder_embed_dim": 32},
        "is not --decoder-embed",
    ),
]


@pytest.mark.parametrize("family, given, message", BAD)
def test_bad_options(make, family, given, message):
    with pytest.raises(OptionError, match=message):
        make(family, **given)


def test_gates_that_are_not_causal_need_no_flag_in_encoders(make, make_config, caplog):
    make("roberta", moe_gate="expert_choice")
    make("transformer", moe_gate="expert_choice", decoder_moe_layers="none")
    validate(make_config(**{**ARCHS["roberta"], "moe_gate": "base"}))
    assert "causal" not in caplog.text


@BOTH
def test_checkpoints_of_other_models_and_dictionaries(make, make_model, family):
    model = make(family)
    language_model = make_model().state_dict()
    with pytest.raises(OptionError, match="the checkpoint is not of a"):
        model.load_state_dict(language_model, model_cfg=OmegaConf.create({}))
    state = model.state_dict()
    name = next(name for name in state if name.endswith("embed_tokens.weight"))
    state[name] = state[name][:-1]
    with pytest.raises(OptionError, match="has 40 token ids, the checkpoint has 39"):
        model.load_state_dict(state, model_cfg=OmegaConf.create({}))


@BOTH
def test_checkpoints_without_the_number_of_their_format(make, make_model, family):
    # fairseq would take them for its first, and leave out the last norm.
    for model in (make(family), make_model()):
        for name in [name for name in model.state_dict() if name.endswith(".version")]:
            state = model.state_dict()
            del state[name]
            with pytest.raises(OptionError, match=f"has no {name}"):
                model.load_state_dict(state, model_cfg=OmegaConf.create({}))
