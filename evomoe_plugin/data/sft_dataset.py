"""Batches of examples to fine-tune on, as fairseq's language models take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset, data_utils
from torch import Tensor

from evomoe_plugin.data.packing import pack
from evomoe_plugin.data.sft_examples import Example


class SFTDataset(FairseqDataset):
    """Rows of one example each, or of several.

    A row begins as fairseq begins to generate, with an end-of-sentence, and each position's target
    is the token that follows; padding where nothing is learned. `ntokens`, by which fairseq
    divides, is the number of targets.

    Args:
        examples: what is learned.
        dictionary: whose eos and padding are used.
        train_on_prompt: learn every token, not those of answers alone.
        answer_weight: of the tokens of answers in the auxiliary losses, where others weigh 1; if it
            is 1, no weights are made.
        row_size: pack examples into rows of so many tokens; None: one row each.
        scored: each row is learned from its first target to its end: tell `SequenceScorer` where.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        dictionary: Dictionary,
        *,
        train_on_prompt: bool = False,
        answer_weight: float = 1.0,
        row_size: int | None = None,
        scored: bool = False,
    ):
        self.examples = examples
        self._eos, self._pad = dictionary.eos(), dictionary.pad()
        self._train_on_prompt = train_on_prompt
        self._answer_weight = answer_weight
        self._scored = scored
        self._packed = row_size is not None
        lengths = [len(example) for example in examples]
        self._rows = [[i] for i in range(len(examples))] if row_size is None else (
            pack(lengths, row_size))
        self.sizes = np.array([sum(lengths[i] for i in row) for row in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors of one length: source, target, weights, segments; and the row's number, id."""
        parts = [self._example(self.examples[i]) for i in self._rows[index]]
        row = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        numbers = torch.arange(len(parts))
        lengths = torch.tensor([len(part["source"]) for part in parts])
        return {"id": index, **row, "segments": numbers.repeat_interleave(lengths)}

    def _example(self, example: Example) -> dict[str, Tensor]:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        answer = torch.from_numpy(example.answers > 0)
        start = torch.tensor([self._eos])
        target = tokens if self._train_on_prompt else tokens.masked_fill(~answer, self._pad)
        weights = torch.ones(len(tokens))
        weights[1:][answer[:-1]] = self._answer_weight
        return {"source": torch.cat([start, tokens[:-1]]), "target": target, "weights": weights}

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, padded on the right.

        Returns:
            `id` [B], `nsentences`, `ntokens` (targets that are not padding), `target` [B, T], and
            in `net_input` `src_tokens` [B, T], `src_lengths` [B], `segments` [B, T] of packed rows,
            `token_weights` [B, T] if answers weigh more or less; `start_indices`, the first target
            of each row, if it is to be scored.
        """
        if not samples:
            return {}

        def merge(name: str, padding: float) -> Tensor:
            return data_utils.collate_tokens([sample[name] for sample in samples], padding)

        target = merge("target", self._pad)
        net_input = {
            "src_tokens": merge("source", self._pad),
            "src_lengths": torch.tensor([len(sample["source"]) for sample in samples]),
        }
        if self._packed:
            net_input["segments"] = merge("segments", 0)
        if self._answer_weight != 1.0:
            net_input["token_weights"] = merge("weights", 0.0)
        learned = target != self._pad
        batch = {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": int(learned.sum()),
            "net_input": net_input,
            "target": target,
        }
        if self._scored:
            batch["start_indices"] = learned.int().argmax(1)
        return batch

    def num_tokens(self, index: int) -> int:
        """Length of a row, for --max-tokens."""
        return self.sizes[index]

    def num_tokens_vec(self, indices: np.ndarray) -> np.ndarray:
        """Lengths of rows."""
        return self.sizes[indices]

    def size(self, index: int) -> int:
        """Length of a row, for the model's limit."""
        return self.sizes[index]

    def ordered_indices(self) -> np.ndarray:
        """Rows by length, equal ones in an order drawn from numpy's generator."""
        return np.lexsort([np.random.permutation(len(self)), self.sizes])


def scoring_examples(examples: Sequence[Example]) -> list[Example]:
    """An example for each answer: what stands before it is read, it alone is learned.

    fairseq's scorer takes one stretch of each row; a model that looks back only gives each
    answer the same probability here as in its example.
    """
    divided = []
    for example in examples:
        for answer in np.unique(example.answers[example.answers > 0]):
            own = np.where(example.answers == answer, example.answers, 0)
            end = int(np.flatnonzero(own)[-1]) + 1
            divided.append(Example(example.tokens[:end], own[:end]))
    return divided
