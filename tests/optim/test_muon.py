"""`--optimizer muon` against torch's Muon and our AdamW, a matrix at a time."""

import copy

import pytest
import torch
from fairseq.models import build_model
from omegaconf import OmegaConf

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.optim import Muon
from evomoe_plugin.optim.fused_adam import FusedAdam
from evomoe_plugin.optim.muon import MuonAdam, mark_matrices
from tests.models.conftest import make_config, task  # noqa: F401  fixtures
from tests.models.test_encoders import ARCHS

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}


def parameters() -> list[torch.nn.Parameter]:
    """A matrix, a stack of three, and a vector."""
    torch.manual_seed(0)
    shapes = [(6, 4), (3, 5, 8), (7,)]
    found = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in found:
        p.is_matrix = p.dim() > 1
    return found


def step(optimizer, params, update, factor=1.0):
    torch.manual_seed(100 + update)
    for p in params:
        p.grad = torch.randn(p.shape)
    optimizer.grad_factor = factor
    optimizer.step()


def test_each_matrix_is_that_of_torchs_muon():
    ours, stock = parameters(), parameters()
    optimizer = MuonAdam(ours, 0.95, 5, **SETTINGS)
    matrices = [torch.nn.Parameter(m.clone()) for m in (stock[0].data, *stock[1].data)]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam = FusedAdam([stock[2]], **SETTINGS)
    for update in range(4):
        step(optimizer, ours, update, factor=0.5)
        grads = [p.grad * 0.5 for p in ours]
        for matrix, grad in zip(matrices, (grads[0], *grads[1]), strict=True):
            matrix.grad = grad.clone()
        stock[2].grad = grads[2] * 2
        adam.grad_factor = 0.5
        muon.step()
        adam.step()
    assert torch.equal(ours[0], matrices[0])
    assert torch.equal(ours[1], torch.stack(list(matrices[1:])))
    torch.testing.assert_close(ours[2], stock[2])  # rounding depends on alignment


def test_it_goes_on_from_its_state():
    whole, parted = parameters(), parameters()
    unbroken = MuonAdam(whole, 0.9, 3, **SETTINGS)
    before = MuonAdam(parted, 0.9, 3, **SETTINGS)
    for update in range(6):
        if update == 3:
            after = MuonAdam(parted, 0.9, 3, **SETTINGS)
            after.load_state_dict(copy.deepcopy(before.state_dict()))
            assert {*after.state[parted[1]]} == {"step", "momentum_buffer"}
        step(unbroken, whole, update)
        step(before if update < 3 else after, parted, update)
    assert all(torch.equal(p, q) for p, q in zip(whole, parted, strict=True))


_MATRICES = tuple(f"{n}_proj.weight" for n in ("k", "v", "q", "out"))
_MATRICES += tuple(f"fc{n}.weight" for n in (1, 2, 3))
_MATRICES += tuple(f"experts.fc{n}_weight" for n in (1, 2, 3))


@pytest.mark.parametrize(
    "given",
    [
        {"moe_shared_experts": 1, "moe_lexical": "normal:1", "moe_gate": "top_k"},
        {"moe_gate": "top_any", "share_decoder_input_output_embed": False},
        {"arch": "transformer_lm_llama_tiny_moe"},
        {"arch": "transformer_lm"},
        {**ARCHS["roberta"], "moe_shared_experts": 2, "moe_shared_combine": "softmax"},
        ARCHS["transformer"],
    ],
    ids=["gpt", "untied", "llama", "dense", "roberta", "transformer"],
)
def test_which_parameters_are_matrices(make_config, task, given):  # noqa: F811
    model = build_model(make_config(**given), task)
    mark_matrices(model)
    found = {name for name, p in model.named_parameters() if p.is_matrix}
    layers = [name for name, _ in model.named_parameters() if ".layers." in name]
    assert found == {name for name in layers if name.endswith(_MATRICES)}
    assert {p.dim() for name, p in model.named_parameters() if name in found} <= {2, 3}
    assert (
        any(name.endswith("fc1_weight") for name in found) or given.get("arch") == "transformer_lm"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"muon_momentum": 1.0}, "--muon-momentum 1.0: give 0 or more"),
        ({"muon_steps": 0}, "--muon-steps 0: give 1 to 99"),
        ({"mark": False}, "there is no matrix to train: leave out --ddp-backend fully_sharded"),
    ],
)
def test_what_cannot_work_is_refused(given, message):
    params = parameters()
    for p in params:
        p.is_matrix = given.get("mark", True)
    cfg = {"adam_betas": "(0.9, 0.98)", "adam_eps": 1e-8, "weight_decay": 0.1, "lr": [1e-2]}
    cfg |= {"muon_momentum": 0.95, "muon_steps": 5} | given
    with pytest.raises(OptionError, match=message):
        Muon(OmegaConf.create(cfg), params)
