"""The composition of batches, which must be the same for a resumed run as for an unbroken one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from fairseq.tasks import FairseqTask

from evomoe_plugin.patches.patch import Patch, always, wrapping


def _get_batch_iterator(upstream: Callable, task: Any, *args: Any, **kwargs: Any) -> Any:
    """As upstream, but batches that all epochs share are drawn as in the first epoch.

    Upstream draws them with the epoch in which it is first asked, which for a resumed run is the
    one it was stopped in. Batches drawn anew in each epoch are left alone: there it is right.
    """
    given = inspect.signature(upstream).bind(task, *args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    dataset, epoch = asked["dataset"], asked["epoch"]
    shared = (
        not asked["disable_iterator_cache"]
        and not asked["update_epoch_batch_itr"]
        and task.can_reuse_epoch_itr(dataset)
        and not getattr(task.cfg, "rebuild_batches", False)
    )
    if not shared or epoch <= 1 or dataset in task.dataset_to_epoch_iter:
        return upstream(task, *args, **kwargs)
    asked["epoch"] = 1
    iterator = upstream(*given.args, **given.kwargs)
    iterator.epoch = epoch
    dataset.set_epoch(epoch)
    return iterator


PATCH = Patch(
    name="epoch-batches",
    broken="a run resumed in its second epoch or later trains on other batches than the unbroken "
    "run, so that its losses differ",
    upstream="fairseq/tasks/fairseq_task.py: get_batch_iterator seeds the order of samples with "
    "the epoch it is first called in, and then keeps the batches",
    remove_when="fairseq seeds reused batches without the epoch",
    needed=always("resuming is exact in every epoch"),
    apply=wrapping(FairseqTask, get_batch_iterator=_get_batch_iterator),
)
