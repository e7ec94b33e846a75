"""What is decided by a record, and that exactly this happens to a model and its optimizer."""

import logging

import pytest
import torch

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evolve.adapt import adapt_experts, decide

LAYER = "decoder.layers.1.moe"
SLOTS, START = 5, 3


@pytest.mark.parametrize(
    "active, routed, unrouted, removed, added, most_used",
    [
        ("11100", [5, 9, 2, 0, 0], 0, (), None, 1),
        ("11100", [5, 9, 2, 0, 0], 7, (), 3, 1),  # one only, though two places are free
        ("11100", [5, 0, 0, 0, 0], 0, (1, 2), None, 0),
        ("11100", [5, 0, 6, 0, 0], 7, (1,), 1, 2),  # the place just emptied is the lowest
        ("01100", [0, 3, 3, 0, 0], 7, (), 0, 1),
        ("11111", [1, 1, 1, 1, 1], 7, (), None, 0),  # no free slot
        ("00110", [0, 0, 0, 0, 0], 7, (3,), 0, 2),  # at least one stays
        ("00010", [0, 0, 0, 0, 0], 7, (), 0, 3),
        ("11100", [0, 0, 0, 0, 0], 0, (), None, 0),  # nothing was recorded
    ],
)
def test_decisions(active, routed, unrouted, removed, added, most_used):
    change = decide(torch.tensor([c == "1" for c in active]), torch.tensor(routed), unrouted)
    assert (change.removed, change.added, change.most_used) == (removed, added, most_used)
    assert bool(change.slots) == bool(removed or added is not None)


@pytest.fixture
def make_run(make_model, make_trainer):
    """A model with a trainer that has made an update, and one layer's gate."""

    def make(interval=1, num_updates=1, precision=None, **given):
        torch.manual_seed(3)
        model = make_model(
            decoder_layers=2,
            moe_gate="top_any",
            moe_expert_count=str(START),
            moe_max_experts=SLOTS,
            moe_adapt_record_interval=interval,
            **given,
        )
        trainer = make_trainer(model, num_updates, **(precision or {}))
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        trainer.optimizer._needs_sync = True
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return trainer, model, model.decoder.moe_layers[0].gate

    return make


def routed(model, count=4):
    """A training forward pass of one micro-batch."""
    model.train()
    model(torch.randint(4, 40, (count, 12)))


def moments(trainer, name):
    parameter = dict(trainer.get_model().named_parameters())[name]
    state = trainer.optimizer.optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]


def force(gate, dead=1):
    """No token reaches expert `dead`; many reach none."""
    with torch.no_grad():
        gate.threshold[:START] = 0.2
        gate.threshold[dead] = 5.0


@pytest.mark.parametrize("source", ["most_used", "keep"])
def test_an_expert_is_removed_and_one_added(make_run, source, caplog):
    noise = {} if source == "keep" else {"moe_adapt_noise": 0.25}
    trainer, model, gate = make_run(moe_adapt_source=source, **noise)
    force(gate, dead=0)
    with torch.no_grad():
        gate.threshold[2] = 0.3
    routed(model)
    model.finish_update(1)
    sums, counts = gate.record.unrouted_sum_D.clone(), gate.record.routed_E.tolist()
    unrouted = int(gate.record.unrouted)
    most = max(range(SLOTS), key=counts.__getitem__)
    assert counts[0] == 0 and counts[2] and unrouted and most == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.INFO):
        adapt_experts(trainer)

    assert gate.active_E.tolist() == [True, True, True, False, False]  # 0 went and came
    assert torch.allclose(gate.weight[0], (sums / sums.norm()).float())
    assert gate.threshold[0] == 0
    for name, p in model.named_parameters():
        if not name.startswith(LAYER):
            assert torch.equal(p, before[name])
            continue
        assert torch.equal(p[1:], before[name][1:])
        for moment in moments(trainer, name):
            assert not moment[0].any()
            assert moment[1:].all()
        if ".experts." not in name:
            continue
        if source == "keep":
            assert torch.equal(p, before[name])
        else:
            std = before[name][most].std(correction=0)
            away = (p[0] - before[name][most]).std() / std
            assert 0.1 < away < 0.4  # few numbers in a bias
    assert not gate.record.routed_E.any() and not gate.record.unrouted_sum_D.any()
    assert caplog.messages[-1] == (
        f"{LAYER}, update 1: removed expert 0, which no token reached; added expert 0 for "
        f"{unrouted} tokens that reached none, its network "
        f"{'as it was' if source == 'keep' else 'a copy of expert 1' + chr(39) + 's'}; "
        "3 of 5 experts now"
    )


def test_the_noise_is_of_seed_layer_and_update(make_run):
    def added(**given):
        trainer, model, gate = make_run(**given)
        force(gate)
        torch.manual_seed(5)
        routed(model)
        torch.manual_seed(given.get("num_updates", 1) + 10)  # no part of it
        model.finish_update(trainer.get_num_updates())
        adapt_experts(trainer)
        return model.decoder.moe_layers[0].experts.fc1_weight[1]

    one = added(num_updates=1)
    assert torch.equal(one, added(num_updates=1))
    assert not torch.equal(one, added(num_updates=2))


