"""The quickstart's text, prepared, and what a model of single symbols makes of it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDataset
from processes import ROOT, call

sys.path.insert(0, str(ROOT / "examples/quickstart"))

from commands import program
from recipe import Recipe, flags


def prepare(data: Path, quick: bool) -> None:
    """The quickstart's text, unless it is there; `quick`: a small part of it."""
    if not (data / "dict.txt").exists():
        recipe = Recipe(quick=quick)
        call([program("evomoe"), "prepare", *recipe.inputs, "--out", str(data),
              *flags(recipe.prepare)])


def unigram_perplexity(data: Path) -> float:
    """Of the test part, under the add-one smoothed counts of the training part."""
    size = len(Dictionary.load(str(data / "dict.txt")))
    counts_V, tested_V = (_count_symbols(data / split, size) for split in ("train", "test"))
    log_probs_V = ((counts_V + 1) / (counts_V.sum() + size)).log()
    return math.exp(-float((tested_V * log_probs_V).sum() / tested_V.sum()))


def _count_symbols(path: Path, size: int) -> torch.Tensor:
    """How often each of `size` symbols stands in a split."""
    sentences = MMapIndexedDataset(str(path))
    counts_V = torch.zeros(size, dtype=torch.float64)
    for i in range(len(sentences)):
        counts_V += sentences[i].bincount(minlength=size)
    return counts_V
