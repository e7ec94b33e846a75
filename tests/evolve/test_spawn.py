"""Expert-diversify: one expert works until the spawn, and what the spawn makes of it."""

import copy
import itertools
import logging
import types

import pytest
import torch
from fairseq.optim.adafactor import Adafactor
from fairseq.optim.adam import Adam
from fairseq.optim.sgd import SGD
from torch.utils.flop_counter import FlopCounterMode

from evomoe_plugin.config.rates import spawn_rate
from evomoe_plugin.config.run_checks import largest_step
from evomoe_plugin.evolve.adapt import adapt_experts
from evomoe_plugin.evolve.init_methods import kept_mask, seed_of
from evomoe_plugin.evolve.spawn import spawn_experts
from evomoe_plugin.routing import noise
from evomoe_plugin.routing import stats as st
from tests.evolve.conftest import spawn_expert, step, trainer_of
from tests.gates.conftest import D, E, T, make_layer  # noqa: F401
from tests.gates.test_every_gate import GATES, NEEDED, WAYS, extras, label, tokens

N = 3
EXPERTS = "decoder.layers.{}.moe.experts."
METHODS = ("copy", "mask", "noise", "reinit")
HALF = {
    "flat masters": {"fp16": True},
    "masters one by one": {"fp16": True, "fp16_no_flatten_grads": True},
    "bf16": {"bf16": True},
    "memory-efficient": {"fp16": True, "memory_efficient_fp16": True},
}


def one_expert(experts, x):
    """Expert 0 as a dense feed-forward network."""
    if experts.gated:
        hidden = experts.activation(x @ experts.fc1_weight[0].T) * (x @ experts.fc3_weight[0].T)
        return hidden @ experts.fc2_weight[0]
    hidden = experts.activation(x @ experts.fc1_weight[0].T + experts.fc1_bias[0])
    return hidden @ experts.fc2_weight[0] + experts.fc2_bias[0]


# Before the spawn: layers.


# The gate is not even asked before the spawn, so each is here once, and one with all else.
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    "given",
    [
        *({"moe_gate": name, **NEEDED.get(name, {})} for name in GATES),
        *({"moe_gate": "dense_to_sparse", **given} for given in extras("dense_to_sparse")),
    ],
    ids=label,
)
def test_before_the_spawn_the_layer_is_its_first_expert(make_layer, given, training):  # noqa: F811
    layer = make_layer(moe_spawn_updates=N, **given).train(training)
    layer.set_num_updates(N - 1)
    x, known = tokens()
    mask = torch.arange(T) % 4 != 1
    y, aux, stats = layer(x, mask, **known)
    wanted = one_expert(layer.experts, x)
    wanted = wanted.masked_fill(~mask.unsqueeze(1), 0.0)
    if layer.shared is not None:
        stack = layer.shared.experts
        for s in range(stack.num_experts):
            alone = copy.copy(stack)
            alone._parameters = {n: p[s : s + 1] for n, p in stack._parameters.items()}
            wanted = wanted + one_expert(alone, x)
    assert torch.allclose(y, wanted)

    assert stats[st.LOAD_E].tolist() == [int(mask.sum())] + [0] * (E - 1)
    assert stats[st.TOKENS] == stats[st.PAIRS] == stats[st.EXPERTS] == mask.sum()
    assert not any(stats[name] for name in (st.ENTROPY, st.NONFINITE))
    assert not any(stats.get(name, 0) for name in (st.DROPPED, st.NULL_PAIRS))
    assert aux.tolist() == [0.0] * len(layer.gate.aux_names)

    parameters = dict(layer.named_parameters())
    (y.square().sum() + aux.sum()).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        if name.startswith("gate."):
            assert not parameter.grad.any()
        elif name.startswith("experts."):
            assert parameter.grad[0].any()
            assert not parameter.grad[1:].any()


def test_a_table_and_its_schedules_start_at_the_spawn(make_layer):  # noqa: F811
    given = {"moe_gate": "switch", "moe_lexical": "normal:1", "moe_lexical_decay_updates": 4}
    layer = make_layer(moe_spawn_updates=N, moe_gate_warmup_updates=2, **given)
    x, known = tokens()
    for num_updates, strength, factor in ((N, 1.0, 0.5), (N + 1, 0.75, 1.0), (N + 4, 0.0, 1.0)):
        layer.set_num_updates(num_updates)
        logits = layer.gate.score(x, layer.context(**known))
        wanted = factor * layer.gate.scorer(x)
        wanted = wanted + strength * layer.gate.lexical.table[known["token_ids_T"]]
        assert torch.allclose(logits, wanted)


