"""Batches of fine-tuning examples for fairseq's language models."""

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
    """Rows of one example each, or of several packed examples.

    A row starts with an end-of-sentence, as generation in fairseq does, or with the tokenizer's own
    start of a text or chat. The target of a position is the following token, or padding if that is
    not trained on. `ntokens`, by which fairseq
    normalizes, is the number of targets.

    Args:
        examples: to train on.
        dictionary: for padding.
        train_on_prompt: train on every token, not only on responses.
        response_weight: weight of response tokens in the auxiliary losses, where others have 1; if
            it is 1, batches have no weights.
        row_size: pack examples into rows of at most this many tokens; None: one example per row.
        scored: add the position of each row's first target, for `SequenceScorer`.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        dictionary: Dictionary,
        *,
        train_on_prompt: bool = False,
        response_weight: float = 1.0,
        row_size: int | None = None,
        scored: bool = False,
    ):
        self.examples = examples
        self._pad = dictionary.pad()
        self._train_on_prompt, self._response_weight = train_on_prompt, response_weight
        self._scored, self._packed = scored, row_size is not None
        lengths = [len(example) for example in examples]
        self._rows = [[i] for i in range(len(examples))]
        if row_size is not None:
            self._rows = pack(lengths, row_size)
        self.sizes = np.array([sum(lengths[i] for i in row) for row in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors of equal length: source, target, weights, segments; and the row's index, id."""
        parts = [self._example(self.examples[i], n) for n, i in enumerate(self._rows[index])]
        row = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {"id": index, **row}

    def _example(self, example: Example, segment: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        response = torch.from_numpy(example.responses > 0)
        source = torch.cat([torch.tensor([example.start]), tokens[:-1]])
        target = tokens if self._train_on_prompt else tokens.masked_fill(~response, self._pad)
        weights = torch.ones(len(tokens))
        weights[1:][response[:-1]] = self._response_weight
        return {
            "source": source,
            "target": target,
            "weights": weights,
            "segments": torch.full_like(tokens, segment),
        }

    def collater(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch, padded on the right.

        Returns:
            `id` [B], `nsentences`, `ntokens` (non-padding targets), `target` [B, T], and in
            `net_input` `src_tokens` [B, T], `src_lengths` [B], `segments` [B, T] of packed rows,
            `token_weights` [B, T] if the response weight is not 1; `start_indices`, the first
            target of each row, if `scored`.
        """
        if not samples:
            return {}

        def merge(name: str, padding: float) -> Tensor:
            return data_utils.collate_tokens([sample[name] for sample in samples], padding)

        target = merge("target", self._pad)
        lengths = torch.tensor([len(sample["source"]) for sample in samples])
        net_input = {"src_tokens": merge("source", self._pad), "src_lengths": lengths}
        if self._packed:
            net_input["segments"] = merge("segments", 0)
        if self._response_weight != 1.0:
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

    def size(self, index: Any) -> Any:
        """Length of a row, or of each of several."""
        return self.sizes[index]

    num_tokens = num_tokens_vec = size

    def ordered_indices(self) -> np.ndarray:
        """Rows by length, ties in random order (numpy's generator)."""
        return np.lexsort([np.random.permutation(len(self)), self.sizes])


def scoring_examples(examples: Sequence[Example]) -> list[Example]:
    """One example per response, with all preceding text as context.

    fairseq's scorer scores one contiguous span per row; a causal model assigns each response the
    same probability here as in its full example.
    """
    divided = []
    for example in examples:
        for response in np.unique(example.responses[example.responses > 0]):
            own = np.where(example.responses == response, example.responses, 0)
            end = int(np.flatnonzero(own)[-1]) + 1
            divided.append(Example(example.tokens[:end], own[:end], example.start))
    return divided
