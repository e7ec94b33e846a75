"""The half of fairseq's layers after attention: its FFN, or an MoE layer in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import gelu

from evomoe_plugin.config.options import ModelOptions
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import MoELayer, build_layer
from evomoe_plugin.models.mixed_precision import Linear


class DenseFeedForward:
    """Layers of encoders and decoders inherit this before fairseq's class."""

    def build_fc1(self, *args: Any, **kwargs: Any) -> Module | None:
        """Called by fairseq."""
        return Linear.of(super().build_fc1(*args, **kwargs))  # type: ignore[misc]

    def build_fc2(self, *args: Any, **kwargs: Any) -> Module | None:
        """Called by fairseq."""
        return Linear.of(super().build_fc2(*args, **kwargs))  # type: ignore[misc]


def apply_moe(
    moe: MoELayer,
    x: Tensor,
    padding_mask: Tensor | None,
    token_keys: Tensor | None,
    token_ids: Tensor | None,
    token_weights: Tensor | None,
    with_token_routing: bool,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Apply an MoE layer to tokens in fairseq's order.

    Args:
        x: [length, batch, D].
        padding_mask: bool [batch, length or more], True for padding; of the last positions.
        token_keys, token_ids, token_weights: [length, batch], as in `MoELayer.forward`.
        with_token_routing: as `MoELayer.forward`.
    Returns:
        the output [length, batch, D], the auxiliary losses and statistics.
    """
    token_mask_T = None
    if padding_mask is not None:
        token_mask_T = ~padding_mask[:, -x.size(0) :].t().reshape(-1)
    y_TD, aux, stats = moe(
        x.reshape(-1, x.size(-1)),
        token_mask_T,
        *(
            None if known is None else known.reshape(-1)
            for known in (token_keys, token_ids, token_weights)
        ),
        with_token_routing=with_token_routing,
    )
    return y_TD.view_as(x), aux, stats


class MoEFeedForward:
    """Layers of encoders and decoders inherit this before fairseq's class."""

    # Of fairseq's class.
    activation_fn: Callable[[Tensor], Tensor]
    activation_dropout_module: Module
    dropout_module: Module
    final_layer_norm: Module
    normalize_before: bool
    residual_connection: Callable[[Tensor, Tensor], Tensor]

    moe: MoELayer

    def build_moe(self, options: ModelOptions, info: LayerInfo) -> None:
        """Build the MoE layer.

        Args:
            options: of the stack.
            info: the position of the MoE layer.
        """
        self.moe = build_layer(
            info,
            options,
            activation=gelu if options.activation_fn == "gelu" else self.activation_fn,
            dropout=self.activation_dropout_module,
        )

    def build_fc1(self, *args, **kwargs) -> None:
        """No dense FFN: the experts take its place."""

    def build_fc2(self, *args, **kwargs) -> None:
        """No dense FFN: the experts take its place."""

    def feed_forward(
        self,
        x: Tensor,
        padding_mask: Tensor | None,
        token_keys: Tensor | None = None,
        token_ids: Tensor | None = None,
        token_weights: Tensor | None = None,
        with_token_routing: bool = False,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Apply norm, MoE layer, dropout and residual connection.

        Args:
            x: [length, batch, D], fairseq's order.
            padding_mask: bool [batch, length or more], True for padding; of the last positions.
            token_keys: int64 noise keys [length, batch].
            token_ids: int64 token ids [length, batch].
            token_weights: weights in the auxiliary losses [length, batch].
            with_token_routing: as `MoELayer.forward`.
        Returns:
            x, and the auxiliary losses and statistics of the MoE layer.
        """
        residual = x
        if self.normalize_before:
            x = self.final_layer_norm(x)
        y, aux, stats = apply_moe(
            self.moe, x, padding_mask, token_keys, token_ids, token_weights, with_token_routing
        )
        x = self.residual_connection(self.dropout_module(y), residual)
        if not self.normalize_before:
            x = self.final_layer_norm(x)
        return x, aux, stats