@pytest.mark.parametrize("name", WAYS)
def test_the_gate_is_not_even_asked(make_layer, name, monkeypatch):  # noqa: F811
    layer = make_layer(moe_gate=name, moe_spawn_updates=N, **NEEDED.get(name, {}))
    x, known = tokens()
    monkeypatch.setattr(layer.gate, "forward", lambda *_: 1 / 0)
    layer(x, None, **known)
    layer.set_num_updates(N)
    with pytest.raises(ZeroDivisionError):
        layer(x, None, **known)


@pytest.mark.parametrize("gated", [False, True])
def test_before_the_spawn_a_step_costs_what_the_dense_network_costs(make_layer, gated):  # noqa: F811
    layer = make_layer(moe_spawn_updates=N, moe_expert_gated=gated)
    x, known = tokens()
    mask = torch.arange(T) % 4 != 1
    rows = int(mask.sum())

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            run().sum().backward()
        return counter.get_total_flops()

    dense_x = x.detach()[mask].requires_grad_()
    dense = counted(lambda: one_expert(layer.experts, dense_x))
    matrices = 3 if gated else 2
    assert dense == 3 * rows * matrices * 2 * D * layer.experts.fc1_weight.size(1)
    assert counted(lambda: layer(x, mask, **known)[0]) == dense
    layer.set_num_updates(N)
    assert counted(lambda: layer(x, mask, **known)[0]) > 4 * dense


def test_padding_may_hold_anything(make_layer):  # noqa: F811
    layer = make_layer(moe_spawn_updates=N)
    x, known = tokens()
    mask = torch.arange(T) % 4 != 1
    broken = x.detach().masked_fill(~mask.unsqueeze(1), float("nan"))
    y, _, _ = layer(broken, mask, **known)
    assert torch.equal(y, layer(x, mask, **known)[0])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_schedules_count_from_the_spawn_and_noise_from_the_start(make_layer):  # noqa: F811
    layer = make_layer(moe_spawn_updates=40, moe_temperature_updates=10)
    keys = noise.sequence_keys(torch.arange(T).unsqueeze(0))[0]
    seen, keyed = {}, []
    for updates in (0, 39, 40, 45, 50):
        layer.set_num_updates(updates)
        context = layer.context(token_keys_T=keys)
        gate = layer.gate
        seen[updates] = (
            context.num_updates,
            gate.temperature(context.num_updates),
            gate.is_hard(context.num_updates),
        )
        keyed.append(context.noise_keys_T)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(keyed, 2))
    assert seen == {
        0: (0, 2.0, False),
        39: (0, 2.0, False),
        40: (0, 2.0, False),
        45: (5, pytest.approx(1.15), False),
        50: (10, 0.3, True),
    }


def test_the_phase_is_in_the_state(make_layer):  # noqa: F811
    layer, other = (make_layer(moe_spawn_updates=N) for _ in range(2))
    layer.set_num_updates(N)
    assert other.in_dense_phase
    other.load_state_dict(layer.state_dict())
    assert not other.in_dense_phase


# Before the spawn: models.


def batch(seed=1):
    return torch.randint(4, 40, (3, 12), generator=torch.Generator().manual_seed(seed))


def loss_of(output):
    y, extra = output
    aux = sum(loss.sum() for loss in extra["moe_aux"].values())
    return y.square().mean() + aux


@pytest.mark.parametrize("gate", ["dense_to_sparse", "top_k", "stable"])
@pytest.mark.parametrize("updates", [N - 1, N])
def test_activation_checkpointing_changes_nothing(make_model, gate, updates):
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = make_model(
            moe_gate=gate,
            moe_spawn_updates=N,
            activation_dropout=0.1,
            moe_spawn_trainable_masked="false",
            checkpoint_activations=checkpointing,
        )
        model.set_num_updates(updates)
        torch.manual_seed(3)
        loss = loss_of(model(batch()))
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters()]))
    (one, grads), (other, checkpointed) = results
    assert torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(grads, checkpointed, strict=True))


@pytest.mark.parametrize(
    "given, state",
    [
        ({"moe_gate": "top_k", "moe_bias_update_rate": 0.01}, "bias_C"),
        ({"moe_gate": "relu"}, "coefficient"),
        (
            {"moe_gate": "top_any", "moe_max_experts": 6, "moe_adapt_record_interval": 5},
            "record.routed_E",
        ),
    ],
)
def test_gates_learn_from_updates_after_the_spawn_only(make_model, given, state):
    model = make_model(moe_spawn_updates=N, **given)
    before = copy.deepcopy(model.state_dict())
    name = f"decoder.layers.1.moe.gate.{state}"
    for update in range(1, N + 2):
        assert torch.equal(model.state_dict()[name], before[name])
        model(batch(update))
        model.set_num_updates(update)  # as the trainer does, once the optimizer has stepped
        model.finish_update(update)
    assert not torch.equal(model.state_dict()[name], before[name])


