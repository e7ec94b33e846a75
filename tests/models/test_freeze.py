"""Frozen parameters: which they are, and how they are separated for FSDP."""

import pytest
import torch
from torch import nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.models.freeze import WORDS, trained_names, wrap_apart
from tests.models.conftest import BOTH_FAMILIES
from tests.models.test_encoders import BOTH, batch, last_tokens, make  # noqa: F401

ALL = {
    "decoder_learned_pos": True,
    "layernorm_embedding": True,
    "moe_gate": "top_p",
    "moe_shared_experts": 1,
    "decoder_input_dim": 8,
}


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_words_divide_all_parameters(make_model):
    names = {name for name, _ in make_model(**ALL).named_parameters()}
    parts = {word: trained_names(names, word) for word in WORDS if word != "head"}
    assert set().union(*parts.values()) == names
    assert sum(map(len, parts.values())) == len(names)
    for word, part in {
        "experts": ".moe.experts.",
        "gate": ".gate.",
        "shared": ".shared.",
        "attention": ".self_attn.",
        "ffn": ".fc",
    }.items():
        assert all(part in name for name in parts[word])
    assert parts["embeddings"] == {
        "decoder.embed_tokens.weight",
        "decoder.embed_positions.weight",
        "decoder.project_in_dim.weight",
        "decoder.output_projection.weight",
    }


def test_words_divide_the_parameters_of_other_decoders(make_model):
    given = {"decoder_qkv_bias": True, "decoder_qk_norm": "joint", "moe_shared_experts": 1}
    names = {name for name, _ in make_model(arch="causal_lm_moe", **given).named_parameters()}
    parts = {word: trained_names(names, word) for word in WORDS if word != "head"}
    assert set().union(*parts.values()) == names
    assert sum(map(len, parts.values())) == len(names)
    assert any(".fc3." in name for name in parts["ffn"])
    assert any(".q_norm." in name for name in parts["attention"])


OF_ENCODERS = {
    "roberta": {"untie_weights_roberta": True},
    "transformer": {"encoder_learned_pos": True, "decoder_output_dim": 8},
}


@BOTH
def test_words_divide_the_parameters_of_encoders_and_decoders(make, family):  # noqa: F811
    given = {"moe_gate": "top_p", "moe_shared_experts": 1, **OF_ENCODERS[family]}
    model = make(family, **given)
    if family == "roberta":
        model.register_classification_head("sentiment", num_classes=2)
    names = {name for name, _ in model.named_parameters()}
    has_head = family == "roberta"
    parts = {word: trained_names(names, word) for word in WORDS if word != "head" or has_head}
    assert set().union(*parts.values()) == names
    assert sum(map(len, parts.values())) == len(names)
    for stack in [prefix.strip("_") or "encoder" for prefix in model.moe_stacks]:
        for word in parts.keys() - {"head"}:
            assert any(name.startswith(stack) for name in parts[word]), (stack, word)
    if has_head:
        kinds = [f"{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")]
        heads = {f"classification_heads.sentiment.{kind}" for kind in kinds}
        assert parts["head"] == heads | {
            "encoder.lm_head.dense.weight",
            "encoder.lm_head.dense.bias",
        }
        assert {"encoder.lm_head.weight", "encoder.lm_head.bias"} < parts["embeddings"]
    else:
        assert "decoder.layers.0.encoder_attn.k_proj.weight" in parts["attention"]


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("roberta", "experts,gate"),
        ("roberta", "head"),
        ("transformer", "experts,norms"),
        ("transformer", "embeddings"),
        ("transformer", "encoder.*attention|encoder.*self_attn"),
        ("transformer", "decoder.*moe"),
    ],
)
def test_an_optimizer_of_what_is_trained_of_both_stacks(make, family, part):  # noqa: F811
    """With activation checkpointing as without; nothing else changes by a bit."""
    given = {"moe_train_only": part, "share_all_embeddings": family == "transformer"}
    if family == "roberta":
        del given["share_all_embeddings"]
    plain, checkpointed = make(family, **given), make(family, **given, checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    before = {name: p.clone() for name, p in plain.named_parameters()}
    inputs = batch(family)
    chosen = trained(plain)
    assert chosen == trained(checkpointed) == trained_names(before, part)
    for model in (plain, checkpointed):
        logits, extra = model(**inputs)
        loss = logits[last_tokens(family, inputs)].square().mean()
        (loss + sum(aux.sum() for aux in extra["moe_aux"].values())).backward()
        torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    others = dict(checkpointed.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen), name
        torch.testing.assert_close(parameter.grad, others[name].grad, rtol=1e-4, atol=1e-6)
        assert parameter.grad is not None or name not in chosen


def test_a_new_classification_head_is_frozen_or_trained(make):  # noqa: F811
    for part, is_trained in (("head", True), ("gate", False), (r"encoder|heads.*out_proj", None)):
        model = make("roberta", moe_train_only=part)
        model.register_classification_head("sentiment", num_classes=2)
        head = {
            name: p.requires_grad
            for name, p in model.classification_heads["sentiment"].named_parameters()
        }
        wanted = {name: "out_proj" in name if is_trained is None else is_trained for name in head}
        assert head == wanted and trained(model)


def test_words_and_expressions(make_model):
    model = make_model(moe_train_only="gate, layers.3.*fc2_weight")
    assert trained(model) == {
        "decoder.layers.1.moe.gate.scorer.weight",
        "decoder.layers.3.moe.gate.scorer.weight",
        "decoder.layers.3.moe.experts.fc2_weight",
    }
    assert all(p.requires_grad for p in make_model().parameters())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"moe_train_only": "exprts"},
            "--moe-train-only exprts: exprts matches no parameter; one of experts, shared",
        ),
        ({"moe_train_only": "experts,("}, r"\( is neither one of experts"),
        ({"moe_train_only": " , "}, "matches no parameter"),
        ({"moe_train_only": "shared"}, "shared matches no parameter"),
        (
            {"moe_train_only": "gate", "moe_spawn_updates": 3},
            "--moe-spawn-updates 3: --moe-train-only gate freezes the experts, which it changes",
        ),
        (
            {
                "moe_train_only": "experts",
                "moe_gate": "top_any",
                "moe_max_experts": 6,
                "moe_adapt_record_interval": 5,
            },
            "--moe-adapt-record-interval 5: .* freezes the gate",
        ),
    ],
)
def test_what_cannot_work(make_model, given, message):
    with pytest.raises(OptionError, match=message):
        make_model(**given)


