"""Position tables that start with a row for every token id up to the padding index."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.models.transformer import transformer_decoder
from fairseq.modules import LearnedPositionalEmbedding, SinusoidalPositionalEmbedding
from torch import Tensor, nn

from evomoe_plugin.patches.patch import Patch, always, wrapping

# fairseq's own padding index, with which the table has two rows before the first position.
_PADDING_ROW = 1


class _AnyPadding(nn.Module):
    """Has fairseq's table count positions as for its own dictionary, whatever the padding is."""

    token_padding: int

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        marks = torch.where(input.eq(self.token_padding), _PADDING_ROW, _PADDING_ROW + 1)
        return super().forward(marks, *args, **kwargs)


class _Learned(_AnyPadding, LearnedPositionalEmbedding):
    pass


class _Sinusoidal(_AnyPadding, SinusoidalPositionalEmbedding):
    pass


def _positional_embedding(
    upstream: Callable[..., nn.Module],
    num_embeddings: int,
    embedding_dim: int,
    padding_idx: int | None,
    **given: Any,
) -> nn.Module:
    if padding_idx is None:
        return upstream(num_embeddings, embedding_dim, padding_idx, **given)
    table = upstream(num_embeddings, embedding_dim, _PADDING_ROW, **given)
    if padding_idx != _PADDING_ROW:
        is_learned = isinstance(table, LearnedPositionalEmbedding)
        table.__class__ = _Learned if is_learned else _Sinusoidal
        vars(table)["token_padding"] = padding_idx
    return table


PATCH = Patch(
    name="positions",
    broken="where padding has the token id P, position embeddings have P + 1 unused rows, and "
    "sinusoidal positions depend on P",
    upstream="fairseq/modules/positional_embedding.py: PositionalEmbedding",
    remove_when="fairseq counts positions from 0",
    needed=always("a tokenizer's own ids may have padding after a hundred thousand tokens"),
    apply=wrapping(transformer_decoder, PositionalEmbedding=_positional_embedding),
)
