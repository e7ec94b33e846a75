"""How a table of tokens by candidates is divided among programs."""

from __future__ import annotations

from dataclasses import dataclass

import triton

ELEMENTS = 1024
"""Of a tile, at most, unless a single row has more."""
MOST_PROGRAMS = 256
"""Each reads the partial sums of all."""


@dataclass(frozen=True)
class Tiles:
    """Of T rows."""

    width: int
    """Columns of a tile, a power of two."""
    rows: int
    """Rows of a tile, a power of two."""
    rows_of_program: int
    """A multiple of `rows`."""
    programs: int
    """At least one."""

    @classmethod
    def of(cls, rows: int, columns: int) -> Tiles:
        width = triton.next_power_of_2(max(columns, 1))
        of_tile = min(max(ELEMENTS // width, 1), triton.next_power_of_2(max(rows, 1)))
        of_program = of_tile * max(triton.cdiv(rows, of_tile * MOST_PROGRAMS), 1)
        return cls(width, of_tile, of_program, max(triton.cdiv(rows, of_program), 1))
