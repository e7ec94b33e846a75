"""Several examples into one row."""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide examples among few rows: best fit, the longest first, equal ones in their order.

    The rows are the same whenever and wherever they are asked for.

    Args:
        sizes: of the examples, each at most `capacity`.
        capacity: what a row holds.
    Returns:
        the indices of each row's examples, ascending; the rows by their first example.
    """
    open_rows: dict[int, list[list[int]]] = {}  # by the space that is left
    spaces: list[int] = []  # sorted
    rows: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect.bisect_left(spaces, sizes[index])
        if place == len(spaces):
            row, space = [], capacity
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
