"""What `fully_sharded` and `fsdp2` share: each rank has a part of every parameter, in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from evomoe_plugin.trainer.layouts.layout import Layout


class Sharded(Layout):
    """Each rank has a part of every parameter, of its gradient and its moments."""

    is_fully_sharded = True

    def all_reduce_grads(self, trainer: Any) -> None:
        trainer.optimizer.all_reduce_grads(trainer.model)

    def norm_over_ranks(self, trainer: Any) -> Callable[[Tensor], Tensor] | None:
        def norm(norm_of_this_rank: Tensor) -> Tensor:
            # Of gradients on the CPU (--cpu-offload) too: the ranks are connected by the device's.
            squared = norm_of_this_rank.to(trainer.device).float() ** 2
            group = trainer.data_parallel_process_group
            return distributed_utils.all_reduce(squared, group=group) ** 0.5

        return norm