def test_the_adaptive_process_counts_from_the_spawn(make_model):
    given = {
        "moe_gate": "top_any",
        "moe_max_experts": 6,
        "moe_adapt_record_interval": 4,
        "moe_spawn_updates": N,
    }
    model = make_model(**given)
    layer = model.decoder.moe_layers[0]
    with torch.no_grad():
        layer.gate.threshold[1] = 5.0  # no token reaches it
    thresholds = []
    for update in range(1, N + 5):
        model(batch(update))
        model.set_num_updates(update)
        model.finish_update(update)
        trainer = trainer_of(model, update)
        spawn_experts(trainer)
        adapt_experts(trainer)
        thresholds.append(layer.gate.threshold[1].item())
    # It is removed, and another put in its place, with the first complete record.
    assert thresholds == [5.0] * (N + 3) + [0.0]


def test_flops_before_the_spawn_are_those_of_a_model_without_gates(make_model):
    model = make_model(moe_spawn_updates=N, moe_scorer="mlp")
    before = model.forward_flops[""]
    model.set_num_updates(N)
    assert model.forward_flops[""].per_pair == before.per_pair
    gate = model.decoder.moe_layers[0].gate
    assert model.forward_flops[""].per_token - before.per_token == 2 * gate.flops_per_token() > 0


# The spawn.


def expert(model, layer, e):
    prefix = EXPERTS.format(layer)
    return {
        name.removeprefix(prefix): p.detach()[e].clone()
        for name, p in model.named_parameters()
        if name.startswith(prefix)
    }


def moments(trainer, layer):
    """Moment -> experts' parameter -> values; of optimizers with a state for each parameter."""
    prefix, state = EXPERTS.format(layer), trainer.optimizer.optimizer.state
    return {
        moment: {
            name.removeprefix(prefix): state[p][moment].clone()
            for name, p in trainer.get_model().named_parameters()
            if name.startswith(prefix)
        }
        for moment in ("exp_avg", "exp_avg_sq")
    }


@pytest.fixture
def make_run(make_model):
    """A model with a trainer that has made an update, at the update of the spawn."""

    def make(num_updates=N, precision=None, **given):
        torch.manual_seed(3)
        model = make_model(**{"moe_spawn_updates": N, **given})
        trainer = trainer_of(model, num_updates, **(precision or {}))
        step(trainer)
        return trainer, model

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "given",
    [{}, {"moe_expert_gated": True}, {"moe_expert_count": "2,5"}],
    ids=["plain", "gated", "uneven"],
)
def test_all_experts_come_from_the_first(make_run, method, given):
    trainer, model = make_run(moe_spawn_method=method, **given)
    options = model.decoder.args
    before = copy.deepcopy(model.state_dict())
    sources = [expert(model, layer, 0) for layer in (1, 3)]
    spawn_experts(trainer)
    spawned = []
    for n, layer in enumerate((1, 3)):
        count = model.decoder.moe_layers[n].num_experts
        for e in range(count):
            wanted = spawn_expert(
                sources[n],
                method,
                key=seed_of(options.seed, n, e),
                rate=spawn_rate(options),
                rescale=False,
            )
            got = expert(model, layer, e)
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
            spawned.append(got)
        for one, other in itertools.combinations(spawned[-count:], 2):
            assert torch.equal(one["fc1_weight"], other["fc1_weight"]) == (method == "copy")
    for name, value in model.state_dict().items():
        assert (".experts." in name) or torch.equal(value, before[name]), name


def test_rescaled(make_run):
    trainer, model = make_run(moe_spawn_rescale=True, moe_spawn_rate=0.5)
    source = expert(model, 1, 0)["fc1_weight"]
    spawn_experts(trainer)
    value = expert(model, 1, 2)["fc1_weight"]
    kept = value != 0
    assert kept.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(value[kept], source[kept] * 2)


