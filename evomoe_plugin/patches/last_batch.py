"""The last batch of a data set, which fairseq drops if its size is no multiple of 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from fairseq.data import data_utils

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrapping


def _batch_by_size(
    upstream: Callable, indices: Any, *args: Any, fixed_shapes: Any = None, **kwargs: Any
) -> list:
    if not isinstance(indices, np.ndarray):
        indices = np.fromiter(indices, dtype=np.int64, count=-1)
    if not len(indices):
        raise OptionError(
            "DATA",
            "with these options",
            "no sample is left: all are longer than the model's positions or --max-tokens; give a "
            "larger --tokens-per-sample or --max-tokens, or another --sample-break-mode",
        )
    batches = upstream(indices, *args, fixed_shapes=fixed_shapes, **kwargs)
    if fixed_shapes is not None:
        return batches
    left = indices[sum(map(len, batches)) :]
    return [*batches, left] if len(left) else batches


PATCH = Patch(
    name="last-batch",
    broken="training, validation and fairseq-validate silently leave out the last batch, so that "
    "perplexity depends on the batch size and differs from fairseq-eval-lm's; where all samples "
    "are too long, an IndexError",
    upstream="fairseq/data/data_utils.py: batch_by_size (fairseq issue 5036)",
    remove_when="fairseq keeps the last batch under --required-batch-size-multiple",
    needed=always("no sample is left out"),
    apply=wrapping(data_utils, batch_by_size=_batch_by_size),
)
