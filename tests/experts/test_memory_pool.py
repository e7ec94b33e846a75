import os

import pytest
import torch

from evomoe_plugin.experts.kernels.cpu.memory_pool import HUGE_PAGE, SMALLEST, Pool

CPU = torch.device("cpu")


def floats(pool, size=SMALLEST // 4):
    return pool.empty((size,), torch.float32, CPU)


def test_memory_is_used_again_when_nothing_looks_into_it_any_more():
    pool = Pool()
    first = floats(pool)
    place = first.data_ptr()
    view = first.view(2, -1)[1]
    del first
    assert floats(pool).data_ptr() != place
    del view
    assert {floats(pool).data_ptr(), floats(pool).data_ptr()} & {place}


def test_shapes_and_types():
    pool = Pool()
    x = pool.empty((3, SMALLEST), torch.bfloat16, CPU)
    assert x.shape == (3, SMALLEST)
    assert x.dtype == torch.bfloat16
    assert x.is_contiguous()
    assert x.data_ptr() % HUGE_PAGE == 0
    assert pool.empty((0, 5), torch.float32, CPU).shape == (0, 5)


def test_small_tensors_are_torchs():
    pool = Pool()
    pool.empty((SMALLEST // 4 - 1,), torch.float32, CPU)
    assert pool.held == 0


def test_no_more_is_held_than_was_in_use_at_once():
    pool = Pool()
    sizes = [SMALLEST * n // 4 for n in (1, 7, 3, 40, 2, 90, 5)]
    for size in sizes:
        floats(pool, size)
    assert pool.held <= SMALLEST * 90
    two = [floats(pool, sizes[3]), floats(pool, sizes[5])]
    assert pool.held >= sum(t.numel() * 4 for t in two)


def test_what_was_needed_long_ago_is_given_back():
    pool = Pool()
    floats(pool, 50 * SMALLEST // 4)
    assert pool.held >= 50 * SMALLEST
    for _ in range(1100):
        floats(pool)
    assert pool.held <= 2 * SMALLEST


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_has_its_own():
    pool = Pool()
    x = floats(pool).fill_(1.0)
    child = os.fork()
    if child == 0:
        x[0] = 2.0  # not all: threads do not survive a fork
        os._exit(0)
    os.waitpid(child, 0)
    assert x.unique().tolist() == [1.0]