@pytest.mark.parametrize(
    "precision",
    [{"fp16": True}, {"fp16": True, "memory_efficient_fp16": True}, {"bf16": True}],
    ids=["masters", "memory-efficient", "bf16"],
)
def test_half_precision_keeps_the_change_after_the_next_step(make_run, precision):
    trainer, model, gate = make_run(precision=precision)
    force(gate)
    gate.record.routed_E[0] = 7
    gate.record.unrouted.fill_(3)
    gate.record.unrouted_sum_D[:] = torch.arange(16.0)
    adapt_experts(trainer)
    wanted = torch.arange(16.0) / torch.arange(16.0).norm()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer._needs_sync = True
    trainer.optimizer.step()
    assert torch.equal(gate.weight[1], wanted.to(gate.weight.dtype))
    assert gate.threshold[1] == 0


def test_micro_batches_add_up_and_evaluation_does_not_count(make_run):
    trainer, model, gate = make_run(interval=3)
    counts = {}
    for parts in (1, 2):
        torch.manual_seed(7)
        batch = torch.randint(4, 40, (4, 12))
        gate.record.clear()
        model.train()
        for part in batch.chunk(parts):
            model(part)
        model.eval()(batch)
        with model.not_recording():
            model.train()(batch)
        model.finish_update(1)
        counts[parts] = (gate.record.routed_E.clone(), gate.record.unrouted_sum_D.clone())
    assert counts[1][0].any()
    assert torch.equal(counts[1][0], counts[2][0])
    assert torch.allclose(counts[1][1], counts[2][1])


def test_only_the_window_is_recorded(make_run):
    trainer, model, gate = make_run(interval=4, moe_adapt_window=1)
    for completed in range(4):
        model.set_num_updates(completed)
        assert not gate.record.routed_E.any()
        routed(model)
        model.finish_update(completed + 1)
    assert gate.record.routed_E.any()


def test_a_checkpoint_amid_the_window_brings_back_record_and_mask(make_run):
    trainer, model, gate = make_run(interval=4)
    gate.active_E[4] = True
    routed(model)
    model.finish_update(1)
    _, other, copy = make_run(interval=4)
    other.load_state_dict(model.state_dict())
    assert copy.active_E.tolist() == [True, True, True, False, True]
    assert torch.equal(copy.record.routed_E, gate.record.routed_E)
    assert torch.equal(copy.record.unrouted_sum_D, gate.record.unrouted_sum_D)


def test_driven_by_hand(make_run):
    trainer, model, gate = make_run(interval=0)
    force(gate)
    routed(model)
    model.begin_record_routing()  # what was routed before does not count
    routed(model, count=1)
    model.finish_update(1)
    assert 0 < gate.record.unrouted < 12
    adapt_experts(trainer)
    assert gate.active_E[1] and gate.threshold[1] == 5  # recording goes on
    routed(model)
    model.end_record_routing()
    before = int(gate.record.unrouted)
    routed(model)  # after the end
    model.finish_update(2)
    assert before < gate.record.unrouted <= 12 + 48
    adapt_experts(trainer)
    assert gate.threshold[1] == 0
    assert not gate.learns_after_updates
    routed(model)
    model.finish_update(3)
    assert not gate.record.routed_E.any()


def test_ended_between_updates_it_adapts_after_the_next(make_run):
    trainer, model, gate = make_run(interval=0)
    force(gate)
    model.begin_record_routing()
    routed(model)
    model.finish_update(1)
    adapt_experts(trainer)
    model.end_record_routing()
    counted = gate.record.routed_E.clone()
    routed(model)
    model.finish_update(2)
    assert torch.equal(gate.record.routed_E, counted)
    adapt_experts(trainer)
    assert gate.threshold[1] == 0


def test_recording_by_hand_is_refused_where_it_can_do_nothing(make_run, make_model):
    with pytest.raises(OptionError, match="--moe-adapt-record-interval 1: .*give 0"):
        make_run(interval=1)[1].begin_record_routing()
    with pytest.raises(OptionError, match="--moe-gate top_k: .*give top_any"):
        make_model(moe_gate="top_k").begin_record_routing()
    with pytest.raises(RuntimeError, match="without begin_record_routing"):
        make_run(interval=0)[1].end_record_routing()


def test_room_counts_as_parameters(make_model, make_config):
    from evomoe_plugin.models.accounting import count_parameters

    options = dict(
        decoder_layers=4,
        decoder_embed_dim=16,
        decoder_ffn_embed_dim=24,
        decoder_attention_heads=2,
        moe_gate="top_any",
        moe_max_experts=6,
    )
    for counts in ("4", "2,5"):
        model = make_model(**options, moe_expert_count=counts)
        sizes = count_parameters(make_config(**options, moe_expert_count=counts), 40)
        assert sizes.total == sum(p.numel() for p in model.parameters())
        assert [layer.num_experts for layer in model.decoder.moe_layers] == [6, 6]
        assert [int(layer.gate.active().sum()) for layer in model.decoder.moe_layers] == (
            [4, 4] if counts == "4" else [2, 5]
        )
