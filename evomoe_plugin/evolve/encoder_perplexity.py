"""Evaluate the perplexity of a masked language model or a translation model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from omegaconf import OmegaConf

from evomoe_plugin.checkpoint.build_model import report_config_faults
from evomoe_plugin.config.errors import OptionError

# Without gate losses and smoothing; for dense models too.
CRITERIONS = {"masked_lm": "masked_lm_gumbel", "translation": "cross_entropy_gumbel"}
_RUN = {"sentence_avg": False, "tpu": False}  # which a criterion takes from other groups
_TOKENS_PER_BATCH = 4096


def encoder_perplexity(path: str, data: str, subset: str, **overrides: Any) -> float:
    """The perplexity that `fairseq-validate` reports, of all sentences that the model has positions
    for.

    Args:
        path: a checkpoint.
        data: a folder that fairseq trains on.
        subset: which split. Masked tokens are those of the checkpoint's seed.
        overrides: options of the task.
    Raises:
        OptionError: the split is missing or empty.
    """
    if not list(Path(data).glob(f"{subset}.*idx")):
        raise OptionError("subset", subset, f"{data} has no {subset}.idx")
    with report_config_faults("path", path):
        (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task(
            [path], arg_overrides={"data": data, **overrides}
        )
    name = CRITERIONS[cfg.task._name]
    known = {key: value for key, value in _RUN.items() if key in _fields(name)}
    criterion = task.build_criterion(OmegaConf.create({"_name": name, **known})).eval()
    task.load_dataset(subset)
    batches = task.get_batch_iterator(
        task.dataset(subset),
        max_tokens=_TOKENS_PER_BATCH,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=True,
    ).next_epoch_itr(shuffle=False)
    model.eval()
    loss = size = 0.0
    with torch.no_grad():
        for sample in batches:
            *_, logged = criterion(model, sample)
            loss += float(logged["inner_loss"])
            size += float(logged["sample_size"])
    if not size:
        raise OptionError("subset", subset, f"{data}/{subset} holds no token to predict")
    return math.exp(loss / size)


def _fields(criterion: str) -> Any:
    from fairseq.criterions import CRITERION_DATACLASS_REGISTRY

    return CRITERION_DATACLASS_REGISTRY[criterion].__dataclass_fields__