@pytest.mark.parametrize("part", ["experts,gate", "attention,norms", "embeddings"])
def test_an_optimizer_of_what_is_trained(make_model, part):
    model = make_model(moe_gate="top_p", moe_train_only=part)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits, extra = model(torch.randint(4, 40, (2, 9)))
    (logits.square().mean() + sum(aux.sum() for aux in extra["moe_aux"].values())).backward()
    optimizer.step()
    chosen = trained(model)
    assert chosen == trained_names(before, part)
    assert len(optimizer.state) == len(chosen)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen), name
        assert parameter.grad is not None or name not in chosen


@BOTH_FAMILIES
@pytest.mark.parametrize("part", ["experts", "attention,norms", "layers.3.moe", "gate"])
def test_activation_checkpointing_changes_no_gradient(make_model, part):
    """Also where nothing before the first trained layer asks for one."""
    given = {"moe_gate": "top_p", "moe_train_only": part, "dropout": 0.0, "attention_dropout": 0.0}
    plain, checkpointed = make_model(**given), make_model(**given, checkpoint_activations=True)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randint(4, 40, (2, 9))
    for model in (plain, checkpointed):
        logits, extra = model(x)
        (logits.square().mean() + sum(aux.sum() for aux in extra["moe_aux"].values())).backward()
    wanted = dict(plain.named_parameters())
    for name in trained(plain):
        assert wanted[name].grad is not None and wanted[name].grad.any(), name
    for name, parameter in checkpointed.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, wanted[name].grad), name
        else:
            assert parameter.grad is None, name


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize(
    "train_only",
    [
        "experts",
        "shared",
        "attention",
        "ffn",
        "norms",
        "experts,gate,shared",
        "attention,experts",
        "layers.1.moe",
        "experts,shared,attention,ffn,norms",
    ],
)
def test_parts_are_wrapped_apart(make_model, train_only):
    model = make_model(moe_gate="top_p", moe_shared_experts=1, moe_train_only=train_only)
    assert_wrapped_apart(model, train_only)


def assert_wrapped_apart(model, train_only):
    before = trained(model)
    wrapped = []

    def wrap(module):
        wrapped.append(module)
        return Wrapped(module)

    wrap_apart(model, train_only, wrap)
    inside = {id(p): n for n, module in enumerate(wrapped) for p in module.parameters()}
    for n, module in enumerate(wrapped):
        assert len({p.requires_grad for p in module.parameters()}) == 1, n
    outside = {p.requires_grad for p in model.parameters() if id(p) not in inside}
    assert len(outside) == 1
    assert {name.replace(".inner", "") for name in trained(model)} == before


@pytest.mark.parametrize(
    ("family", "train_only"),
    [
        ("roberta", "experts,attention"),
        ("roberta", "head,norms"),
        ("transformer", "attention,norms"),
        ("transformer", "experts,gate,ffn"),
        ("transformer", "decoder.layers"),
    ],
)
def test_parts_of_both_stacks_are_wrapped_apart(make, family, train_only):  # noqa: F811
    model = make(family, moe_gate="top_p", moe_train_only=train_only)
    assert_wrapped_apart(model, train_only)


@pytest.mark.parametrize(
    ("train_only", "message"),
    [
        (
            "gate",
            "the gate decoder.layers.1.moe.gate apart from its experts: train "
            "experts,gate,shared, or",
        ),
        ("gate,shared", "the gate decoder.layers.1.moe.gate apart from its experts"),
        (
            "embeddings",
            "decoder.embed_tokens, whose weights may be tied, .*: leave embeddings out, or",
        ),
        ("gate.scorer", "the gate decoder.layers.1.moe.gate apart from its experts"),
        (
            "experts.fc1",
            "a part of decoder.layers.1.moe.experts .*: match all of its parameters, not "
            "fc1_weight alone, or use another --ddp-backend",
        ),
    ],
)
def test_what_cannot_be_wrapped_apart(make_model, train_only, message):
    model = make_model(moe_gate="top_p", moe_shared_experts=1, moe_train_only=train_only)
    with pytest.raises(OptionError, match="fully_sharded cannot shard " + message) as caught:
        wrap_apart(model, train_only, Wrapped)
    assert "\n" not in str(caught.value)
    assert not any(isinstance(module, Wrapped) for module in model.modules())
