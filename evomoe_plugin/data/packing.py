"""Pack examples into rows."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit packing: longest examples first, ties in order of index. Deterministic.

    Args:
        sizes: of the examples, each at most `capacity`.
        capacity: tokens of a row.
    Returns:
        the indices of each row's examples, ascending; rows in order of their first example.
    """
    open_rows: dict[int, list[list[int]]] = {}  # by remaining space
    spaces: list[int] = []  # sorted
    rows: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(spaces, sizes[index])
        if place == len(spaces):
            row, space = list[int](), capacity
            rows.append(row)
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
        row.append(index)
        left = space - sizes[index]
        if left not in open_rows:
            open_rows[left] = []
            bisect.insort(spaces, left)
        open_rows[left].append(row)
    return sorted(sorted(row) for row in rows)
