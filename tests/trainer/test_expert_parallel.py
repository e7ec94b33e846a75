"""What a trainer does otherwise where experts are divided over processes."""

from types import SimpleNamespace

import pytest
import torch
from fairseq.trainer import Trainer

OUT_OF_MEMORY = "CUDA out of memory"


def trainer_of(size):
    """A trainer of two processes, whose batches do not fit into memory."""
    def step(*_, **__):
        raise RuntimeError(OUT_OF_MEMORY)

    return SimpleNamespace(
        cfg=SimpleNamespace(
            model=SimpleNamespace(moe_expert_parallel_size=size),
            ema=SimpleNamespace(store_ema=False),
            distributed_training=SimpleNamespace(distributed_world_size=2)),
        tpu=False, cuda=False, is_fsdp=False, data_parallel_world_size=2,
        model=torch.nn.Identity(), criterion=torch.nn.Identity(),
        task=SimpleNamespace(valid_step=step),
        _prepare_sample=lambda sample: (sample, False), _log_oom=lambda _error: None,
        tried=[])


@pytest.mark.parametrize("size", [1, 2])
def test_a_process_without_memory_ends_the_run(size):
    trainer = trainer_of(size)

    def again(sample, raise_oom):
        trainer.tried.append(raise_oom)

    trainer.valid_step = again
    if size == 1:
        Trainer.valid_step(trainer, {})
        assert trainer.tried == [True]  # as fairseq does: once more
        return
    with pytest.raises(RuntimeError, match=OUT_OF_MEMORY):
        Trainer.valid_step(trainer, {})
    assert not trainer.tried
