"""What is logged of waiting for batches."""

import types

import pytest
import torch
from fairseq.data import iterators
from fairseq.logging import metrics

from evomoe_plugin.trainer import data_wait
from evomoe_plugin.trainer.moe_trainer import MoETrainer
from evomoe_plugin.trainer.step_times import StepTimes


@pytest.fixture
def ticking(monkeypatch):
    """A clock whose seconds pass where `now` is moved."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(data_wait, "time", clock)
    data_wait.take_seconds()
    return clock


def logged():
    trainer = types.SimpleNamespace(
        cuda=False,
        get_num_updates=lambda: 1,
        _step_times=StepTimes(torch.device("cpu"), torch.nn.Identity()),
        _speed_log=types.SimpleNamespace(log_left=lambda _: None, log_rate=None),
        _log_update=lambda *_: None,
    )
    with metrics.aggregate(new_root=True) as meters:
        MoETrainer._log_speed(trainer, types.SimpleNamespace(logging_outputs=[]), began=0.0)
    return meters["data_wait_ms"].avg


def test_all_batches_of_an_update_count_and_nothing_between(ticking):
    def slow():
        for i in range(5):
            ticking.now += 2.0
            yield i

    counted = iterators.CountingIterator(slow(), total=5)
    batches = data_wait.TimedGroupedIterator(counted, chunk_size=2)
    assert next(batches) == [0, 1]
    ticking.now += 100.0  # the update itself
    assert logged() == pytest.approx(4000)
    assert (next(batches), next(batches)) == ([2, 3], [4])  # one of them of no update
    assert logged() == pytest.approx(6000)
    assert logged() == 0
