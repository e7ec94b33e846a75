"""Steps before the spawn: the experts that wait take no part in them, and nothing else changes."""

import copy
import types

import pytest
import torch
from fairseq.optim import OPTIMIZER_REGISTRY

from evomoe_plugin.evolve.dense_phase import ELEMENTWISE, can_step_alone, first_expert_alone
from evomoe_plugin.evolve.spawn import spawn_experts
from evomoe_plugin.trainer import update_end
from tests.evolve.conftest import trainer_of
from tests.evolve.test_spawn import HALF, N, batch, loss_of

PRECISIONS = {"fp32": {}, **HALF}


@pytest.fixture
def run(make_model):
    """Make the updates from `first` on; with `alone`, as runs make them."""

    def make(updates, alone, first=0, trainer=None, optimizer=None, precision=None, **given):
        if trainer is None:
            torch.manual_seed(3)
            model = make_model(moe_spawn_updates=N, **given)
            trainer = trainer_of(model, **(precision or {}))
            if optimizer is not None:
                trainer.optimizer = optimizer(list(model.parameters()))
        model = trainer.get_model()
        for update in range(first, updates):
            model.set_num_updates(update)
            with first_expert_alone(trainer) if alone else torch.enable_grad():
                trainer.optimizer.zero_grad()
                trainer.optimizer.backward(loss_of(model(batch(update))).float())
                trainer.optimizer.multiply_grads(0.5)
                trainer.optimizer.step()
        return trainer, model

    return make


def state_of(trainer):
    return trainer.optimizer.optimizer.state_dict()["state"]


def is_stack(name):
    return ".experts." in name


def assert_same_but_for_those_that_wait(one, other):
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert a.shape == b.shape
        assert torch.equal(*((a[:1], b[:1]) if is_stack(name) else (a, b))), name


@pytest.mark.parametrize(("precision", "given"), [
    *((precision, {}) for precision in PRECISIONS),
    ("fp32", {"moe_expert_gated": True, "moe_expert_count": "2,5", "moe_shared_experts": 1,
              "moe_spawn_trainable_masked": "false"}),
])
def test_the_course_is_that_of_steps_over_all(run, precision, given):
    with_all, wanted = run(2, False, precision=PRECISIONS[precision], **given)
    trainer, model = run(2, True, precision=PRECISIONS[precision], **given)
    assert_same_but_for_those_that_wait(model, wanted)
    one, other = state_of(trainer), state_of(with_all)
    assert one.keys() == other.keys()
    for i, entry in one.items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[i][key])), key


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name != "adam"])
def test_other_optimizers(run, name):
    options = types.SimpleNamespace(
        lr=[0.1], momentum=0.9, weight_decay=0.1, adadelta_rho=0.9, adadelta_eps=1e-6,
        adamax_betas="(0.9, 0.999)", adamax_eps=1e-8, no_bias_correction=False,
        adam_betas="(0.9, 0.98)", adam_eps=1e-8)

    def optimizer(parameters):
        return OPTIMIZER_REGISTRY[name](options, parameters)

    _, wanted = run(2, False, optimizer=optimizer)
    trainer, model = run(2, True, optimizer=optimizer)
    assert_same_but_for_those_that_wait(model, wanted)
    for p in model.parameters():
        state = trainer.optimizer.optimizer.state[p]
        assert {value.shape for value in state.values() if torch.is_tensor(value)} - {
            torch.Size()} == {p.shape}


@pytest.mark.parametrize("precision", ["fp32", "flat masters", "masters one by one"])
def test_all_that_a_step_goes_over_is_the_dense_model(run, precision):
    """Parameters, gradients and the optimizer's state; with one expert there is nothing else."""
    trainer, model = run(1, True, precision=PRECISIONS[precision])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held = {name: p.data_ptr() for name, p in model.named_parameters()}

    def numbers():
        updated = [p for group in trainer.optimizer.optimizer.param_groups for p in group["params"]]
        state = trainer.optimizer.optimizer.state
        return {sum(p.numel() for p in model.parameters()), sum(p.numel() for p in updated),
                sum(p.grad.numel() for p in updated),
                sum(state[p]["exp_avg"].numel() for p in updated)}

    with first_expert_alone(trainer):
        trainer.optimizer.zero_grad()
        trainer.optimizer.backward(loss_of(model(batch())).float())
        trainer.optimizer.step()
        assert numbers() == {sum(p.numel() // (4 if is_stack(n) else 1) for n, p in before.items())}
    for name, p in model.named_parameters():
        assert p.data_ptr() == held[name]
        assert not torch.equal(p, before[name]) or ".gate." in name or "k_proj.bias" in name
        if is_stack(name):
            assert torch.equal(p[1:], before[name][1:])


def test_the_spawn_and_what_follows_is_the_same(run):
    """Weights, moments, and the steps of all experts."""
    runs = []
    for alone in (False, True):
        trainer, model = run(N, alone)
        trainer.get_num_updates = lambda: N
        spawn_experts(trainer)
        run(N + 2, alone, first=N, trainer=trainer)
        runs.append((model, trainer))
    (wanted, with_all), (model, trainer) = runs
    for (name, a), (_, b) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for one, other in zip(state_of(trainer).values(), state_of(with_all).values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_a_step_that_fails_leaves_all_as_it_was(run):
    trainer, model = run(1, True)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(state_of(trainer))
    with pytest.raises(ZeroDivisionError), first_expert_alone(trainer):
        1 / 0  # noqa: B018
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    for i, entry in state_of(trainer).items():
        assert torch.equal(entry["exp_avg_sq"], state[i]["exp_avg_sq"])
    assert not any(layer.first_alone for layer in model.decoder.moe_layers)


def test_where_all_experts_take_part(run):
    trainer, model = run(0, True)
    trainer.cfg.optimizer["_name"] = "adafactor"
    assert not can_step_alone(trainer)
    model.set_num_updates(N - 1)
    with first_expert_alone(trainer):
        loss_of(model(batch())).backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    trainer.cfg.optimizer["_name"] = "adam"
    assert can_step_alone(trainer)
    model.set_num_updates(N)
    with first_expert_alone(trainer):
        assert not any(layer.first_alone for layer in model.decoder.moe_layers)


def test_what_an_update_fails_with_is_saved_whole(run, monkeypatch):
    """crash.pt is written amid an update."""
    monkeypatch.setattr(update_end, "_surroundings", [first_expert_alone])
    trainer, model = run(1, True)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    found = []

    def saving(trainer):
        return {name: value.shape for name, value in trainer.get_model().state_dict().items()}

    def failing(trainer):
        found.append(saving(trainer))
        found.append(update_end._state_dict(saving, trainer))
        raise FloatingPointError

    with pytest.raises(FloatingPointError):
        update_end._update(failing, trainer)
    alone, whole = found
    assert alone != shapes
    assert whole == shapes == saving(trainer)
