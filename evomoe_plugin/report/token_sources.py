"""Which input of `evomoe prepare` each token of a split is from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomoe_plugin.data.card import DataCard

MOST = 12
"""Sources that are told apart."""
_OTHERS = "other files"


class TokenSources:
    """The sources of a split's tokens: input files, or folders of them where files are many.

    Args:
        files: of `evomoe prepare`, in the order of the items.
        items: how many are from each of them.
        sizes: of all items, in tokens.

    Attributes:
        names: of the sources.
    """

    def __init__(self, files: Sequence[str], items: Sequence[int], sizes: Any):
        groups = grouped(files)
        self.names = list(dict.fromkeys(groups))
        of_file = torch.tensor([self.names.index(group) for group in groups])
        self._of_item = of_file.repeat_interleave(torch.tensor(items))
        self._ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)

    @classmethod
    def of(cls, folder: Path, subset: str, sizes: Any) -> TokenSources | None:
        """Those of a folder; None if `evomoe prepare` recorded none for it, or there is but one.

        Args:
            sizes: of the split's items, in tokens.
        """
        card = DataCard.load(folder)
        counts = {i["name"]: i.get("items", {}).get(subset) for i in card.inputs} if card else {}
        counts = {name: n for name, n in counts.items() if n}
        if len(counts) < 2 or sum(counts.values()) != len(sizes):
            return None
        return cls(list(counts), list(counts.values()), sizes)

    def between(self, start: int, end: int) -> Tensor:
        """The sources of tokens by their position in the split, int64 [end - start].

        Args:
            start: may be below 0: what stands before the first token counts as it.
        """
        position_T = torch.arange(start, end).clamp(min=0)
        return self._of_item[torch.bucketize(position_T, self._ends, right=True)]


def grouped(files: Sequence[str]) -> list[str]:
    """The source of each file: the longest leading part of its path of which there are few."""
    parts = [file.split("/") for file in files]
    found = [part[0] for part in parts]
    for depth in range(2, max(map(len, parts)) + 1):
        finer = ["/".join(part[:depth]) for part in parts]
        if len(set(finer)) > MOST:
            break
        found = finer
    names = list(dict.fromkeys(found))
    kept = set(names if len(names) <= MOST else names[: MOST - 1])
    return [name if name in kept else _OTHERS for name in found]
