"""The perplexity of a checkpoint, by fairseq's own evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm

from evomoe_plugin.checkpoint.reading import read_checkpoint
from evomoe_plugin.options import OptionError

# fairseq keeps the logits of a whole batch over the whole vocabulary.
TOKENS_PER_BATCH = 4096


def perplexity(path: str, data: str, subset: str, tokens_per_sample: int | None = None) -> float:
    """What `fairseq-eval-lm` gives.

    Args:
        path: a checkpoint of a language model.
        data: a folder that fairseq trains on.
        subset: which split.
        tokens_per_sample: the context; None: that of the run that wrote the checkpoint.
    Raises:
        OptionError: there is no such split.
    """
    if not list(Path(data).glob(f"{subset}*.idx")):
        raise OptionError("subset", subset, f"{data} has no {subset}.idx")
    cfg = read_checkpoint("path", path)["cfg"]
    length = tokens_per_sample or cfg.task.get("tokens_per_sample") or 512
    arguments = [data, "--task", "language_modeling", "--path", path, "--gen-subset", subset,
                 "--tokens-per-sample", str(length), "--num-workers", "0", "--batch-size",
                 str(max(1, TOKENS_PER_BATCH // length))]
    if cfg.task.get("add_bos_token"):
        arguments.append("--add-bos-token")
    args = options.parse_args_and_arch(options.get_eval_lm_parser(), arguments)
    with _quiet():
        return float(eval_lm.main(convert_namespace_to_omegaconf(args))["perplexity"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without fairseq's own report."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
