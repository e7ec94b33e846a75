"""Balancing the load by a bias, without a loss (arXiv 2408.15664)."""

# No `from __future__ import annotations`: fairseq reads the types of the options at run time.

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from evomoe_plugin.config.options import ModelOptions, flag
from evomoe_plugin.gates.fp64_buffers import fp64_buffer, register_fp64_buffer
from evomoe_plugin.gates.gate import Gate, OptionsT
from evomoe_plugin.routing import stats as st


@dataclass
class BalanceBiasOptions(ModelOptions):
    """For gates that can balance the load by a bias."""

    moe_bias_update_rate: float = flag(
        0.0,
        "loss-free balancing: step per update of each expert's bias towards an even load; it is "
        "added for selection only, to the score (top_k) or the logit (dense_to_sparse)",
    )


class BiasBalancedGate(Gate[OptionsT]):
    """A gate with a bias b for selection: b_e += u sign(mean load - load_e) after each update."""

    bias_update_rate: float
    """u."""
    balanced: ClassVar[str] = st.REQUESTED_C
    """The statistic that is balanced, [C]."""

    def make_bias(self) -> None:
        """Make b, of zeros."""
        register_fp64_buffer(self, "bias_C", torch.zeros(self.info.num_candidates))

    @property
    def bias_C(self) -> Tensor:
        """b, fp64, if it was made; a view."""
        return fp64_buffer(self, "bias_C")

    @property
    def learns_after_updates(self) -> bool:
        return self.bias_update_rate > 0

    def after_update(
        self, num_updates: int, own: Mapping[str, Tensor], layers: Mapping[str, Tensor]
    ) -> None:
        load_C = own[self.balanced]
        self.bias_C.add_(torch.sign(load_C.mean() - load_C), alpha=self.bias_update_rate)
