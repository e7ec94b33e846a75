import random

import pytest

from evomoe_plugin.data.packing import pack


@pytest.mark.parametrize("seed", range(5))
def test_every_example_once_in_rows_that_hold_them(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(1, 50) for _ in range(300)]
    rows = pack(sizes, 50)
    assert sorted(i for row in rows for i in row) == list(range(300))
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert max(filled) <= 50
    # Best fit: no two rows could be one.
    two_emptiest = sorted(filled)[:2]
    assert sum(two_emptiest) > 50
    assert len(rows) <= 1.1 * sum(sizes) / 50 + 1


def test_the_fullest_row_that_has_room():
    # 9 alone; 6 and 4; 5, and 3 there, the fullest row with space.
    assert pack([3, 9, 4, 6, 5], 10) == [[0, 4], [1], [2, 3]]


def test_equal_lengths_keep_their_order():
    assert pack([5, 5, 5, 5, 5], 10) == [[0, 1], [2, 3], [4]]
    assert pack([], 10) == []
