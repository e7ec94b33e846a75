"""Experts from a dense model: which gates compute the same, what methods make, what is refused."""

import dataclasses
import itertools
import re

import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.convert import convert, write
from evomoe_plugin.evolve.dense_checkpoint import read_dense_checkpoint
from evomoe_plugin.evolve.init_methods import kept_mask, seed_of
from evomoe_plugin.evolve.upcycle import METHODS, Recipe, Upcycling
from evomoe_plugin.gates import Capabilities, gate_class, gate_names, register_gate
from evomoe_plugin.gates.switch import SwitchGate
from tests.evolve.dense_models import (
    SIZES,
    VOCABULARY,
    build,
    dense_model,
    dictionary_of,
    largest_difference,
    save_dense,
    tokens,
)

EXPERTS = 4
ROUNDING = 1e-5
DIFFERS = 1e-3


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "dense.pt")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    dictionary_of().save(str(folder / "dict.txt"))
    return str(folder)


COPY = Recipe()


def made(dense, data=None, recipe=COPY, **given):
    options = {"moe_expert_count": str(EXPERTS), **given}
    return convert(str(dense), options, recipe, data=data, max_update=100)


# Gate and options, and whether copies give the dense model's logits.
GATES = [
    ("dense", {}, True),
    ("dense_to_sparse", {}, True),
    ("dense_to_sparse", {"moe_gate_threshold": 0.0}, True),
    ("dense_to_sparse", {"moe_gate_threshold": 0.0, "moe_combine_weights": "softmax"}, True),
    ("dense_to_sparse", {"moe_eval_gate": "dense"}, True),
    ("dense_to_sparse", {"moe_eval_gate": "top1"}, False),
    ("dense_to_sparse", {"moe_hard_updates": 0}, False),
    ("top_k", {}, False),
    ("top_k", {"moe_top_k": EXPERTS}, True),
    ("top_k", {"moe_top_k_weights": "renormalized"}, True),
    ("top_k", {"moe_top_k_weights": "renormalized", "moe_scorer": "sigmoid"}, True),
    ("top_k", {"moe_top_k": EXPERTS, "moe_scorer": "sigmoid"}, False),
    ("switch", {}, False),
    ("switch", {"moe_expert_count": "1"}, True),
    ("gshard", {}, True),
    ("top_p", {}, True),
    ("top_p", {"moe_top_p_weights": "uniform"}, True),
    ("top_p", {"moe_top_p_weights": "sparsemixer"}, True),
    ("top_p", {"moe_null_experts": 2}, False),
    ("top_any", {}, True),
    ("top_any", {"moe_top_any_weights": "score", "moe_max_experts": 6}, True),
    ("relu", {}, False),
    ("dselect_k", {}, True),
    ("dselect_k", {"moe_expert_count": "3"}, True),
    ("hash", {}, True),
    ("stable", {}, False),
    ("base", {}, False),
    ("expert_choice", {"moe_allow_noncausal": True}, False),
    ("expert_choice", {"moe_allow_noncausal": True, "moe_expert_choice_factor": 4.0}, True),
    # Shared experts.
    ("top_p", {"moe_shared_experts": 2, "moe_shared_combine": "softmax"}, True),
    ("top_any", {"moe_shared_experts": 1, "moe_shared_combine": "mix"}, True),
    ("top_p", {"moe_shared_experts": 2, "moe_shared_combine": "mix"}, False),
    ("top_p", {"moe_shared_experts": 1}, False),
    ("top_p", {"moe_shared_experts": 2, "moe_shared_size_factor": 2}, False),
    # Before the spawn one expert works.
    ("switch", {"moe_spawn_updates": 5}, True),
    ("top_p", {"moe_eval_capacity_factor": 0.5}, False),
]


@pytest.mark.parametrize(
    ("gate", "given", "equal"), GATES, ids=lambda value: str(value).replace("moe_", "")[:60]
)
def test_copies_compute_what_the_dense_model_did_where_the_weights_allow(
    dense, data, gate, given, equal
):
    converted = made(dense, data, moe_gate=gate, **given)
    assert converted.logits.equal is equal
    difference = largest_difference(build(converted.state, dictionary_of()), dense_model(dense))
    if equal:
        assert difference < ROUNDING
    else:
        assert difference > DIFFERS


