"""Rows of several packed examples, each computed as if it were alone in a row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from evomoe_plugin.models.attention import Runs
from evomoe_plugin.routing import noise


def documents(tokens_BT: Tensor, eos: int) -> Tensor:
    """The number of each token's document in its row, int64 [B, T]: a `</s>` that is read begins
    one, as its first target is the token after it."""
    return tokens_BT.eq(eos).cumsum(1)


class Segments:
    """Positions of the examples in each row.

    Args:
        numbers_BT: int64, the index of each token's example, ascending in a row.
        padding_mask_BT: bool, True for padding, at the end of rows; its indices are ignored.
    """

    def __init__(self, numbers_BT: Tensor, padding_mask_BT: Tensor):
        # Padding belongs to the last example, so that it has something to attend to.
        numbers_BT = numbers_BT.masked_fill(padding_mask_BT, 0).cummax(1).values
        column_T = torch.arange(numbers_BT.size(1), device=numbers_BT.device)
        starts_BT = torch.zeros_like(numbers_BT, dtype=torch.bool)
        starts_BT[:, 1:] = numbers_BT[:, 1:] != numbers_BT[:, :-1]
        first_BT = (column_T * starts_BT).cummax(1).values
        self._padding_mask_BT = padding_mask_BT
        self._index_BT = starts_BT.long().cumsum(1)
        self.positions_BT = column_T - first_BT
        """int64, starting at 0 in each example."""

    def token_keys(self, tokens_BT: Tensor) -> Tensor:
        """The noise keys of `routing.noise.sequence_keys` for each example separately."""
        hashed_BT = noise.fold(self.positions_BT, tokens_BT) * ~self._padding_mask_BT
        sums_BT = torch.zeros_like(hashed_BT).scatter_add_(1, self._index_BT, hashed_BT)
        return noise.fold(sums_BT.gather(1, self._index_BT), self.positions_BT)

    def embed_positions(self, embedding: Callable[[Tensor], Tensor], padding_idx: int) -> Tensor:
        """[B, T, D]: fairseq's learned or sinusoidal positions, which restart in each example.

        Args:
            embedding: maps token ids [1, T] to position embeddings; padding gets zeros.
        """
        table_TD = embedding(torch.full_like(self.positions_BT[:1], padding_idx + 1))[0]
        x_BTD = torch.nn.functional.embedding(self.positions_BT, table_TD)
        return x_BTD.masked_fill(self._padding_mask_BT.unsqueeze(2), 0.0)

    def runs(self) -> Runs:
        """The attention mask: a token attends to those before it in its example."""
        rows_BT = torch.arange(self._index_BT.size(0), device=self._index_BT.device).unsqueeze(1)
        numbers = rows_BT * (self._index_BT.size(1) + 1) + self._index_BT
        return Runs(tuple(numbers.flatten().unique_consecutive(return_counts=True)[1].tolist()))

    def attention_mask(self, future_mask_TT: Tensor, num_heads: int) -> Tensor:
        """Additive mask [B * num_heads, T, T], as in fairseq's attention.

        Args:
            future_mask_TT: additive causal mask, which is kept.
        """
        apart_BTT = self._index_BT.unsqueeze(2) != self._index_BT.unsqueeze(1)
        mask_BTT = future_mask_TT.unsqueeze(0).masked_fill(apart_BTT, float("-inf"))
        return mask_BTT.repeat_interleave(num_heads, 0)
