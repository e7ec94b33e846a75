"""`--moe-init-from-dense` around real optimizers: what is set, in which precision."""

import logging

import pytest
import torch

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.run_checks import validate_run
from evomoe_plugin.evolve.convert import convert
from evomoe_plugin.evolve.start import init_from_dense, recipe_of
from tests.evolve.conftest import trainer_of
from tests.evolve.dense_models import (
    SIZES,
    VOCABULARY,
    dense_config,
    dictionary_of,
    save_dense,
    task_of,
)

GATE = {
    "moe_gate": "top_p",
    "moe_expert_count": "3",
    "decoder_layers": SIZES["layers"],
    "activation_fn": "gelu",
    "moe_post_norm": True,
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return str(save_dense(tmp_path_factory.mktemp("dense") / "dense.pt"))


@pytest.fixture
def task():
    return task_of(dictionary_of())


def wanted(dense, model, **given):
    """The parameters that the verb would have written."""
    options = {key: value for key, value in GATE.items() if key.startswith("moe_")}
    state = convert(dense, {**options, **given}, recipe_of(model.decoder.args)).state["model"]
    return {name: state[name] for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    "precision",
    [
        {},
        {"fp16": True},
        {"fp16": True, "fp16_no_flatten_grads": True},
        {"bf16": True},
        {"fp16": True, "memory_efficient_fp16": True},
    ],
    ids=str,
)
def test_what_the_optimizer_updates_is_what_the_verb_would_write(dense, make_model, precision):
    model = make_model(
        **GATE, moe_init_from_dense=dense, moe_init_method="mask", moe_init_gate="normal:0.1"
    )
    trainer = trainer_of(model, num_updates=0, **precision)
    init_from_dense(trainer)
    expected = wanted(dense, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name
    masters = getattr(trainer.optimizer, "fp32_params", None)
    if masters is not None:
        masters = list(masters.values()) if isinstance(masters, dict) else masters
        flat = torch.cat([master.flatten() for master in masters])
        assert torch.equal(flat, torch.cat([value.flatten() for value in expected.values()]))


@pytest.mark.parametrize("precision", [{}, {"fp16": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize(("method", "verdict"), [("copy", "equal to"), ("mask", "differ from")])
def test_logits_are_compared_and_nothing_else_changes(
    dense, make_model, caplog, precision, method, verdict
):
    model = make_model(**GATE, moe_init_from_dense=dense, moe_init_method=method).train()
    trainer = trainer_of(model, num_updates=0, **precision)
    random_state = torch.get_rng_state()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with caplog.at_level(logging.INFO):
        init_from_dense(trainer)
    assert f"logits {verdict} the dense model's (max difference" in caplog.messages[-1]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert not model.decoder._update_totals
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name].dtype and torch.equal(buffer, buffers[name]), name


def test_frozen_parameters_are_set_too(dense, make_model):
    model = make_model(
        **GATE, moe_init_from_dense=dense, moe_train_only="gate", moe_init_gate="normal:0.1"
    )
    init_from_dense(trainer_of(model, num_updates=0))
    expected = wanted(dense, model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name
        assert parameter.requires_grad == (".gate." in name)


def test_nothing_happens_without_the_option(make_model):
    model = make_model(**GATE)
    before = [p.clone() for p in model.parameters()]
    init_from_dense(trainer_of(model, num_updates=0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"decoder_ffn_embed_dim": 32},
            "--decoder-ffn-embed-dim 32: the dense checkpoint .* has 24",
        ),
        ({"moe_post_norm": False}, "--moe-post-norm False: .* normalises after .*: give it"),
        ({"moe_init_method": "half"}, "--moe-init-method half: one of: copy"),
        ({"moe_init_method": "mask", "moe_init_rate": 2.0}, "--moe-init-rate 2.0: it is a share"),
        ({"moe_expert_size_factor": 2}, "give --moe-init-method slice"),
        (
            {"moe_init_from_dense": "gone.pt"},
            "--moe-init-from-dense gone.pt: there is no such file",
        ),
    ],
)
def test_misfits_are_refused_and_change_nothing(dense, make_model, given, message):
    model = make_model(**{**GATE, "moe_init_from_dense": dense, **given})
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OptionError, match=message):
        init_from_dense(trainer_of(model, num_updates=0))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_another_dictionary(dense, make_model, task):
    task.source_dictionary.add_symbol("new")
    model = make_model(**GATE, moe_init_from_dense=dense)
    with pytest.raises(
        OptionError,
        match=f"has {VOCABULARY + 1} tokens, the dense checkpoint was trained with {VOCABULARY}",
    ):
        init_from_dense(trainer_of(model, num_updates=0))


def test_options_of_a_start_that_is_none(make_model):
    with pytest.raises(OptionError, match="--moe-init-method slice: there is no dense model"):
        make_model(**GATE, moe_init_method="slice")


def test_one_source_of_first_weights(tmp_path):
    dictionary_of().save(str(tmp_path / "dict.txt"))
    (tmp_path / "train.idx").touch()
    cfg = dense_config(
        "--arch",
        "transformer_lm_moe",
        "--moe-gate",
        "top_p",
        "--moe-init-from-dense",
        "dense.pt",
        data=str(tmp_path),
    )
    validate_run(cfg)
    cfg.checkpoint.finetune_from_model = "moe.pt"
    with pytest.raises(OptionError, match="--moe-init-from-dense dense.pt: --finetune-from-model"):
        validate_run(cfg)
