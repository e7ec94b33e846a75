"""The peak of a device, for the share of it that training reaches (MFU)."""

from __future__ import annotations

import functools
import logging
import time
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)


class Peak(NamedTuple):
    """TFLOPS of dense matmuls, by precision."""

    half: float  # bf16, and fp16 with fp32 sums
    tf32: float
    fp32: float


# From NVIDIA's data sheets, without sparsity. The first name that the device's contains counts.
_GPUS = {
    "B200": Peak(2250, 1125, 75),
    "H200": Peak(989, 494, 67),
    "H100 PCIe": Peak(756, 378, 51),
    "H100": Peak(989, 494, 67),
    "A100": Peak(312, 156, 19.5),
    "A10": Peak(125, 62.5, 31.2),
    "L40S": Peak(362, 183, 91.6),
    "L4": Peak(121, 60, 30.3),
    "RTX 4090": Peak(165, 82.6, 82.6),
    "RTX 3090": Peak(71, 35.6, 35.6),
    "V100": Peak(125, 15.7, 15.7),
    "T4": Peak(65, 8.1, 8.1),
}
_SIZE, _TRIES, _MOST_SECONDS = 512, 8, 0.1


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a device; None if it is a GPU that is not known.

    That of a CPU is measured: the best of some matmuls of 512 x 512 with this process's threads.
    """
    if device.type == "cuda":
        return _of_gpu(torch.cuda.get_device_name(device), dtype)
    return _measured(dtype, torch.get_num_threads())


@functools.cache
def _of_gpu(name: str, dtype: torch.dtype) -> float | None:
    for known, peak in _GPUS.items():
        if known in name:
            if dtype in (torch.float16, torch.bfloat16):
                return 1e12 * peak.half
            tf32 = torch.get_float32_matmul_precision() != "highest"
            return 1e12 * (peak.tf32 if tf32 else peak.fp32)
    logger.info("mfu is not logged: the peak of %s is not known, give --moe-peak-tflops", name)
    return None


@functools.cache
def _measured(dtype: torch.dtype, _threads: int) -> float:
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    out = torch.empty_like(a)
    seconds: list[float] = []
    while len(seconds) < _TRIES and sum(seconds) < _MOST_SECONDS:
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * _SIZE**3 / min(seconds)
