"""What a gate is told: of its layer, and of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from evomoe_plugin.routing import noise


@dataclass(frozen=True)
class LayerInfo:
    """The layer that a gate is for."""

    model_dim: int
    """D, width of the tokens."""
    num_experts: int
    """E, number of routed experts."""
    num_null: int = 0
    """Number of null experts: candidates whose output is zero, without computation."""
    layer_id: int = 0
    """Index of the MoE layer in the model, from 0."""
    seed: int = 1
    """Seed of the run."""
    token_counts_V: tuple[int, ...] = ()
    """Frequency of each token id in the training data, from the dictionary; empty if there is no
    vocabulary."""
    start_experts: int = 0
    """Number of routed experts, the first ones, that can be selected at the start; 0: all."""

    @property
    def num_candidates(self) -> int:
        """C."""
        return self.num_experts + self.num_null


@dataclass(frozen=True)
class GateContext:
    """Inputs of a gate besides the tokens."""

    num_updates: int = 0
    """Completed updates with gates: of the run, or since the spawn."""
    token_mask_T: Tensor | None = None
    """bool, False for padding; None: no padding."""
    token_keys_T: Tensor | None = None
    """int64 keys of the tokens, from which noise is made; None: no randomness."""
    token_ids_T: Tensor | None = None
    """int64 token ids."""
    token_weights_T: Tensor | None = None
    """Weight of each token in the auxiliary losses; None: 1."""
    noise_key: tuple[int, ...] = ()
    """What noise depends on beside the tokens: seed, update, layer."""

    @property
    def noise_keys_T(self) -> Tensor | None:
        """int64 noise keys of the tokens (`routing.noise`), made each time; None: no randomness."""
        if self.token_keys_T is None:
            return None
        return noise.fold_all(self.token_keys_T, *self.noise_key)

    def num_tokens(self, x_TD: Tensor) -> Tensor:
        """Tokens that are not padding, a scalar in fp64."""
        if self.token_mask_T is None:
            return x_TD.new_full((), x_TD.size(0), dtype=torch.float64)
        return self.token_mask_T.sum().double()

    @property
    def loss_weights_T(self) -> Tensor | None:
        """Weight of each token in the losses, 0 for padding; None: 1 for all."""
        if self.token_mask_T is None or self.token_weights_T is None:
            return self.token_weights_T if self.token_mask_T is None else self.token_mask_T
        return self.token_weights_T * self.token_mask_T