@pytest.mark.parametrize("num_updates", [N - 1, N + 1])
def test_nothing_happens_at_another_update(make_run, num_updates, caplog):
    trainer, model = make_run(num_updates=num_updates)
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO):
        spawn_experts(trainer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not caplog.messages


@pytest.mark.parametrize(
    "given, said",
    [
        ({}, "by mask, rate 0.3, moments copied"),
        (
            {
                "moe_spawn_rescale": True,
                "moe_spawn_rate": 0.25,
                "moe_spawn_trainable_masked": "false",
                "moe_spawn_moments": "reset",
            },
            "by mask, rate 0.25, rescaled, masked weights frozen, moments reset",
        ),
        ({"moe_spawn_method": "copy"}, "by copy, moments copied"),
    ],
)
def test_it_is_said_once(make_run, given, said, caplog):
    trainer, _ = make_run(**given)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        spawn_experts(trainer)
    assert caplog.messages == [
        f"update 3: spawned 4 experts in each of 2 MoE layers from expert 0 ({said})"
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["copy", "reset"])
def test_moments(make_run, method, rule):
    trainer, model = make_run(moe_spawn_method=method, moe_spawn_moments=rule)
    others = {name for name, _ in model.named_parameters() if ".experts." not in name}
    state = trainer.optimizer.optimizer.state
    untouched = {
        name: state[p]["exp_avg"].clone() for name, p in model.named_parameters() if name in others
    }
    before = moments(trainer, 1)
    assert all(value.all() for named in before.values() for value in named.values())
    spawn_experts(trainer)
    for moment, named in moments(trainer, 1).items():
        for name, value in named.items():
            for e in range(4):
                kept = kept_mask(
                    name,
                    value.shape[1:],
                    method,
                    key=seed_of(1, 0, e),
                    rate=spawn_rate(model.decoder.args),
                )
                wanted = before[moment][name][0] * kept * (rule == "copy")
                assert torch.equal(value[e], wanted), (name, e)
    for name, p in model.named_parameters():
        if name in others:
            assert torch.equal(state[p]["exp_avg"], untouched[name])


@pytest.mark.parametrize("gated", [False, True])
def test_factored_moments_of_adafactor(make_model, gated):
    """As if all experts had had the gradients of the first."""
    model = make_model(moe_spawn_updates=N, moe_expert_gated=gated, decoder_ffn_embed_dim=4)
    trainer = trainer_of(model, N)
    other = copy.deepcopy(model)
    prefix = EXPERTS.format(1)
    runs = []
    for net, all_alike in ((model, False), (other, True)):
        optimizer = Adafactor(list(net.parameters()), lr=0.01, relative_step=False)
        generator = torch.Generator().manual_seed(5)
        for _ in range(N):
            for name, p in net.named_parameters():
                p.grad = torch.randn(p.shape, generator=generator)
                if ".experts." in name:
                    p.grad[1:] = p.grad[:1].clone() if all_alike else 0.0
            optimizer.step()
        runs.append(
            {
                name.removeprefix(prefix): optimizer.state[p]
                for name, p in net.named_parameters()
                if name.startswith(prefix)
            }
        )
        if not all_alike:
            trainer.optimizer = types.SimpleNamespace(optimizer=optimizer)
    spawn_experts(trainer)
    got, wanted = runs
    assert got.keys() == wanted.keys() and len(got) == (3 if gated else 4)
    for name, state in got.items():
        for key in ("exp_avg_sq_row", "exp_avg_sq_col"):
            assert torch.allclose(state[key], wanted[name][key], rtol=1e-5), (name, key)


@pytest.mark.parametrize(("betas", "most"), [((0.9, 0.98), 1.55), ((0.9, 0.999), 6.57)])
def test_first_steps_without_moments_amid_a_run(betas, most):
    """What docs/options.md says, and the warning for a large beta2."""
    updates = 10_000
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = Adam([weight], lr=1.0, betas=betas, eps=1e-12)
    optimizer.state[weight] = {
        "step": updates,
        "exp_avg": torch.zeros(1),
        "exp_avg_sq": torch.zeros(1),
    }
    steps = []
    for _ in range(60):
        before = weight.item()
        weight.grad = torch.full((1,), 0.5)
        optimizer.step()
        steps.append(before - weight.item())
    assert max(steps) == pytest.approx(most, abs=0.01)
    assert largest_step(betas, updates) == pytest.approx(max(steps), rel=1e-4)


@pytest.mark.parametrize("layout", HALF)
@pytest.mark.parametrize("rule", ["copy", "reset"])
def test_half_precision_spawns_the_same_and_keeps_it(make_run, layout, rule):
    """What the optimizer holds is spawned, and not only the copy that the model holds."""
    trainer, model = make_run(moe_spawn_moments=rule, precision=HALF[layout])
    sources = {layer: expert(model, layer, 0) for layer in (1, 3)}
    spawn_experts(trainer)
    after_spawn = copy.deepcopy(model.state_dict())
    for n, layer in enumerate((1, 3)):
        for e in range(4):
            wanted = spawn_expert(
                sources[layer], "mask", key=seed_of(1, n, e), rate=0.3, rescale=False
            )
            for name, value in expert(model, layer, e).items():
                assert torch.equal(value == 0, wanted[name] == 0)
                # The masters of the source are more exact than its copy.
                assert torch.allclose(value, wanted[name], rtol=1e-2, atol=1e-6)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer._needs_sync = True
    trainer.optimizer.step()
    for name, value in model.state_dict().items():
        if ".experts." in name and rule == "reset":
            assert torch.equal(value, after_spawn[name])
        elif ".experts." in name and name.endswith("_weight"):  # moved by the moments it has
            assert torch.equal(value == 0, after_spawn[name] == 0)
            moved = value != after_spawn[name]
            assert moved.float().mean() > 0.5
            assert not moved[after_spawn[name] == 0].any()


def test_before_the_first_step_of_the_optimizer_there_are_no_moments(make_model):
    model = make_model(moe_spawn_updates=N)
    spawn_experts(trainer_of(model, N))
    assert not torch.equal(expert(model, 1, 0)["fc1_weight"], expert(model, 1, 1)["fc1_weight"])


# Masked weights that do not learn.


# Each precision with each rule and with each kind of expert.
@pytest.mark.parametrize("rule, gated", [("copy", False), ("reset", True)])
@pytest.mark.parametrize("precision", [None, *HALF.values()], ids=["fp32", *HALF])
def test_frozen_weights_stay_exactly_zero(make_run, precision, rule, gated):
    trainer, model = make_run(
        moe_spawn_trainable_masked="false",
        moe_spawn_moments=rule,
        moe_expert_gated=gated,
        precision=precision,
    )
    spawn_experts(trainer)
    masked = {
        name: value == 0
        for name, value in model.state_dict().items()
        if ".experts." in name and name.endswith("_weight")
    }
    model.set_num_updates(N)
    for seed in range(4):
        loss_of(model(batch(seed))).backward()
        trainer.optimizer._needs_sync = True
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    for name, zero in masked.items():
        value = dict(model.named_parameters())[name]
        assert 0.2 < zero.float().mean().item() < 0.4
        assert not value[zero].any()
        if precision is None:
            assert value[~zero].all()
        frozen = model.state_dict()[name.replace("_weight", "_frozen")]
        assert frozen.dtype == torch.bool
        assert torch.equal(frozen, zero)


@pytest.mark.parametrize("trainable", ["true", "false"])
def test_weight_decay_and_momentum_of_sgd(make_model, trainable):
    model = make_model(moe_spawn_updates=N, moe_spawn_trainable_masked=trainable)
    trainer = trainer_of(model, N)
    options = types.SimpleNamespace(momentum=0.9, weight_decay=0.1, lr=[0.1])
    trainer.optimizer = SGD(options, list(model.parameters()))
    step(trainer)
    spawn_experts(trainer)
    weight = model.decoder.moe_layers[0].experts.fc1_weight
    masked = weight == 0
    model.set_num_updates(N)
    for seed in range(3):
        loss_of(model(batch(seed))).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    assert (weight[masked] == 0).all() == (trainable == "false")


def test_what_is_frozen_comes_back_with_the_state(make_run, make_model):
    trainer, model = make_run(moe_spawn_trainable_masked="false")
    spawn_experts(trainer)
    model.set_num_updates(N)
    other = make_model(moe_spawn_updates=N, moe_spawn_trainable_masked="false")
    other.load_state_dict(model.state_dict())
    loss_of(other(batch())).backward()
    experts = other.decoder.moe_layers[1].experts
    assert experts.fc2_frozen.any()
    assert not experts.fc2_weight.grad[experts.fc2_frozen].any()


def test_bools_are_held_only_where_asked_for_and_one_a_weight(make_model):
    def buffers(**given):
        model = make_model(moe_spawn_updates=N, **given)
        return {name: b for name, b in model.named_buffers() if ".experts." in name}, model

    assert not buffers()[0]
    assert not buffers(moe_spawn_trainable_masked="true")[0]
    held, model = buffers(moe_spawn_trainable_masked="false")
    weights = sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." in name and name.endswith("_weight")
    )
    assert sum(b.numel() * b.element_size() for b in held.values()) == weights
