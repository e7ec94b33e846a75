"""Steps of the trainer by themselves, without a run."""

import types
import weakref

import pytest
import torch
from fairseq.distributed import utils as distributed_utils

from evomoe_plugin.checkpoint import resume
from evomoe_plugin.trainer import loss_scaler, run_state
from evomoe_plugin.trainer.layouts import FullySharded, Replicated
from evomoe_plugin.trainer.moe_trainer import MoETrainer


class Bare(MoETrainer):
    """One of two ranks, with a model and options that a test gives."""

    data_parallel_world_size, data_parallel_process_group = 2, None
    data_parallel_rank, layout = 0, Replicated()
    device = torch.device("cpu")

    def __init__(self, model=None, **cfg):
        self._model = self._wrapped_model = model or torch.nn.Identity()
        self._criterion = self._wrapped_criterion = torch.nn.Identity()
        self.cfg = types.SimpleNamespace(
            model=types.SimpleNamespace(),
            checkpoint=types.SimpleNamespace(load_checkpoint_on_all_dp_ranks=False),
            distributed_training=types.SimpleNamespace(
                zero_sharding="none", distributed_world_size=2
            ),
            common=types.SimpleNamespace(fp16=False, bf16=False),
        )
        vars(self.cfg).update(cfg)

    # Of updates: what happens to the batches alone.
    cuda, ema_arguments, _optimizer = False, {}, object()

    def _prepare_sample(self, sample, is_dummy=False):
        return sample, False

    def get_num_updates(self):
        return 1


@pytest.fixture
def file(tmp_path, monkeypatch):
    """(path, what reading it gives, what was sent to the other ranks)."""
    path, content, sent = tmp_path / "checkpoint_last.pt", {}, []
    path.touch()
    monkeypatch.setattr(resume, "read_for", lambda *_: content)
    monkeypatch.setattr(
        distributed_utils,
        "broadcast_object",
        lambda state, **_: (sent.append(dict(state)), state)[1],
    )
    return str(path), content, sent


@pytest.mark.parametrize("optimizer", [{}, {"last_optimizer_state": None}])
def test_zero_sharding_sends_no_optimizer_state_where_there_is_none(file, optimizer):
    path, content, sent = file
    content.update(optimizer)
    sharding = types.SimpleNamespace(zero_sharding="os")
    state = run_state.read_checkpoint(Bare(distributed_training=sharding), path, False)
    assert sent == [optimizer] and state == optimizer


def test_zero_sharding_keeps_the_optimizer_state_on_the_first_rank(file):
    path, content, sent = file
    content["last_optimizer_state"] = {"state": {}}
    sharding = types.SimpleNamespace(zero_sharding="os")
    state = run_state.read_checkpoint(Bare(distributed_training=sharding), path, False)
    assert sent == [{"last_optimizer_state": "SHARDED"}]
    assert state == {"last_optimizer_state": {"state": {}}}


def test_each_rank_of_base_layers_reads_its_own_file(file):
    path, content, sent = file
    content["model"] = "of rank 1"
    trainer = Bare()
    trainer.cfg.model.base_layers = 1
    trainer.data_parallel_rank = 1
    assert run_state.read_checkpoint(trainer, path, False) is content and not sent


class Renamed(torch.nn.Module):
    """A model whose weight had another name in an earlier fairseq."""

    def __init__(self):
        super().__init__()
        self.now = torch.nn.Parameter(torch.zeros(1, dtype=torch.half))

    def load_state_dict(self, state, strict=True, model_cfg=None):
        state["now"] = state.pop("before")
        return super().load_state_dict(state, strict)


def test_fp32_weights_under_an_earlier_name_become_masters():
    weight = torch.tensor([1.0001])
    trainer = Bare(Renamed(), common=types.SimpleNamespace(fp16=True, bf16=False))
    state = {"optimizer_history": [], "model": {"before": weight}}
    assert run_state.load_model(trainer, "file.pt", state) == {"now": weight}
    assert trainer._model.now.item() == 1.0


def test_gradient_norms_are_summed_on_the_device_of_the_run(monkeypatch):
    """With --cpu-offload gradients are on the CPU, and NCCL sums on GPUs only."""
    monkeypatch.setattr(distributed_utils, "all_reduce", lambda value, group: value)
    trainer = Bare()
    trainer.layout, trainer.device = FullySharded(False), torch.device("meta")
    trainer._optimizer = types.SimpleNamespace(
        clip_grad_norm=lambda _clip, aggregate_norm_fn: aggregate_norm_fn(torch.ones(()))
    )
    assert trainer.clip_grad_norm(0.0).device == trainer.device


def test_a_loss_is_freed_before_the_next_batch():
    losses = []

    def step(**_):
        assert not losses or losses[-1]() is None
        loss = torch.ones(())
        losses.append(weakref.ref(loss))
        return loss, 1, {}

    trainer = Bare()
    trainer.task = types.SimpleNamespace(train_step=step)
    trainer._forward_backward([{}, {}], raise_oom=False)
    assert len(losses) == 2


def test_the_scaler_of_amp_goes_on_as_it_was():
    """It counts steps without overflow, by which its scale grows."""
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)

    def step(scaler, factor=1.0):
        scaler.scale(weight * factor).sum().backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return scaler.get_scale()

    assert [step(scaler), step(scaler, float("inf")), step(scaler)] == [8.0, 4.0, 4.0]
    resumed = torch.amp.GradScaler("cpu", growth_interval=3)
    loss_scaler.restore(resumed, loss_scaler.state_dict(scaler))
    assert [step(resumed) for _ in range(3)] == [step(scaler) for _ in range(3)] == [4.0, 8.0, 8.0]
    # That of --fp16 has counters of another kind, and earlier checkpoints have none.
    for state in ({"_iter": 7}, {}):
        loss_scaler.restore(resumed, state)
    assert resumed.get_scale() == 8.0
