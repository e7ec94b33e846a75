"""The MoE layer: the one place where gate, dispatcher and experts meet."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evomoe_plugin.dispatch import LocalDispatcher
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.gates.base import Gate, GateContext
from evomoe_plugin.routing import noise
from evomoe_plugin.routing import stats as st


class MoELayer(nn.Module):
    """Route tokens to experts and sum what they answer.

    Nothing is kept between forward and loss: the auxiliary losses and statistics are outputs, so
    that activation checkpointing and FSDP can neither lose nor double them. They leave as two
    flat tensors, since neither carries gradients through containers; `aux` and `stats` name them
    again.

    Args:
        gate: routes.
        experts: answer.
        layer_id: which of the model's MoE layers this is; part of the key of its noise.
        seed: the run's seed; likewise.
    """

    def __init__(self, gate: Gate, experts: ExpertFFN, layer_id: int = 0, seed: int = 1):
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.dispatcher = LocalDispatcher()
        self.layer_id = layer_id
        self.seed = seed
        # In the checkpoint, since evaluation routes as training did when it was written.
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._num_updates = 0
        self.register_load_state_dict_post_hook(_read_num_updates)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.gate.num_experts

    def set_num_updates(self, num_updates: int) -> None:
        """Tell the number of completed updates; schedules follow it."""
        if num_updates != self._num_updates:
            self._num_updates = num_updates
            self.num_updates.fill_(num_updates)

    def forward(
        self,
        x_TD: Tensor,
        token_mask_T: Tensor | None = None,
        token_keys_T: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the layer.

        Args:
            x_TD: tokens.
            token_mask_T: bool, False for padding, which is routed nowhere and counted nowhere.
            token_keys_T: int64 keys of the tokens (`routing.noise.sequence_keys`); None: no noise.
        Returns:
            y_TD, zeros for tokens without an expert; the auxiliary losses, [A] with gradient; the
            statistics, detached fp64.
        """
        keys_T = token_keys_T
        if keys_T is not None:
            for part in (self.seed, self._num_updates, self.layer_id):
                keys_T = noise.fold(keys_T, part)
        plan = self.gate(x_TD, GateContext(self._num_updates, token_mask_T, keys_T))
        dispatched = self.dispatcher.dispatch(x_TD, plan)
        rows_ND = self.experts(dispatched.rows_ND, dispatched.counts)
        y_TD = self.dispatcher.combine(rows_ND, dispatched)
        aux = torch.stack([plan.aux[name] for name in self.gate.AUX]) if self.gate.AUX else (
            x_TD.new_zeros(0, dtype=torch.float32))
        return y_TD, aux, torch.cat([plan.stats[name].reshape(-1) for name in self._stat_sizes()])

    def _stat_sizes(self) -> dict[str, int]:
        scalars = (st.TOKENS, st.PAIRS, st.ENTROPY, st.NONFINITE, *self.gate.STATS)
        return {**dict.fromkeys(scalars, 1), st.LOAD_E: self.num_experts}

    @property
    def stats_size(self) -> int:
        """Length of the flat statistics."""
        return sum(self._stat_sizes().values())

    def named_stats(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Name the statistics `forward` returned: scalars, and [E] for `tokens_per_expert`."""
        sizes = self._stat_sizes()
        parts = flat.split(list(sizes.values()))
        return {
            name: part if name == st.LOAD_E else part.squeeze(0)
            for name, part in zip(sizes, parts, strict=True)
        }


def _read_num_updates(layer: MoELayer, _incompatible_keys) -> None:
    layer._num_updates = int(layer.num_updates)