def test_every_gate_of_ours_is_in_the_table():
    assert {gate for gate, _, _ in GATES} == {
        name for name in gate_names() if not name.startswith(("user", "test"))
    }


class FirstGate(SwitchGate):
    """A user's gate: all tokens to expert 0, with a weight of 1."""

    capabilities = Capabilities(gate_init=False)

    def route(self, x_TD, context):
        choice = super().route(x_TD, context)
        mask_TC = torch.zeros_like(choice.mask_TC).index_fill_(1, torch.tensor([0]), True)
        return dataclasses.replace(choice, mask_TC=mask_TC, weights_TC=mask_TC.to(x_TD.dtype))


def test_a_gate_of_the_users_own_is_measured_too(dense):
    register_gate("test_first")(FirstGate)
    converted = made(dense, moe_gate="test_first")
    assert converted.logits.equal
    difference = largest_difference(build(converted.state, dictionary_of()), dense_model(dense))
    assert difference < ROUNDING
    with pytest.raises(OptionError, match="--gate-init zero: the gate test_first has no weights"):
        made(dense, moe_gate="test_first", recipe=Recipe(gate_init="zero"))


@pytest.mark.parametrize(
    "given",
    [
        {"decoder_learned_pos"},
        {"no_scale_embedding"},
        {"layernorm_embedding"},
        {"share_decoder_input_output_embed"},
        {"no_token_positional_embeddings"},
        {"decoder_normalize_before"},
        {"decoder_normalize_before", "no_decoder_final_norm"},
    ],
    ids=lambda given: "-".join(sorted(given)),
)
def test_every_kind_of_stock_model(tmp_path, given):
    flags = ["--" + name.replace("_", "-") for name in given]
    dense = save_dense(tmp_path / "dense.pt", *flags)
    converted = made(dense, moe_gate="top_p")
    difference = largest_difference(build(converted.state, dictionary_of()), dense_model(dense))
    assert difference < ROUNDING


@pytest.mark.parametrize("activation", ["relu", "gelu_accurate", "tanh"])
def test_activations(tmp_path, activation):
    dense = save_dense(tmp_path / "dense.pt", "--activation-fn", activation)
    converted = made(dense, moe_gate="gshard")
    difference = largest_difference(build(converted.state, dictionary_of()), dense_model(dense))
    assert difference < ROUNDING


def test_other_widths_of_input_and_output(tmp_path):
    dense = save_dense(
        tmp_path / "dense.pt", "--decoder-input-dim", "12", "--decoder-output-dim", "10"
    )
    converted = made(dense, moe_gate="gshard")
    difference = largest_difference(build(converted.state, dictionary_of()), dense_model(dense))
    assert difference < ROUNDING


def experts_of(converted, layer, name):
    return converted.state["model"][f"decoder.layers.{layer}.moe.experts.{name}"]


@pytest.mark.parametrize("method", ["mask", "noise", "reinit"])
def test_experts_differ_pairwise_and_come_from_the_dense_network(dense, method):
    converted = made(dense, moe_gate="top_p", recipe=Recipe(method, seed=5))
    source = read_dense_checkpoint("DENSE", str(dense)).ffn(1)
    stack = experts_of(converted, 1, "fc1_weight")
    for one, other in itertools.combinations(stack, 2):
        assert (one != other).float().mean() > 0.05
    for expert in stack:
        like = torch.corrcoef(torch.stack([expert.flatten(), source["fc1_weight"].flatten()]))
        assert 0.4 < like[0, 1] < 0.999
    other_layer = experts_of(converted, 3, "fc1_weight")
    assert (stack == 0).sum() == 0 or not torch.equal(stack == 0, other_layer == 0)
    again = made(dense, moe_gate="top_p", recipe=Recipe(method, seed=5))
    assert torch.equal(experts_of(again, 1, "fc2_weight"), experts_of(converted, 1, "fc2_weight"))
    other = made(dense, moe_gate="top_p", recipe=Recipe(method, seed=6))
    assert not torch.equal(experts_of(other, 1, "fc1_weight"), stack)


