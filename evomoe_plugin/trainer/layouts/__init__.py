"""How the ranks of a run hold its parameters, one `Layout` a file."""

from typing import Any

from evomoe_plugin.trainer.layouts.fsdp2 import Fsdp2
from evomoe_plugin.trainer.layouts.fully_sharded import FullySharded
from evomoe_plugin.trainer.layouts.layout import Layout
from evomoe_plugin.trainer.layouts.replicated import Replicated


def layout_of(parallel: Any) -> Layout:
    """The layout of a run.

    Args:
        parallel: fairseq's `DistributedTrainingConfig`.
    """
    if parallel.ddp_backend == "fsdp2":
        return Fsdp2()
    if parallel.ddp_backend == "fully_sharded":
        return FullySharded(parallel.use_sharded_state)
    return Replicated()
