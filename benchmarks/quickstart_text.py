"""The quickstart's prepared text, and its perplexity under a unigram model."""

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
    """Prepare the quickstart's text if missing; `quick`: a small part of it."""
    if not (data / "dict.txt").exists():
        recipe = Recipe(quick=quick)
        call(
            [
                program("evomoe"),
                "prepare",
                *recipe.inputs,
                "--out",
                str(data),
                *flags(recipe.prepare),
            ]
        )


def unigram_perplexity(data: Path) -> float:
    """Perplexity on the test split under add-one smoothed counts of the training split."""
    size = len(Dictionary.load(str(data / "dict.txt")))
    counts_V, tested_V = (_count_tokens(data / split, size) for split in ("train", "test"))
    log_probs_V = ((counts_V + 1) / (counts_V.sum() + size)).log()
    return math.exp(-float((tested_V * log_probs_V).sum() / tested_V.sum()))


def _count_tokens(path: Path, size: int) -> torch.Tensor:
    """Count of each of `size` token ids in a split."""
    sentences = MMapIndexedDataset(str(path))
    counts_V = torch.zeros(size, dtype=torch.float64)
    for i in range(len(sentences)):
        counts_V += sentences[i].bincount(minlength=size)
    return counts_V
