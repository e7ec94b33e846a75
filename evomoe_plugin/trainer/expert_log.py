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

from evomoe_plugin.layer import MoELayer
from evomoe_plugin.routing import stats as st

logger = logging.getLogger(__name__)

_PER_TOKEN = {
    "experts_per_token": st.PAIRS,
    "entropy": st.ENTROPY,
    "dropped": st.DROPPED,
    "null": st.NULL_PAIRS,
    "experts": st.EXPERTS,
}


def begin_update(trainer: Any) -> None:
    """Let the layers sum up the weights of their experts, if the update that begins is logged."""
    every = _interval(trainer)
    if every:
        is_logged = (trainer.get_num_updates() + 1) % every == 0
        for module in trainer.get_model().modules():
            if isinstance(module, MoELayer):
                module.counts_weights = is_logged


def _interval(trainer: Any) -> int:
    return getattr(trainer.cfg.model, "moe_log_experts", 0)


def log_experts(trainer: Any, logging_outputs: Sequence[Mapping[str, Any]]) -> None:
    """Log every N-th update: one line of JSON, and histograms in TensorBoard and W&B.

    Args:
        logging_outputs: of the update that was just finished, on all ranks.
    """
    every, update = _interval(trainer), trainer.get_num_updates()
    if not every or update % every or not trainer.is_data_parallel_master:
        return
    # A key that ends in num_updates makes it a record of metrics.log.
    line: dict[str, Any] = {"experts_num_updates": update}
    for stack, totals in st.totals(logging_outputs).items():
        found = by_layer(totals)
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
        `load` and `weight`, for each layer the share of its pairs that each expert has, and their
        mean combine weight (None without pairs); per token, `experts_per_token`, `entropy` (nats),
        and where there are any `dropped` and `null` pairs; `experts`, how many can be selected,
        where that are not all. None: a layer that LayerDrop left out of the update.
    """
    tokens_L = totals[st.TOKENS].tolist()
    rows = {name: totals[name].tolist() for name in st.PER_EXPERT if name in totals}
    loads = [[n for n in row if math.isfinite(n)] for row in rows[st.LOAD_E]]
    found: dict[str, list[Any]] = {
        "load": [
            [round(n / max(sum(row), 1), 5) for n in row] if tokens else None
            for row, tokens in zip(loads, tokens_L, strict=True)
        ]
    }
    if st.WEIGHT_E in rows:
        found["weight"] = [
            [round(w / n, 5) if n else None for w, n in zip(weights, row, strict=False)]
            if tokens
            else None
            for weights, row, tokens in zip(rows[st.WEIGHT_E], loads, tokens_L, strict=True)
        ]
    per_token = {
        name: [
            round(total / tokens, 5) if tokens else None
            for total, tokens in zip(totals[key].tolist(), tokens_L, strict=True)
        ]
        for name, key in _PER_TOKEN.items()
        if key in totals
    }
    if all(n in (None, len(row)) for n, row in zip(per_token["experts"], loads, strict=True)):
        del per_token["experts"]
    return found | per_token


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
