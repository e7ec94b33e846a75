"""`--moe-matmul-dtype bf16`: operands of matmuls are rounded, and nothing else."""

import copy

import pytest
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import build_model
from omegaconf import open_dict
from torch.nn import functional

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.run_checks import check_run
from evomoe_plugin.gates import gate_names
from evomoe_plugin.models import mixed_precision
from evomoe_plugin.patches import checkpoint_autocast
from tests.models.conftest import BOTH_FAMILIES

GATES = [name for name in gate_names() if name != "cautious"]  # a user's, from the documentation
GIVEN = {
    "expert_choice": {"moe_allow_noncausal": True},
    "gshard": {"moe_capacity_factor": 1.0},
    "stable": {"moe_stable_updates": 10},
    "top_p": {"moe_null_experts": 1, "moe_shared_experts": 1, "moe_expert_gated": True},
}
# Rounding of operands to 8 bits, through four layers.
RELATIVE = 0.05


def tokens():
    return torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(3))


def trained(model):
    """Logits and gradients of one batch in training mode."""
    logits, extra = model.train()(tokens())
    loss = functional.cross_entropy(logits.float().view(-1, logits.size(-1)), tokens().view(-1))
    for aux_L in extra["moe_aux"].values():
        loss = loss + 0.01 * aux_L.mean()
    loss.backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


def difference(one, other):
    return ((one - other).norm() / (other.norm() + 1e-12)).item()


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_trains_close_to_full_precision(make_model, gate):
    given = {"moe_gate": gate, **GIVEN.get(gate, {})}
    rounded_model = make_model(moe_matmul_dtype="bf16", **given)
    exact_model = make_model(**given)
    exact_model.load_state_dict(rounded_model.state_dict())
    rounded, grads = trained(rounded_model)
    exact, wanted = trained(exact_model)
    assert rounded.dtype is torch.bfloat16
    assert 0 < difference(rounded.float(), exact) < RELATIVE
    for name, grad in grads.items():
        assert grad.dtype is torch.float32 and torch.isfinite(grad).all(), name
    everything, all_wanted = (
        torch.cat([g.flatten() for name, g in gs.items() if not name.endswith("k_proj.bias")])
        for gs in (grads, wanted)
    )
    assert difference(everything, all_wanted) < RELATIVE


@BOTH_FAMILIES
def test_weights_residuals_and_gates_stay_as_they_are(make_model):
    model = make_model(moe_matmul_dtype="bf16")
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("gate.scorer", "layer_norm")):
            module.register_forward_hook(
                lambda module, given, output, name=name: seen.update({name: output.dtype})
            )
    _, extra = model.train()(tokens())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {state.dtype for state in extra["inner_states"]} == {torch.float32}
    assert sum("scorer" in name for name in seen) == 2
    assert set(seen.values()) == {torch.float32}, seen


def test_the_second_pass_of_checkpointing_is_in_the_precision_of_the_first(make_model, monkeypatch):
    kept = make_model(moe_matmul_dtype="bf16")
    again = make_model(moe_matmul_dtype="bf16", checkpoint_activations=True)
    again.load_state_dict(kept.state_dict())
    _, wanted = trained(kept)
    for name, grad in trained(again)[1].items():
        assert torch.equal(grad, wanted[name]), name
    # Without the patch it would not be.
    monkeypatch.setattr(checkpoint_autocast, "_as_now", lambda forward: forward)
    again.zero_grad()
    assert any(not torch.equal(grad, wanted[name]) for name, grad in trained(again)[1].items())


@BOTH_FAMILIES
def test_incremental_decoding_equals_full(make_model):
    model = make_model(moe_matmul_dtype="bf16").eval()
    x, state = tokens(), {}
    full = model(x)[0].float()
    steps = [model.decoder(x[:, : t + 1], incremental_state=state)[0] for t in range(x.size(1))]
    assert difference(torch.cat(steps, 1).float(), full) < RELATIVE


def test_features_and_projection_by_themselves_are_rounded_too(make_model):
    decoder = make_model(moe_matmul_dtype="bf16").eval().decoder
    features, _ = decoder.extract_features(tokens())
    with decoder.matmul_dtype():
        logits = decoder.output_layer(features)
    assert torch.equal(logits, decoder(tokens())[0])


@pytest.mark.parametrize("has_units", [True, False])
def test_what_is_slow_is_said(make_model, monkeypatch, caplog, has_units):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        mixed_precision,
        "native_matmul_dtype",
        lambda dtype, _device: dtype if has_units else torch.float32,
    )
    make_model(moe_matmul_dtype="bf16")
    assert ("multiplied in fp32, slower" in caplog.text) != has_units
    caplog.clear()
    make_model()
    assert "matmul" not in caplog.text


def test_no_other_value_is_taken(make_model):
    with pytest.raises(OptionError, match="--moe-matmul-dtype fp16"):
        make_model(moe_matmul_dtype="fp16")


