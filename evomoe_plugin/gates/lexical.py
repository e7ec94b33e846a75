"""The lexical prior: learned logits of each token id."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates.hash_tables import random_table
from evomoe_plugin.gates.logit_options import LogitOptions, lexical_init


class LexicalPrior(nn.Module):
    """d(u) T[token id], with a learned table T of V token ids and C candidates.

    A token id starts with an expert of its own choice and keeps it until the table or the scorer
    has learned otherwise, so that experts see the same tokens from the first update on. The table
    starts as zeros, normal numbers, or one logit at the expert that the hash of (seed, layer, id)
    gives, as the gate `hash` with random tables has it (Hash layers, arXiv 2106.04426).

    Stored are T / f: Adam changes a parameter by about the learning rate, whatever its gradient's
    scale, and so T by f times that.

    Args:
        table_VC: T at the start.
        options: `moe_lexical_lr_factor` is f; d falls from 1 to 0 in
            `moe_lexical_decay_updates` updates, or is always 1.
    """

    def __init__(self, table_VC: Tensor, options: LogitOptions):
        super().__init__()
        self.factor = options.moe_lexical_lr_factor
        self.decay_updates = options.moe_lexical_decay_updates
        self.table = nn.Parameter(table_VC / self.factor)

    def strength(self, num_updates: int) -> float:
        """d after `num_updates` updates."""
        if not self.decay_updates:
            return 1.0
        return max(0.0, 1.0 - num_updates / self.decay_updates)

    def logits(self, num_updates: int) -> Tensor:
        """d T, [V, C]."""
        return self.factor * self.strength(num_updates) * self.table

    def forward(self, token_ids_T: Tensor | None, dtype: torch.dtype) -> Tensor:
        """T[token id], [T, C], without d.

        Raises:
            ValueError: there are no token ids.
        """
        if token_ids_T is None:
            raise ValueError("--moe-lexical routes by token ids: give token_ids_T")
        return self.factor * F.embedding(token_ids_T, self.table).to(dtype)


def initial_table(
    options: LogitOptions,
    vocabulary: int,
    num_experts: int,
    num_candidates: int,
    layer_id: int,
    seed: int,
) -> Tensor:
    """T at the start, fp32 [V, C].

    Raises:
        OptionError: there is no vocabulary.
    """
    kind, number = lexical_init(options)
    if not vocabulary:
        raise OptionError(
            "moe_lexical",
            options.moe_lexical,
            "it has logits for each token id, and no vocabulary is known here",
        )
    if kind == "normal":
        return torch.randn(vocabulary, num_candidates) * number
    if kind == "hash":
        expert_V = random_table(vocabulary, num_experts, layer_id, seed)
        return F.one_hot(expert_V, num_candidates) * number
    return torch.zeros(vocabulary, num_candidates)
