"""fairseq-validate on several ranks, where one has fewer batches than the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fairseq.tasks import FairseqTask

from evomoe_plugin.dispatch.sharded_layers import sharded_layers
from evomoe_plugin.patches.patch import Patch, always, wrapping


def _valid_step(
    upstream: Callable, task: FairseqTask, sample: Any, model: Any, *args: Any, **kwargs: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """An empty batch has no loss. (A trainer passes an earlier batch instead.)"""
    if sample:
        return upstream(task, sample, model, *args, **kwargs)
    layers = sharded_layers(model)
    if layers:  # the other ranks' tokens go to experts of this one
        eos = task.source_dictionary.eos()
        with torch.no_grad():
            model(torch.tensor([[eos]], device=layers[0].num_updates.device))
    return 0.0, 0, {}


PATCH = Patch(
    name="empty-batches",
    broken="fairseq-validate on several ranks ends in KeyError: 'net_input' unless each has "
    "as many batches as the others",
    upstream="fairseq_cli/validate.py: main; fairseq/tasks/fairseq_task.py: valid_step",
    remove_when="fairseq-validate leaves out the batches that pad a rank's share",
    needed=always("the number of batches need not be a multiple of the number of ranks"),
    apply=wrapping(FairseqTask, valid_step=_valid_step),
)
