"""`--moe-log-experts`: how the tokens of an update were routed, by layer and expert."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from fairseq.logging import progress_bar
from torch import Tensor

from evomoe_plugin.routing import stats as st

logger = logging.getLogger(__name__)

_PREFIX = "moe_stats_"  # of statistics in a logging output
_PER_TOKEN = {
    "experts_per_token": st.PAIRS,
    "entropy": st.ENTROPY,
    "dropped": st.DROPPED,
    "null": st.NULL_PAIRS,
}


def log_experts(trainer: Any, logging_outputs: Sequence[Mapping[str, Any]]) -> None:
    """Log every N-th update: one line of JSON, and histograms in TensorBoard and W&B.

    Args:
        logging_outputs: of the update that was just finished, on all ranks.
    """
    every = getattr(trainer.cfg.model, "moe_log_experts", 0)
    update = trainer.get_num_updates()
    if not every or update % every or not trainer.is_data_parallel_master:
        return
    totals = {
        name.removeprefix(_PREFIX): sum(
            output[name] for output in logging_outputs if name in output
        )
        for name in {name for output in logging_outputs for name in output}
        if name.startswith(_PREFIX)
    }
    # A key that ends in num_updates makes it a record of metrics.log.
    line: dict[str, Any] = {"experts_num_updates": update}
    for stack in st.STACKS:
        if stack + st.TOKENS not in totals:
            continue
        found = by_layer(
            {
                name.removeprefix(stack): total
                for name, total in totals.items()
                if st.stack_of(name) == stack
            }
        )
        line |= {stack + name: values for name, values in found.items()}
        _draw(stack, found["load"], update)
    if len(line) > 1:
        logger.info(json.dumps(line))


def by_layer(totals: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """What is logged, a list over MoE layers each.

    Args:
        totals: of one stack of layers, name -> [L], and `tokens_per_expert` -> [L, E], padded with
            NaN.
    Returns:
        `load`, for each layer the share of its pairs that each expert has; and, per token,
        `experts_per_token`, `entropy` (nats), and where there are any `dropped` and `null` pairs.
        None: a layer that LayerDrop left out of the update.
    """
    tokens_L = totals[st.TOKENS].tolist()
    loads = [[n for n in row if math.isfinite(n)] for row in totals[st.LOAD_E].tolist()]
    found: dict[str, list[Any]] = {
        "load": [
            [round(n / max(sum(row), 1), 5) for n in row] if tokens else None
            for row, tokens in zip(loads, tokens_L, strict=True)
        ]
    }
    for name, key in _PER_TOKEN.items():
        if key in totals:
            found[name] = [
                round(total / tokens, 5) if tokens else None
                for total, tokens in zip(totals[key].tolist(), tokens_L, strict=True)
            ]
    return found


def _draw(stack: str, loads: Sequence[Sequence[float] | None], update: int) -> None:
    """Histograms over experts, where fairseq logs to TensorBoard or W&B."""
    writer = progress_bar._tensorboard_writers.get("train_inner")
    wandb = sys.modules.get("wandb")
    for layer, load_E in enumerate(loads):
        if load_E is None:
            continue
        name, E = f"{stack}expert_load/layer_{layer}", len(load_E)
        if writer is not None:
            index_E = torch.arange(E)
            share_E = torch.tensor(load_E)
            writer.add_histogram_raw(
                name,
                min=0,
                max=E - 1,
                num=1,
                sum=float((share_E * index_E).sum()),
                sum_squares=float((share_E * index_E**2).sum()),
                bucket_limits=[e + 0.5 for e in range(E)],
                bucket_counts=load_E,
                global_step=update,
            )
        if wandb is not None and getattr(wandb, "run", None) is not None:
            histogram = wandb.Histogram(np_histogram=(load_E, list(range(E + 1))))
            wandb.log({name: histogram}, step=update)