def test_masking_is_that_of_the_spawn(dense):
    converted = made(dense, moe_gate="top_p", recipe=Recipe("mask", rate=0.4, rescale=True))
    source = read_dense_checkpoint("DENSE", str(dense)).ffn(3)["fc2_weight"]
    expert = experts_of(converted, 3, "fc2_weight")[2]
    key = seed_of(1, 1, 2, 0x0C1E)
    kept = kept_mask("fc2_weight", source.shape, "mask", key=key, rate=0.4)
    assert torch.allclose(expert, torch.where(kept, source / 0.6, 0.0))
    assert torch.equal(
        experts_of(converted, 3, "fc2_bias")[2],
        read_dense_checkpoint("DENSE", str(dense)).ffn(3)["fc2_bias"],
    )


@pytest.mark.parametrize("order", ["contiguous", "shuffled"])
@pytest.mark.parametrize(("count", "factor"), [(4, 4), (8, 4), (4, 2), (3, 3)])
def test_slices_hold_every_neuron_and_sum_to_the_dense_network(dense, order, count, factor):
    converted = made(
        dense,
        moe_gate="top_p",
        moe_expert_count=str(count),
        moe_expert_size_factor=factor,
        recipe=Recipe("slice", slices=order),
    )
    source = read_dense_checkpoint("DENSE", str(dense)).ffn(1)
    stacks = {name: experts_of(converted, 1, name) for name in source}
    x = torch.randn(7, SIZES["width"])

    def network(w1, b1, w2, b2):
        return torch.nn.functional.gelu(x @ w1.t() + b1) @ w2 + b2

    wanted = network(*source.values())
    outputs = [network(*(stacks[name][e] for name in source)) for e in range(count)]
    assert torch.allclose(sum(outputs), wanted * (count // factor), atol=1e-5)
    for first in range(0, count, factor):  # each round of slices is the whole
        assert torch.allclose(sum(outputs[first : first + factor]), wanted, atol=1e-5)
    rows = [row for expert in stacks["fc1_weight"][:factor] for row in expert]
    order_of = [int((source["fc1_weight"] == row).all(1).nonzero()) for row in rows]
    assert sorted(order_of) == list(range(SIZES["ffn"]))
    assert (order_of == sorted(order_of)) == (order == "contiguous")


def test_scaled_slices_of_an_even_gate_are_the_dense_model(dense):
    recipe = Recipe("slice", rescale=True, gate_init="zero", slices="shuffled")
    for gate in ("dense", "dense_to_sparse"):
        converted = made(
            dense, moe_gate=gate, moe_expert_count="2", moe_expert_size_factor=2, recipe=recipe
        )
        assert converted.logits.equal
        model = build(converted.state, dictionary_of())
        assert largest_difference(model, dense_model(dense)) < ROUNDING
    for changed in (Recipe("slice", rescale=True), Recipe("slice", gate_init="zero")):
        converted = made(
            dense, moe_gate="dense", moe_expert_count="2", moe_expert_size_factor=2, recipe=changed
        )
        assert not converted.logits.equal


def test_shared_experts_come_from_the_same_network(dense):
    converted = made(
        dense,
        moe_gate="top_p",
        moe_shared_experts=2,
        moe_shared_size_factor=2,
        moe_expert_size_factor=4,
        recipe=Recipe("slice"),
    )
    source = read_dense_checkpoint("DENSE", str(dense)).ffn(1)
    model = converted.state["model"]
    shared = model["decoder.layers.1.moe.shared.experts.fc1_weight"]
    assert torch.equal(shared.flatten(0, 1), source["fc1_weight"])
    assert torch.allclose(
        model["decoder.layers.1.moe.shared.experts.fc2_bias"].sum(0), source["fc2_bias"]
    )


def test_none_leaves_experts_as_initialised(dense):
    one = made(
        dense, moe_gate="top_p", moe_expert_gated=True, moe_expert_ffn_dim=5, recipe=Recipe("none")
    )
    assert experts_of(one, 1, "fc3_weight").shape == (EXPERTS, 5, SIZES["width"])
    assert one.logits.equal is False


@pytest.mark.parametrize(("gate_init", "deviation"), [("zero", 0.0), ("normal:0.02", 0.02)])
def test_weights_of_gates(dense, gate_init, deviation):
    converted = made(
        dense, moe_gate="top_k", moe_expert_count="64", recipe=Recipe(gate_init=gate_init)
    )
    one, other = (
        converted.state["model"][f"decoder.layers.{n}.moe.gate.scorer.weight"] for n in (1, 3)
    )
    assert one.std().item() == pytest.approx(deviation, rel=0.1)
    assert deviation == 0 or not torch.equal(one, other)
    assert converted.state["cfg"]["common"]["seed"] == 1


@pytest.mark.parametrize(("gate_init", "deviation"), [("zero", 0.0), ("normal:0.02", 0.02)])
def test_weights_of_gates_leave_a_lexical_table_alone(dense, gate_init, deviation):
    """Stored are weights and logits over their factors."""
    converted = made(
        dense,
        moe_gate="top_k",
        moe_expert_count="64",
        moe_lexical="hash:3",
        moe_lexical_lr_factor=2.0,
        moe_gate_lr_factor=0.5,
        recipe=Recipe(gate_init=gate_init),
    )
    gate = {
        name.removeprefix("decoder.layers.1.moe.gate."): value
        for name, value in converted.state["model"].items()
    }
    assert 0.5 * gate["scorer.weight"].std().item() == pytest.approx(deviation, rel=0.1)
    table = 2 * gate["lexical.table"]
    assert torch.equal(table.sum(1), torch.full((len(table),), 3.0))
    assert torch.equal(table.amax(1), torch.full((len(table),), 3.0))


def test_half_precision(tmp_path):
    path = save_dense(tmp_path / "dense.pt")
    state = torch.load(path, weights_only=False)
    state["model"] = {name: value.half() for name, value in state["model"].items()}
    torch.save(state, path)
    converted = made(path, moe_gate="top_p")
    assert all(
        value.dtype == torch.float32
        for value in converted.state["model"].values()
        if value.is_floating_point()
    )


ONE_LINE = [
    ({"decoder_embed_dim": 32}, Recipe(), "--decoder-embed-dim 32: the dense checkpoint .* has 16"),
    ({"activation_fn": "relu"}, Recipe(), "--activation-fn relu: .* has gelu"),
    (
        {"moe_expert_size_factor": 2},
        Recipe(),
        "--moe-expert-size-factor 2: experts of width 12 are no copy of .* width 24",
    ),
    (
        {"moe_expert_ffn_dim": 7},
        Recipe("slice"),
        "--moe-expert-ffn-dim 7: the dense model's width 24 cannot be cut",
    ),
    (
        {"moe_expert_size_factor": 3},
        Recipe("slice"),
        "--moe-expert-count 4: 4 experts cannot hold 3 slices",
    ),
    ({"moe_shared_experts": 1, "moe_shared_ffn_dim": 7}, Recipe(), "--moe-shared-ffn-dim 7: "),
    ({"moe_expert_gated": True}, Recipe(), "--moe-expert-gated True: the dense model's"),
    ({"moe_gate": "nothing"}, Recipe(), "--moe-gate nothing: unknown gate"),
    ({"moe_gate": "hash"}, Recipe(), "--moe-hash balanced: needs the token counts .* give --data"),
    ({}, Recipe("half"), "--method half: one of: copy, mask"),
    ({}, Recipe("mask", rate=1.0), "--rate 1.0: it is a share"),
    ({}, Recipe("copy", rate=0.5), "--rate 0.5: the method copy has no rate"),
    ({}, Recipe("copy", rescale=True), "--rescale True: the method copy"),
    ({}, Recipe(slices="shuffled"), "--slices shuffled: the method copy cuts nothing"),
    ({}, Recipe(gate_init="normal:x"), "--gate-init normal:x: give default, zero or|--gate-init"),
    (
        {"moe_scorer": "cosine"},
        Recipe(gate_init="zero"),
        "--gate-init zero: the gate top_p with --moe-scorer cosine cannot learn",
    ),
    (
        {"moe_gate": "top_any"},
        Recipe(gate_init="zero"),
        "--gate-init zero: the gate top_any cannot learn from weights of 0",
    ),
    (
        {"moe_gate": "relu"},
        Recipe(gate_init="zero"),
        "--gate-init zero: the gate relu cannot learn from weights of 0",
    ),
    (
        {"moe_gate": "dense"},
        Recipe(gate_init="zero"),
        "--gate-init zero: with it the gate dense treats all experts alike, .* for ever",
    ),
    (
        {"moe_gate": "expert_choice", "moe_allow_noncausal": True},
        Recipe(gate_init="zero"),
        "--gate-init zero: with it the gate expert_choice treats all experts alike",
    ),
    (
        {"moe_gate": "dense", "moe_expert_size_factor": 2},
        Recipe("slice", gate_init="zero"),
        "--gate-init zero: with it the gate dense",
    ),
    (
        {"moe_gate": "dense", "moe_spawn_updates": 5, "moe_spawn_method": "copy"},
        Recipe(gate_init="zero"),
        "--gate-init zero: with it the gate dense",
    ),
    *(
        (
            {"moe_spawn_updates": 5},
            Recipe(method),
            f"--method {method}: --moe-spawn-updates makes all experts from the first .*: "
            "give copy or",
        )
        for method in ("mask", "noise", "reinit", "slice")
    ),
    ({}, Recipe("noise", rate=0.0), "--rate 0.0: give a number above 0"),
    ({"dropout": 7.0}, Recipe(), "--dropout 7.0: it is a probability: give a number from 0 to 1"),
    ({}, Recipe("mask", rate=1.0, in_run=True), "--moe-init-rate 1.0: "),
    ({}, Recipe(gate_init="x", in_run=True), "--moe-init-gate x: "),
]


@pytest.mark.parametrize(
    ("gate", "given", "dropout", "parted"),
    [
        ("dense", {}, 0.0, False),
        ("dense", {}, 0.2, True),
        ("expert_choice", {"moe_allow_noncausal": True}, 0.0, False),
        ("gshard", {}, 0.0, True),
    ],
)
def test_copies_and_a_gate_of_zeros_part_or_not(dense, gate, given, dropout, parted):
    """What the refusal of `Capabilities.keeps_copies_equal` rests on."""
    state = made(dense, moe_gate=gate, activation_dropout=dropout, **given).state
    model = build(state, dictionary_of()).train()
    for name, parameter in model.named_parameters():
        if ".gate." in name:
            torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        y, extra = model(tokens())
        (y.square().mean() + sum(loss.sum() for loss in extra["moe_aux"].values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = model.decoder.moe_layers[0].experts.fc1_weight
    alike = all(torch.allclose(weight, weights[0], atol=1e-6) for weight in weights)
    assert alike != parted
    assert gate_class(gate).capabilities.keeps_copies_equal == (gate != "gshard")


def test_what_a_spawn_makes_is_not_alike_for_ever(dense):
    made(dense, moe_gate="dense", moe_spawn_updates=5, recipe=Recipe(gate_init="zero"))
    made(dense, moe_gate="dense", activation_dropout=0.1, recipe=Recipe(gate_init="zero"))
    assert not made(
        dense, moe_gate="dense", moe_spawn_updates=5, recipe=Recipe("none")
    ).logits.equal


@pytest.mark.parametrize(
    ("given", "recipe", "message"), ONE_LINE, ids=[line[2][:40] for line in ONE_LINE]
)
def test_misfits_are_refused_in_one_line(dense, given, recipe, message):
    with pytest.raises(OptionError, match=message) as caught:
        made(dense, recipe=recipe, **{"moe_gate": "top_p", **given})
    assert "\n" not in str(caught.value)


def test_other_architectures_and_dictionaries(dense, data, tmp_path):
    with pytest.raises(OptionError, match="--arch transformer_lm_gpttiny_moe: has decoder_embed_d"):
        convert(str(dense), {}, Recipe(), arch="transformer_lm_gpttiny_moe", max_update=10)
    with pytest.raises(OptionError, match="--arch transformer_lm_gpt: one of: causal_lm_moe, "):
        convert(str(dense), {}, Recipe(), arch="transformer_lm_gpt", max_update=10)
    dictionary_of(VOCABULARY + 8).save(str(tmp_path / "dict.txt"))
    with pytest.raises(OptionError, match="its dict.txt has 48 tokens, .* trained with 40"):
        made(dense, str(tmp_path))
    with pytest.raises(OptionError, match="has no dict.txt"):
        made(dense, str(tmp_path / "nowhere"))


def test_an_moe_model_is_not_dense(dense, tmp_path):
    path = str(tmp_path / "moe.pt")
    write(made(dense, moe_gate="top_p").state, path)
    with pytest.raises(OptionError, match="is an MoE model already"):
        convert(path, {}, Recipe(), max_update=10)


@pytest.mark.parametrize(
    "flags", [("--adaptive-input",), ("--base-layers", "1"), ("--adaptive-softmax-cutoff", "10,20")]
)
def test_parts_that_no_moe_architecture_has(dense, tmp_path, flags):
    state = torch.load(dense, weights_only=False)
    state["cfg"]["model"][flags[0][2:].replace("-", "_")] = flags[1] if flags[1:] else True
    torch.save(state, tmp_path / "dense.pt")
    with pytest.raises(OptionError, match=f"was trained with {flags[0]} .*no MoE architecture"):
        read_dense_checkpoint("DENSE", str(tmp_path / "dense.pt"))


def test_weights_that_are_missing_or_left_over(dense, tmp_path):
    def changed(change):
        state = torch.load(dense, weights_only=False)
        change(state["model"])
        torch.save(state, tmp_path / "dense.pt")
        return tmp_path / "dense.pt"

    for change, message in [
        (lambda w: w.pop("decoder.layers.2.fc1.bias"), "has no decoder.layers.2.fc1.bias"),
        (lambda w: w.pop("decoder.layers.0.self_attn.k_proj.bias"), "has no decoder.layers.0.self"),
        (
            lambda w: w.update({"decoder.layers.0.fc2.bias": torch.zeros(16, dtype=torch.int64)}),
            "decoder.layers.0.fc2.bias is not a plain tensor of floating point numbers .*int64",
        ),
        (
            lambda w: w.update({"decoder.layers.0.fc2.weight": torch.eye(16, 24).to_sparse()}),
            "decoder.layers.0.fc2.weight is not a plain tensor of floating point .*sparse_coo",
        ),
        (
            lambda w: w["decoder.layers.1.fc1.weight"][0].fill_(float("nan")),
            "decoder.layers.1.fc1.weight has 16 NaN/Inf values: take an earlier one",
        ),
        (
            lambda w: w.update({"decoder.layers.0.fc2.weight": torch.zeros(16, 24, 1)}),
            "decoder.layers.0.fc2.weight has the shape .16, 24, 1.",
        ),
        (
            lambda w: w.update({"decoder.embed_tokens.weight": torch.zeros(40)}),
            "decoder.embed_tokens.weight has the shape .40,.",
        ),
        (lambda w: w.update({"decoder.extra": torch.zeros(1)}), "has decoder.extra, for which"),
        (
            lambda w: w.update({"decoder.layers.0.fc1.weight": torch.zeros(3, 16)}),
            re.escape(
                "decoder.layers.0.fc1.weight has the shape (3, 16), where its own "
                "options ask for (24, 16)"
            ),
        ),
    ]:
        with pytest.raises(OptionError, match=message):
            made(changed(change), moe_gate="top_p")


def test_the_methods_are_those_of_the_spawn_and_two_more():
    assert METHODS == ("copy", "mask", "noise", "reinit", "slice", "none")


def test_options_of_the_result_are_valid(dense):
    converted = made(dense, moe_gate="top_any", moe_max_experts=6)
    validate(converted.upcycling.options)
    assert isinstance(converted.upcycling, Upcycling)
    assert converted.state["cfg"]["model"]["decoder_ffn_embed_dim"] == SIZES["ffn"]
