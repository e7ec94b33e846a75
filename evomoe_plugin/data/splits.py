"""Assign documents to splits by a hash of their text only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

SPLITS = ("train", "valid", "test")
_RANGE = 1 << 64
_RANKED = 10_000


class Splitter:
    """Assigns documents to splits by the hash of (seed, text).

    Equal documents are always in the same split, and a document keeps its split when others are
    added or removed. If so few documents leave a split empty, `ranked` assigns them by rank.
    """

    def __init__(self, seed: int, fractions: Mapping[str, float]):
        self.seed = seed
        self.fractions = dict(fractions)
        self._below: dict[str, int] = {}  # a held-out split has the hashes below its bound
        bound = 0.0
        for split, share in self.fractions.items():
            bound += share
            self._below[split] = int(bound * _RANGE)
        self.hashes: set[int] = set()  # the first distinct hashes

    def split_of(self, text: str) -> str:
        """The split of the document that starts with `text` (its first passage)."""
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=_salt(self.seed)).digest()
        number = int.from_bytes(digest, "big")
        if len(self.hashes) <= _RANKED:
            self.hashes.add(number)
        return next((split for split, below in self._below.items() if number < below), "train")

    def ranked(self) -> Splitter | None:
        """A splitter with no empty split for the documents seen.

        None if there are too many documents to rank, or fewer distinct ones than splits.
        """
        count = len(self.hashes)
        if count > _RANKED or count <= len(self.fractions):
            return None
        other = Splitter(self.seed, self.fractions)
        order, taken = sorted(self.hashes), 0
        for done, (split, share) in enumerate(self.fractions.items(), start=1):
            others = len(self.fractions) - done + 1  # the splits that still need a document
            taken += min(max(1, int(share * count)), count - taken - others)
            other._below[split] = order[taken - 1] + 1
        return other


def _salt(seed: int) -> bytes:
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
