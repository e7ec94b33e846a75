"""Checks of commands that evaluate a checkpoint, before any rank is started."""

from __future__ import annotations

from typing import Any

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.values import parse_model_overrides


def model_overrides(cfg: Any) -> dict[str, Any]:
    """Options of the checkpoint's model that an evaluating command sets.

    Raises:
        OptionError: `--model-overrides` is no dictionary.
    """
    overrides = parse_model_overrides(cfg.common_eval.model_overrides)
    if cfg.eval_lm.moe_expert_parallel_size != 1:
        overrides["moe_expert_parallel_size"] = cfg.eval_lm.moe_expert_parallel_size
    return overrides


def check_evaluation(cfg: Any, num_ranks: int) -> None:
    """Check a command that reads a model from a checkpoint.

    Args:
        cfg: fairseq's configuration.
        num_ranks: of the run, on all machines.
    Raises:
        OptionError: invalid combinations of options.
    """
    if cfg.common_eval.path is None:
        raise OptionError("path", "(not given)", "give the checkpoint to evaluate")
    size = model_overrides(cfg).get("moe_expert_parallel_size", 1)
    if not isinstance(size, int) or size < 1:
        raise OptionError("moe_expert_parallel_size", size, "give 1 or more")
    check_ranks_of_experts(size, num_ranks)
    window, length = cfg.eval_lm.context_window, getattr(cfg.task, "tokens_per_sample", None)
    if window < 0 or (length is not None and window >= length):
        raise OptionError(
            "context_window",
            window,
            f"is a part of --tokens-per-sample ({length}): give less than that, or 0 for none",
        )
    share, shares = cfg.dataset.shard_id, cfg.dataset.num_shards
    if not 0 <= share < shares:
        raise OptionError("shard_id", share, f"give 0 to {shares - 1}, less than --num-shards")
    if num_ranks == 1:
        return
    if shares > 1:
        raise OptionError(
            "num_shards", shares, f"the {num_ranks} ranks share the data already: leave it out"
        )
    for option in ("output_word_probs", "output_word_stats"):
        if getattr(cfg.eval_lm, option):
            raise OptionError(
                option,
                f"with {num_ranks} ranks",
                "each has a share of the words: start one process",
            )


def check_ranks_of_experts(size: int, num_ranks: int) -> None:
    """Raise `OptionError` unless the ranks can be divided into groups of `size`."""
    if num_ranks % size:
        raise OptionError(
            "moe_expert_parallel_size",
            size,
            f"does not divide the {num_ranks} ranks of --distributed-world-size",
        )
