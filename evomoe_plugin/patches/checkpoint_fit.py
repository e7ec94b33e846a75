"""A checkpoint that does not fit the model, said in one line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fairseq import checkpoint_utils
from fairseq.trainer import Trainer

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrap


def _misfit(filename: str, error: BaseException) -> OptionError:
    """From torch's "Error(s) in loading state_dict" with one line a fault."""
    faults = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    first = (faults or [str(error)])[0][:300]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    remedy = "give the architecture and options it was trained with"
    if "size mismatch" in first and "embed_tokens" in first:
        remedy = "give the data, and so the dictionary, that it was trained with"
    return OptionError("checkpoint", filename, f"does not fit the model: {first}{more}; {remedy}")


def _load_checkpoint(
    upstream: Callable, trainer: Trainer, filename: str, *args: Any, **kwargs: Any
) -> Any:
    try:
        return upstream(trainer, filename, *args, **kwargs)
    except AssertionError as error:
        if "--reset-optimizer" in str(error):
            raise OptionError("checkpoint", filename, str(error)) from error
        raise
    except Exception as error:
        cause = error.__context__
        if "Cannot load model parameters" in str(error) and cause is not None:
            if isinstance(cause, OptionError):
                raise cause from error
            raise _misfit(filename, cause) from error
        raise


def _load_model_ensemble_and_task(
    upstream: Callable, filenames: list[str], *args: Any, **kwargs: Any
) -> Any:
    try:
        return upstream(filenames, *args, **kwargs)
    except RuntimeError as error:
        if "loading state_dict" in str(error):
            raise _misfit(", ".join(filenames), error) from error
        raise


@functools.cache
def apply() -> None:
    wrap(Trainer, "load_checkpoint", _load_checkpoint)
    wrap(checkpoint_utils, "load_model_ensemble_and_task", _load_model_ensemble_and_task)


PATCH = Patch(
    name="checkpoint-fit",
    broken="a checkpoint of another model or dictionary ends in two tracebacks",
    upstream="fairseq/trainer.py: load_checkpoint; fairseq/checkpoint_utils.py",
    remove_when="fairseq explains it",
    needed=always("says what does not fit"),
    apply=apply,
)
