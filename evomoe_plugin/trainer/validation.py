"""Validation of a trainer's model: a batch, samples of routing, the metric of the best one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.data.iterators import EpochBatchIterating, EpochBatchIterator
from fairseq.logging import metrics

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.trainer import failed_updates
from evomoe_plugin.trainer.routing_sample import RoutingSample

logger = logging.getLogger(__name__)


class FirstBatches(EpochBatchIterating):
    """The first `--max-valid-steps` batches: fairseq's loop would take one more."""

    def __init__(self, batches: EpochBatchIterating, most: int):
        self._batches, self._most = batches, most

    def __len__(self) -> int:
        return min(len(self._batches), self._most)

    def next_epoch_itr(self, *args: Any, **kwargs: Any) -> Any:
        return self._batches.next_epoch_itr(*args, **kwargs).take(self._most)


def begin_routing_samples(
    trainer: Any,
    subset: str,
    batches: EpochBatchIterating,
    samples: dict[tuple[str, str], RoutingSample],
) -> list[RoutingSample]:
    """The samples of a subset that is validated on `batches`, one of each stack of layers; none:
    routing is not compared.

    Args:
        samples: by subset and stack, those of earlier validations; new ones are added.
    """
    num_tokens = getattr(trainer.get_criterion(), "stability_tokens", 0)
    if not (num_tokens and isinstance(batches, EpochBatchIterator)):
        return []
    most = trainer.cfg.dataset.max_valid_steps
    steps = len(batches) if most is None else min(len(batches), most)
    found = []
    for stack, num_layers in getattr(trainer.get_model(), "gated_layers", {}).items():
        if (subset, stack) not in samples:
            padding = trainer.task.source_dictionary.pad()
            samples[subset, stack] = RoutingSample(batches.dataset, num_tokens, padding, stack)
        samples[subset, stack].begin(num_layers, steps, trainer.device)
        found.append(samples[subset, stack])
    return found


def valid_step(
    trainer: Any, sample: Any, raise_oom: bool = False, routing: Sequence[RoutingSample] = ()
) -> Any:
    """Evaluate a batch.

    Args:
        sample: the batch; empty on a rank that has none left.
        raise_oom: raise if it does not fit into memory, instead of trying once more. Where there
            are other ranks, the run ends.
        routing: get the routing of the batch's tokens.
    Returns:
        What was logged.
    """
    tokens = [each.tokens_of(sample) if sample else None for each in routing]
    is_asked = any(found is not None for found in tokens)
    sample, is_dummy = trainer._prepare_sample(sample)
    if is_asked:
        asking = {**sample["net_input"], "with_token_routing": True}
        sample = {**sample, "net_input": asking}
    trainer.model.eval()
    trainer.criterion.eval()
    size, logging_output = _evaluate(trainer, sample, raise_oom)
    if is_asked:
        token_routing = logging_output.pop("moe_token_routing")
        for each, found in zip(routing, tokens, strict=True):
            if found is not None:
                each.add(found, token_routing)
    logging_outputs, group = [logging_output], None
    if trainer.data_parallel_world_size > 1:
        group = trainer.data_parallel_process_group
        logging_outputs, (size,) = trainer._aggregate_logging_outputs(
            logging_outputs, 0 * size if is_dummy else size, ignore=is_dummy
        )
    logged = trainer._reduce_and_log_stats(logging_outputs, size)
    for each in routing:
        each.finish_step(group)
    return logged


def _evaluate(trainer: Any, sample: Any, raise_oom: bool) -> tuple[Any, dict[str, Any]]:
    """The sample size and the logging output of a batch."""
    try:
        with torch.no_grad():
            _, size, logging_output = trainer.task.valid_step(
                sample, trainer.model, trainer.criterion, **trainer.ema_arguments
            )
        return size, logging_output
    except (RuntimeError, MemoryError) as error:
        if not failed_updates.is_out_of_memory(error):
            raise
        trainer._log_oom(error)
        if raise_oom or failed_updates.others_wait(trainer):
            raise failed_updates.out_of_memory(
                trainer, "in validation", failed_updates.SMALLER_VALID_BATCHES
            ) from error
    logger.warning("ran out of memory in validation step, retrying batch")
    for parameter in trainer.model.parameters():
        parameter.grad = None
    if trainer.cuda:
        torch.cuda.empty_cache()
    return _evaluate(trainer, sample, raise_oom=True)


def check_best_metric(trainer: Any, batches_of: Callable[[str], EpochBatchIterating]) -> None:
    """Validate one batch, to have the names of what is logged.

    Args:
        batches_of: gives the batches of a validation subset.
    Raises:
        OptionError: `--best-checkpoint-metric` is not among them.
    """
    metric = trainer.cfg.checkpoint.best_checkpoint_metric
    if metric == "loss" or trainer.cfg.dataset.disable_validation:
        return
    if hasattr(trainer.task, "post_validate"):  # which may add names
        return
    subset = trainer.cfg.dataset.valid_subset.split(",")[0]
    batches = batches_of(subset).next_epoch_itr(shuffle=False, set_dataset_epoch=False)
    with metrics.aggregate(new_root=True) as logged:
        valid_step(trainer, next(batches))
    names = [name for name in logged.get_smoothed_values() if not name.startswith("_")]
    if metric not in names:
        raise OptionError(
            "best_checkpoint_metric", metric, f"validation logs {', '.join(names)}: give one"
        )
