"""The routing of recent updates, by which DynMoE's adaptive process adds and removes experts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evomoe_plugin.gates.fp64_buffers import fp64_buffer, register_fp64_buffer

_OFF, _ON, _ENDING = range(3)


class RoutingRecord(nn.Module):
    """Number of tokens of each expert, and the sum of the tokens without an expert.

    Recording is on in the last `window` updates of every `interval` or, without an interval,
    between `begin` and `end`. It depends only on the update number and on buffers, so that a
    checkpoint of any update continues it.

    Args:
        num_experts: E.
        model_dim: D.
        interval: updates; 0: recording is started and ended by calls.
        window: updates, at most the interval.
    """

    state: Tensor
    routed_E: Tensor
    unrouted: Tensor

    def __init__(self, num_experts: int, model_dim: int, interval: int, window: int):
        super().__init__()
        self.interval = interval
        self.window = window
        self.register_buffer("state", torch.zeros((), dtype=torch.int64))
        self.register_buffer("routed_E", torch.zeros(num_experts, dtype=torch.int64))
        self.register_buffer("unrouted", torch.zeros((), dtype=torch.int64))
        register_fp64_buffer(self, "unrouted_sum_D", torch.zeros(model_dim))
        self._state = _OFF
        self.register_load_state_dict_post_hook(_read_state)

    @property
    def unrouted_sum_D(self) -> Tensor:
        """Sum of the gate's inputs over tokens without an expert, fp64; a view."""
        return fp64_buffer(self, "unrouted_sum_D")

    @property
    def is_wanted(self) -> bool:
        """Whether this update, or a later one without further request, is recorded."""
        return self.interval > 0 or self._state != _OFF

    def zeros(self, device: torch.device) -> dict[str, Tensor]:
        """The result of `measure` while recording is off."""
        sizes = {
            "recorded_routed": self.routed_E.numel(),
            "recorded_unrouted": 1,
            "recorded_unrouted_sum": self.unrouted_sum_D.numel(),
        }
        return {
            name: torch.zeros(size, dtype=torch.float64, device=device)
            for name, size in sizes.items()
            if self.is_wanted
        }

    def begin(self) -> None:
        """Clear the record and start recording."""
        self.clear()
        self._set_state(_ON)

    def end(self) -> None:
        """Stop recording; at the end of the update the record is complete.

        Raises:
            RuntimeError: recording is not on.
        """
        if self._state != _ON:
            raise RuntimeError("end_record_routing() without begin_record_routing()")
        self._set_state(_ENDING)

    def is_recording(self, num_updates: int) -> bool:
        """Whether the update after `num_updates` completed ones is recorded."""
        if self.interval:
            return num_updates % self.interval >= self.interval - self.window
        return self._state == _ON

    def is_complete(self, num_updates: int) -> bool:
        """Whether the record is complete after `num_updates` updates."""
        if self.interval:
            return num_updates % self.interval == 0
        return self._state == _ENDING

    def measure(
        self, x_TD: Tensor, mask_TE: Tensor, token_mask_T: Tensor | None, num_updates: int
    ) -> dict[str, Tensor]:
        """The sums to record for these tokens, fp64; zeros while recording is off.

        Args:
            x_TD: the gate's input.
            mask_TE: bool, the experts selected for each token.
            token_mask_T: bool, False for padding; None: no padding.
            num_updates: completed updates.
        """
        zeros = self.zeros(x_TD.device)
        if not (zeros and self.is_recording(num_updates)):
            return zeros
        unrouted_T = ~mask_TE.any(1)
        if token_mask_T is not None:
            mask_TE = mask_TE & token_mask_T.unsqueeze(1)
            unrouted_T = unrouted_T & token_mask_T
        # masked_fill instead of a product: padding may hold NaN.
        lost_TD = x_TD.detach().masked_fill(~unrouted_T.unsqueeze(1), 0.0)
        values = (
            mask_TE.sum(0).double(),
            unrouted_T.sum().double().view(1),
            lost_TD.sum(0, dtype=torch.float64),
        )
        return dict(zip(zeros, values, strict=True))

    def add(self, measured: Mapping[str, Tensor], num_updates: int) -> None:
        """Add the results of `measure`, summed over an update.

        Args:
            num_updates: completed updates, this one included.
        """
        if self.interval and (num_updates - 1) % self.interval == self.interval - self.window:
            self.clear()  # another run may have left it half full
        self.routed_E += measured["recorded_routed"].round().to(torch.int64)
        self.unrouted += measured["recorded_unrouted"].round().to(torch.int64).squeeze()
        self.unrouted_sum_D.add_(measured["recorded_unrouted_sum"])

    def clear(self) -> None:
        """Clear the record; without an interval, stop recording."""
        self.routed_E.zero_()
        self.unrouted.zero_()
        self.unrouted_sum_D.zero_()
        self._set_state(_OFF)

    def _set_state(self, state: int) -> None:
        self._state = state
        self.state.fill_(state)


def _read_state(record: RoutingRecord, _incompatible_keys) -> None:
    record._state = int(record.state)
