"""Self-attention of decoders by torch's `scaled_dot_product_attention`."""

from __future__ import annotations

import enum
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from torch import Tensor
from torch.nn import functional as F

from evomoe_plugin.models.causal_dropout import attend_with_dropout
from evomoe_plugin.models.mixed_precision import Linear, emulated

logger = logging.getLogger(__name__)


class Mask(enum.Enum):
    """Attention masks that need no tensor."""

    CAUSAL = enum.auto()  # A token attends to those before it and to itself


@dataclass(frozen=True)
class Runs:
    """Consecutive tokens, each of which attends to those before it in its run and to itself.

    Args:
        lengths: tokens of each run, over all rows of the batch, one row after another.
    """

    lengths: tuple[int, ...]


AttentionMask = Mask | Runs | Tensor | None
"""Or bool [B, 1, T or 1, keys], True where a query may attend to a key; None: to all."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, dropout: float = 0.0
) -> Tensor:
    """softmax(scale * q k^T) v, with dropout of the weights.

    Args:
        q, k, v: [B, heads, T or keys, head width].
        dropout: probability that a weight is dropped.
    Returns:
        [B, heads, T, head width].
    """
    if isinstance(mask, Runs):
        return _attend_in_runs(q, k, v, mask, scale, dropout)
    causal = isinstance(mask, Mask)
    if dropout and causal and q.device.type == "cpu":
        return attend_with_dropout(q, k, v, scale, dropout)
    sdpa = functools.partial(
        F.scaled_dot_product_attention,
        dropout_p=dropout,
        is_causal=causal,
        attn_mask=None if isinstance(mask, Mask) else mask,
        scale=scale,
    )
    if emulated(q) is None:
        return sdpa(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return sdpa(q.float(), k.float(), v.float()).to(q.dtype)


def _attend_in_runs(
    q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float, dropout: float
) -> Tensor:
    """Without a mask: on GPUs by flash attention of sequences of several lengths, where it takes
    the dtype and width; else run by run."""
    B, H, T, width = q.shape
    if (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and not dropout
        and width % 8 == 0
        and width <= 256
    ):
        return _attend_in_runs_at_once(q, k, v, runs, scale)
    _log_runs("one call of torch's scaled_dot_product_attention for each")
    # Splitting one dimension has a backward pass of one concatenation.
    flat = (x.transpose(0, 1).reshape(1, H, B * T, width) for x in (q, k, v))
    parts = zip(*(x.split(runs.lengths, 2) for x in flat), strict=True)
    outputs = [attend(q, k, v, Mask.CAUSAL, scale, dropout) for q, k, v in parts]
    return torch.cat(outputs, 2).view(H, B, T, width).transpose(0, 1)


def _attend_in_runs_at_once(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> Tensor:
    # Imports torch._dynamo, which takes a second.
    from torch.nn.attention.varlen import varlen_attn

    _log_runs("flash attention of sequences of several lengths (torch's varlen_attn)")
    B, H, T, width = q.shape
    lengths = torch.tensor((0, *runs.lengths), device=q.device)
    starts, longest = lengths.cumsum(0).int(), max(runs.lengths)
    q, k, v = (x.transpose(1, 2).reshape(B * T, H, width) for x in (q, k, v))
    causal = (-1, 0)
    y = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale, window_size=causal)
    assert isinstance(y, Tensor)
    return y.view(B, T, H, width).transpose(1, 2)


def causal_mask(padding_mask_BT: Tensor | None, is_first: bool | None = None) -> Mask | Tensor:
    """The causal self-attention mask of a padded batch.

    Padding after all tokens of its row is masked by causality already. Elsewhere it attends to
    itself, since an empty row of the mask would give NaN.

    Args:
        padding_mask_BT: bool, True for padding; None: there is none.
        is_first: whether there is padding before a token; None: look.
    Returns:
        `Mask.CAUSAL`, or bool [B, 1, T, T], True where a query (third) may attend to a key.
    """
    if padding_mask_BT is None:
        return Mask.CAUSAL
    if is_first is None:
        is_first = bool((padding_mask_BT[:, :-1] & ~padding_mask_BT[:, 1:]).any())
    if not is_first:
        return Mask.CAUSAL
    T = padding_mask_BT.size(1)
    past_TT = torch.ones(T, T, dtype=torch.bool, device=padding_mask_BT.device).tril()
    itself_TT = torch.eye(T, dtype=torch.bool, device=padding_mask_BT.device)
    return ((past_TT & ~padding_mask_BT[:, None]) | itself_TT).unsqueeze(1)


class SelfAttention(MultiheadAttention):
    """fairseq's self-attention, faster: the same parameters, incremental state and outputs.

    Outputs are equal to rounding at tokens that are not padding. Unsupported arguments are left to
    fairseq's own forward pass, which is logged once.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, **kwargs: Any):
        super().__init__(embed_dim, num_heads, dropout=dropout, **kwargs)
        # The name that --retain-dropout-modules takes.
        self.dropout_module.module_name = MultiheadAttention.__name__
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, Linear.of(getattr(self, name)))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Tensor | None]] | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: AttentionMask = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: [T, B, D]; key and value are the same.
            key_padding_mask: [B, keys], True for padding; ignored with an `attn_mask` of
                `causal_mask`, which includes it.
            incremental_state: keys and values of earlier steps.
            attn_mask: from `causal_mask`; None: all may attend to all. Other masks, and arguments
                not named here, are left to fairseq's own forward pass.
        Returns:
            [T, B, D], and None.
        """
        ours = (
            attn_mask
            if isinstance(attn_mask, (Mask, Runs))
            or (attn_mask is not None and attn_mask.dtype == torch.bool and attn_mask.dim() == 4)
            else None
        )
        both = incremental_state is not None and ours is not None
        reasons = {
            "xFormers is used": self.use_xformers,
            "it is not self-attention": not self.self_attention,
            "keys are added": self.bias_k is not None or self.add_zero_attn,
            "the module is traced or pruned": self.onnx_trace or self.skip_embed_dim_check,
            "attention weights are asked for": need_weights or need_head_weights,
            "more than the output is asked for": before_softmax or static_kv,
            "keys or values are of another sequence": key is not query or value is not query,
            "the mask is of another kind": attn_mask is not ours,
            "a mask is given in incremental decoding": both,
        }
        if any(reasons.values()):
            _log_stock(next(reason for reason, holds in reasons.items() if holds))
            if ours is not None:
                attn_mask = self._additive(ours, query)
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                incremental_state,
                need_weights,
                static_kv,
                attn_mask,
                before_softmax,
                need_head_weights,
            )

        T, B, _ = query.shape
        q, k, v = (
            project(query).view(T, B, self.num_heads, self.head_dim).permute(1, 2, 0, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if incremental_state is not None:
            k, v, key_padding_mask = self._with_past(k, v, key_padding_mask, incremental_state)
        if attn_mask is None and key_padding_mask is not None:
            attn_mask = ~key_padding_mask.bool()[:, None, None]
        y = self._attend(q, k, v, attn_mask)
        return self.out_proj(y.permute(2, 0, 1, 3).reshape(T, B, self.embed_dim)), None

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        dropout = 0.0
        if self.training or self.dropout_module.apply_during_inference:
            dropout = self.dropout_module.p
        return attend(q, k, v, mask, self.scaling, dropout)

    def _with_past(
        self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, incremental_state: Any
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and padding of all steps, saved in fairseq's incremental state."""
        saved = self._get_input_buffer(incremental_state)
        if "prev_key" in saved:
            k = torch.cat([saved["prev_key"], k], 2)
            v = torch.cat([saved["prev_value"], v], 2)
        key_padding_mask = self._append_prev_key_padding_mask(
            key_padding_mask,
            saved.get("prev_key_padding_mask"),
            k.size(0),
            k.size(2),
            static_kv=False,
        )
        saved.update(prev_key=k, prev_value=v, prev_key_padding_mask=key_padding_mask)
        self._set_input_buffer(incremental_state, saved)
        return k, v, key_padding_mask

    def _additive(self, mask: Mask | Runs | Tensor, x: Tensor) -> Tensor:
        """The additive mask of fairseq: [T, T], or [B * heads, T, T]."""
        if isinstance(mask, Runs):
            lengths = torch.tensor(mask.lengths, device=x.device)
            run_BT = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
            run_BT = run_BT.view(-1, x.size(0))
            mask = (run_BT.unsqueeze(2) == run_BT.unsqueeze(1)).tril().unsqueeze(1)
        if isinstance(mask, Mask):
            return x.new_full((x.size(0), x.size(0)), float("-inf")).triu(1)
        additive = x.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
        return additive.expand(-1, self.num_heads, -1, -1).flatten(0, 1)


@functools.cache
def _log_stock(reason: str) -> None:
    logger.info("attention is computed by fairseq's own forward pass: %s", reason)


@functools.cache
def _log_runs(how: str) -> None:
    logger.info("documents of a row do not attend to each other: %s", how)
