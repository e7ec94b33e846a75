"""Times of an update's parts and its FLOPs, against counts by hand."""

import types

import pytest
import torch
from fairseq.logging import metrics

from evomoe_plugin.trainer import peak_flops, speed_log, step_times


class Clock:
    """Seconds pass where `now` is moved."""

    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (step_times, speed_log):
        monkeypatch.setattr(module, "time", clock)
    return clock


def train(times, criterion, clock, forward, backward, optimizer):
    for _ in range(2):  # micro-batches
        times.begin_batch()
        clock.now += forward
        criterion(torch.zeros(1))
        clock.now += backward
        times.end_batch()
        clock.now += 50  # between them
    times.begin_optimizer()
    clock.now += optimizer
    times.end_optimizer()


def test_parts_of_an_update_add_up(clock):
    criterion = torch.nn.Identity()
    times = step_times.StepTimes(torch.device("cpu"), criterion)
    train(times, criterion, clock, 1, 2, 3)
    assert times.take() == {"forward": 2000, "backward": 4000, "optimizer": 3000}
    assert times.take() == {}


def test_events_of_a_gpu_are_read_an_update_later(clock, monkeypatch):
    class Event:
        done = True

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def query(self):
            return Event.done

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    criterion = torch.nn.Identity()
    times = step_times.StepTimes(torch.device("cuda"), criterion)
    train(times, criterion, clock, 1, 2, 3)
    assert times.take() == {}
    train(times, criterion, clock, 10, 20, 30)
    assert times.take() == {"forward": 2000, "backward": 4000, "optimizer": 3000}
    Event.done = False  # the device is behind: nothing waits for it
    assert times.take() == {}


def logged(log, *updates):
    with metrics.aggregate(new_root=True) as meters:
        for update in updates:
            log.log_rate(*update[1:])
            log.log_left(update[0])
    return {name: meter.smoothed_value for name, meter in meters.items()}


def test_flops_of_a_device_and_their_share_of_its_peak(clock):
    log = speed_log.SpeedLog(torch.device("cpu"), torch.float32, 2, 0.5, max_update=0)
    output = [
        {"moe_flops_": torch.tensor(3e10)},
        {"moe_flops_encoder_": torch.tensor(1e10), "moe_flops_decoder_": torch.tensor(2e10)},
    ]
    # 3 x 6e10 FLOPs on two devices, in 0.5 and in 1.5 seconds: 1.8e11 / 2 s
    found = logged(log, (1, output, 0.5), (2, output, 1.5))
    assert found["tflops"] == pytest.approx(0.09)
    assert found["mfu"] == pytest.approx(0.18)


def test_time_that_is_left(clock):
    log = speed_log.SpeedLog(torch.device("cpu"), torch.float32, 1, 1.0, max_update=30)
    assert logged(log, (10, [], 1.0)) == {}
    clock.now += 7200  # five updates, or what else there was
    assert logged(log, (15, [], 1.0)) == {"hours_left": 6.0}


@pytest.mark.parametrize(
    ("name", "dtype", "precision", "tflops"),
    [
        ("NVIDIA H100 PCIe", torch.bfloat16, "highest", 756),
        ("NVIDIA H100 80GB HBM3", torch.float16, "highest", 989),
        ("NVIDIA A100-SXM4-80GB", torch.float32, "highest", 19.5),
        ("NVIDIA A100-SXM4-80GB", torch.float32, "high", 156),
        ("NVIDIA L40S", torch.bfloat16, "highest", 362),
        ("Another GPU", torch.bfloat16, "highest", None),
    ],
)
def test_peaks_of_gpus(monkeypatch, name, dtype, precision, tflops):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    peak_flops._of_gpu.cache_clear()
    found = peak_flops._of_gpu(name, dtype)
    assert found == (None if tflops is None else pytest.approx(1e12 * tflops))


def test_the_peak_of_a_cpu_is_measured(monkeypatch):
    ticks = iter([0.0, 0.004, 1.0, 1.002, 2.0, 2.5])  # the third takes too long for another
    monkeypatch.setattr(peak_flops, "time", types.SimpleNamespace(perf_counter=ticks.__next__))
    peak_flops._measured.cache_clear()
    assert peak_flops._measured(torch.float32, 1) == pytest.approx(2 * 512**3 / 0.002)
    peak_flops._measured.cache_clear()
