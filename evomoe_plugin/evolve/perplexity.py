"""Evaluate a checkpoint's perplexity by fairseq-eval-lm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fairseq import options
from fairseq.data.data_utils import load_indexed_dataset
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.transformer_lm import DEFAULT_MAX_TARGET_POSITIONS
from fairseq_cli import eval_lm

from evomoe_plugin.checkpoint.build_model import describe, report_config_faults
from evomoe_plugin.checkpoint.reading import read_checkpoint
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.evaluation.eval_lm import install_in
from evomoe_plugin.evolve.encoder_perplexity import CRITERIONS, encoder_perplexity

# fairseq materialises the logits of a whole batch.
TOKENS_PER_BATCH = 4096


def perplexity(path: str, data: str, subset: str, tokens_per_sample: int | None = None) -> float:
    """The perplexity that `fairseq-eval-lm` reports; for RoBERTa and translation,
    `encoder_perplexity`.

    Args:
        path: a checkpoint.
        data: a folder that fairseq trains on.
        subset: which split.
        tokens_per_sample: the context; None: that of the run that wrote the checkpoint.
    Raises:
        OptionError: the split is missing, empty or unreadable, or rows of this length exceed the
            model's positions and would be left out.
    """
    state = read_checkpoint("path", path)
    task = state["cfg"].get("task") or {}
    if task.get("_name") in CRITERIONS:
        if tokens_per_sample is not None and task["_name"] == "translation":
            raise OptionError(
                "tokens_per_sample", tokens_per_sample, "sentences have their own: leave it out"
            )
        given = {} if tokens_per_sample is None else {"tokens_per_sample": tokens_per_sample}
        return encoder_perplexity(path, data, subset, **given)
    check_split(data, subset)
    saved = task.get("tokens_per_sample") or 512
    length = saved if tokens_per_sample is None else tokens_per_sample
    with_bos = bool(task.get("add_bos_token"))
    with report_config_faults("path", path):
        most = _positions(state) - with_bos
    if not 1 <= length <= most:
        raise OptionError(
            "tokens_per_sample",
            length,
            f"{path} has positions for {most} tokens, longer rows would be left out "
            f"of the evaluation: give 1 to {most}",
        )
    rows = max(1, TOKENS_PER_BATCH // length)
    numbers = f"--tokens-per-sample {length} --batch-size {rows} --num-workers 0".split()
    arguments = [data, "--task", "language_modeling", "--path", path, "--gen-subset", subset]
    arguments += [*numbers, "--add-bos-token"] if with_bos else numbers
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), arguments)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # fairseq's own report
    install_in(eval_lm.main)
    try:
        with report_config_faults("path", path):
            return float(eval_lm.main(convert_namespace_to_omegaconf(args))["perplexity"])
    finally:
        logging.disable(before)


def _positions(state: dict[str, Any]) -> int:
    """The longest sequence that the model takes."""
    model = state["cfg"].model
    learned = state["model"].get("decoder.embed_positions.weight")
    if learned is not None:
        return learned.size(0) - 2  # fairseq adds two rows for the padding index and its offset
    # As fairseq resolves it.
    return (
        getattr(model, "max_target_positions", None)
        or getattr(model, "tokens_per_sample", None)
        or DEFAULT_MAX_TARGET_POSITIONS
    )


def check_split(data: str, subset: str) -> None:
    """Raise `OptionError` unless fairseq can read the split, to its last token."""
    if not list(Path(data).glob(f"{subset}*.idx")):
        raise OptionError("subset", subset, f"{data} has no {subset}.idx")
    path = Path(data) / subset
    try:
        split = load_indexed_dataset(str(path), None)
        tokens = int(split.sizes.sum())
        split[len(split) - 1]  # fails in a truncated file
    except Exception as error:  # fairseq unpacks, asserts and maps whatever is there
        raise OptionError(
            "subset",
            subset,
            f"{path}.idx and {path}.bin hold nothing, are cut short or no data of "
            f"fairseq ({describe(error)}): make them anew",
        ) from error
    if not tokens:
        raise OptionError("subset", subset, f"{path}.bin holds no token")