def command_line(*given):
    """The configuration of a training command."""
    return convert_namespace_to_omegaconf(
        options.parse_args_and_arch(
            options.get_training_parser(),
            [
                "no-data",
                "--user-dir",
                "evomoe_plugin",
                "--task",
                "language_modeling",
                "--arch",
                "transformer_lm_gpttiny_moe",
                "--optimizer",
                "adam",
                "--lr",
                "0.1",
                "--max-update",
                "10",
                "--criterion",
                "moe_cross_entropy",
                "--batch-size",
                "1",
                *given,
            ],
        )
    )


def test_the_old_flag_sets_the_new_option_and_is_logged_once(caplog):
    cfg = command_line("--moe-products-dtype", "bf16")
    for _ in range(2):
        with pytest.raises(OptionError, match="no such folder"):
            check_run(cfg, 1)
    assert cfg.model.moe_matmul_dtype == "bf16"
    assert caplog.text.count("--moe-products-dtype is deprecated: give --moe-matmul-dtype") == 1
    with pytest.raises(OptionError, match="--moe-products-dtype same: is the old name of "):
        check_run(command_line("--moe-products-dtype", "same", "--moe-matmul-dtype", "bf16"), 1)


@pytest.mark.parametrize("stored", ["same", "bf16"])
def test_a_stored_configuration_with_the_old_name_has_its_effect(stored, make_config, task):
    cfg = make_config(decoder_layers=2, decoder_embed_dim=16, decoder_attention_heads=2)
    with open_dict(cfg):
        del cfg["moe_matmul_dtype"]
        cfg.moe_products_dtype = stored
    model = build_model(cfg, task, from_checkpoint=True).eval()
    assert model(tokens())[0].dtype is (torch.bfloat16 if stored == "bf16" else torch.float32)


def test_weights_of_half_precision_are_refused():
    cfg = command_line("--moe-matmul-dtype", "bf16")
    for option in ("fp16", "bf16", "memory_efficient_bf16"):
        cfg.common[option] = True
        flag = option.replace("_", "-")
        with pytest.raises(OptionError, match=f"--moe-matmul-dtype bf16 with --{flag}: "):
            check_run(cfg, cfg.distributed_training.distributed_world_size)
        cfg.common[option] = False
    with pytest.raises(OptionError, match="no such folder"):  # what is looked at next
        check_run(cfg, cfg.distributed_training.distributed_world_size)


@pytest.mark.parametrize("has_units", [True, False])
def test_linear_layers_round_operands_and_outputs(monkeypatch, has_units):
    """A CPU without native matmuls of the dtype computes them in fp32: the same values."""
    monkeypatch.setattr(
        mixed_precision,
        "native_matmul_dtype",
        lambda dtype, _device: dtype if has_units else torch.float32,
    )
    seen = []
    plain = functional.linear
    monkeypatch.setattr(
        functional, "linear", lambda *given: seen.append(given[0].dtype) or plain(*given)
    )
    layer = mixed_precision.Linear.of(torch.nn.Linear(48, 32))
    x = torch.randn(20, 48, requires_grad=True)
    dy = torch.randn(20, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.backward(dy.bfloat16())
    # Given to autocast as it is, or rounded before it.
    assert seen == [torch.float32] and y.dtype is torch.bfloat16
    half = copy.deepcopy(layer).to(torch.bfloat16)  # without autocast, the same
    torch.testing.assert_close(half(x.detach().bfloat16()), y.detach(), rtol=2**-7, atol=1e-3)
    assert seen[1] is (torch.bfloat16 if has_units else torch.float32)

    exact = [t.detach().bfloat16().double().requires_grad_() for t in (x, layer.weight, layer.bias)]
    wanted = plain(*exact)
    wanted.backward(dy.bfloat16().double())
    for ours, other in (
        (y, wanted),
        *((p.grad, e.grad) for p, e in zip((x, layer.weight, layer.bias), exact, strict=True)),
    ):
        torch.testing.assert_close(ours.double(), other, rtol=2**-8, atol=1e-3)
    assert {p.grad.dtype for p in (x, *layer.parameters())} == {torch.float32}


def test_in_full_precision_linear_layers_are_torchs():
    plain = torch.nn.Linear(8, 4)
    layer = mixed_precision.Linear.of(plain)
    assert layer.weight is plain.weight and layer.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 8)
    assert torch.equal(layer(x), plain(x))
    hooked = torch.nn.Linear(8, 4)
    hooked.register_forward_pre_hook(lambda module, given: None)
    assert mixed_precision.Linear.of(hooked) is hooked


def test_attention_is_the_same_whether_its_matmuls_are_emulated(make_model, monkeypatch):
    model = make_model(moe_matmul_dtype="bf16", moe_attention="sdpa")
    monkeypatch.setattr(mixed_precision, "native_matmul_dtype", lambda dtype, _device: dtype)
    _, emulating = trained(model)
    model.zero_grad()
    monkeypatch.setattr(mixed_precision, "native_matmul_dtype", lambda *_: torch.float32)
    _, in_fp32 = trained(model)
    assert any(not torch.equal(emulating[name], in_fp32[name]) for name in in_fp32)
    for name, grad in in_fp32.items():
        if not name.endswith("k_proj.bias"):
            assert difference(grad, emulating[name]) < RELATIVE, name
