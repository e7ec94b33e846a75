"""`fairseq-eval-lm --context-window` with several workers or ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fairseq.data import LMContextWindowDataset, MonolingualDataset
from fairseq.tasks import language_modeling
from torch import Tensor

from evomoe_plugin.patches.patch import Patch, always, replacing


class ContextWindowDataset(LMContextWindowDataset):
    """Samples after the tokens that precede them in the data set.

    Upstream takes the context from the batch collated before, in whatever process did it; here it
    follows from the sample's index, so that it depends neither on workers nor on ranks.

    Args:
        dataset: of single targets.
        tokens_per_sample: of a sample.
        context_window: of preceding tokens; fewer at the start, and in rows that would be longer
            than both together.
        pad_idx: padding.
    """

    def __init__(
        self,
        dataset: MonolingualDataset,
        tokens_per_sample: int,
        context_window: int,
        pad_idx: int,
    ):
        super().__init__(dataset, tokens_per_sample, context_window, pad_idx)
        own = np.asarray(dataset.sizes, dtype=np.int64)
        before = np.minimum(own.cumsum() - own, context_window)
        longest = np.maximum(own, tokens_per_sample + context_window)
        self.sizes = np.minimum(before + own, longest)
        self._next, self._tail = 0, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The sample, and its `context`, the tokens before it."""
        sample = self.dataset[index]
        context = self._before(index)
        self._next, self._tail = index + 1, self._last(torch.cat([context, sample["source"]]))
        room = self.tokens_per_sample + self.context_window - len(sample["source"])
        return {**sample, "context": context[max(0, len(context) - max(0, room)) :]}

    def _before(self, index: int) -> Tensor:
        """The last tokens of earlier samples; after the one before, without reading them again."""
        if index == self._next:
            return self._tail
        parts: list[Tensor] = []
        while index > 0 and sum(map(len, parts)) < self.context_window:
            index -= 1
            parts.insert(0, self.dataset[index]["source"])
        return self._last(torch.cat(parts)) if parts else self._tail[:0]

    def _last(self, tokens: Tensor) -> Tensor:
        return tokens[-self.context_window :].clone()

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """As the data set's, with `start_indices`, where each row's own tokens start."""
        if not samples:
            return {}
        starts = [len(sample["context"]) for sample in samples]
        rows = [
            {
                **sample,
                "source": torch.cat([sample["context"], sample["source"]]),
                "target": torch.cat(
                    [torch.full_like(sample["context"], self.pad_idx), sample["target"]]
                ),
            }
            for sample in samples
        ]
        batch = self.dataset.collater(rows)
        batch["ntokens"] -= sum(starts)
        return {**batch, "start_indices": starts}

    def num_tokens(self, index: int) -> int:
        """Length of a row."""
        return self.sizes[index]

    num_tokens_vec = size = num_tokens


PATCH = Patch(
    name="context-window",
    broken="fairseq-eval-lm --context-window prints another perplexity for each number of workers "
    "and ranks: the context of a sample is what the same process collated before",
    upstream="fairseq/data/lm_context_window_dataset.py: prev_tokens",
    remove_when="its context follows from the sample",
    needed=always("perplexity depends neither on workers nor on ranks"),
    apply=replacing(language_modeling, LMContextWindowDataset=ContextWindowDataset),
)
