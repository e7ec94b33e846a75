"""Split rows sorted by expert into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Chunk:
    """Consecutive rows of one or more experts."""

    start: int
    stop: int
    experts: list[int] = field(default_factory=list)
    """The experts, in order."""
    sizes: list[int] = field(default_factory=list)
    """Rows of each of them."""
    is_first: list[bool] = field(default_factory=list)
    """Whether no earlier chunk has rows of the expert."""

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.stop - self.start


def chunks_of(counts: Sequence[int], most: int) -> list[Chunk]:
    """Split rows: experts with few rows share a chunk, those with many have several.

    Args:
        counts: rows of each expert.
        most: rows of a chunk; an expert with up to a quarter more is not split.
    """
    chunks = [Chunk(0, 0)]
    for expert, count in enumerate(counts):
        pieces = -(-4 * count // (5 * most))
        for i in range(pieces):
            size = count * (i + 1) // pieces - count * i // pieces
            chunk = chunks[-1]
            if chunk.size and chunk.size + size > most:
                chunks.append(chunk := Chunk(chunk.stop, chunk.stop))
            chunk.stop += size
            chunk.experts.append(expert)
            chunk.sizes.append(size)
            chunk.is_first.append(i == 0)
    return chunks if chunks[0].size else []
