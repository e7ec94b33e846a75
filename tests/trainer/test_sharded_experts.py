"""What the trainer does otherwise where experts are sharded over ranks."""

import types

import pytest
import torch
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.trainer.moe_trainer import MoETrainer

OUT_OF_MEMORY = "CUDA out of memory"


class OutOfMemory(MoETrainer):
    """A trainer of two ranks, whose batches do not fit into memory."""

    model = criterion = torch.nn.Identity()
    optimizer, data_parallel_world_size, is_fsdp = None, 2, False
    device = torch.device("cpu")

    def __init__(self, size):
        self.cfg = OmegaConf.create(
            {
                "model": {"moe_expert_parallel_size": size},
                "ema": {"store_ema": False},
                "distributed_training": {"distributed_world_size": 2},
            }
        )
        self.tpu = self.cuda = False
        self.task = types.SimpleNamespace(valid_step=self.step, train_step=self.step)
        self.tried, self.left_out = 0, False

    def step(self, *_args, **_kwargs):
        self.tried += 1
        raise RuntimeError(OUT_OF_MEMORY)

    def get_criterion(self):
        return self.criterion

    def get_model(self):
        return self.model

    def get_num_updates(self):
        return 1

    def _prepare_sample(self, sample):
        return sample, False

    def _log_oom(self, _error):
        pass

    def zero_grad(self):
        self.left_out = True


@pytest.mark.parametrize(("size", "tries"), [(1, 2), (2, 1)])
def test_a_rank_without_memory_ends_the_validation(size, tries):
    trainer = OutOfMemory(size)
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        trainer.valid_step({})
    assert trainer.tried == tries  # alone, it tries again as fairseq does


@pytest.mark.parametrize("size", [1, 2])
def test_a_rank_without_memory_ends_the_run(size):
    trainer = OutOfMemory(size)
    if size == 1:
        assert trainer._forward_backward([{}], trainer.shards_experts).ooms == 1
        assert trainer.left_out
        return
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        trainer._forward_backward([{}], trainer.shards_experts)
    assert not trainer.left_out


def trainer_with(monkeypatch, name, pointwise):
    """A trainer with sharded experts, whose optimizer, `--optimizer NAME`, is pointwise or not."""
    monkeypatch.setattr(Trainer, "_build_optimizer", lambda _trainer: None)
    model = torch.nn.Identity()
    model.groups, model.expert_names = object(), ()
    trainer = MoETrainer.__new__(MoETrainer)
    trainer._model = model
    trainer._optimizer = types.SimpleNamespace(supports_flat_params=pointwise)
    trainer.cfg = types.SimpleNamespace(optimizer=types.SimpleNamespace(_name=name))
    return trainer


@pytest.mark.parametrize("name, pointwise", [("adagrad", False), ("mine", True)])
def test_an_optimizer_of_single_weights_may_be_sharded(monkeypatch, name, pointwise):
    trainer_with(monkeypatch, name, pointwise)._build_optimizer()


def test_any_other_is_refused(monkeypatch):
    with pytest.raises(OptionError, match="--optimizer mine with --moe-expert-parallel-size"):
        trainer_with(monkeypatch, "mine", False)._build_optimizer()


def test_one_rank_cannot_save_alone(monkeypatch):
    with pytest.raises(RunFailed, match="cannot write mine.pt: with --moe-expert-parallel-size"):
        trainer_with(monkeypatch, "mine", True).save_checkpoint("mine.pt", {})
