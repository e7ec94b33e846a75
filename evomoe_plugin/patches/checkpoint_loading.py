"""Load checkpoints for evaluation: data only, from all of their files, with clear errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from evomoe_plugin.checkpoint.load import load_checkpoint_to_cpu, load_file, misfit
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.patches.patch import Patch, always, wrap


def _file_to_evaluate(
    upstream: Callable, filename: str, suffix: str, shard_idx: int, num_shards: int
) -> str:
    """Prefer the named file to shards beside it, which may be of an earlier save."""
    named = filename.replace(".pt", suffix + ".pt")
    if num_shards == 1 and os.path.exists(named):
        return named
    found = upstream(filename, suffix, shard_idx, num_shards)
    if not PathManager.exists(found):
        raise OptionError("path", filename, "there is no such checkpoint")
    return found


def _load_models(upstream: Callable, filenames: list[str], *args: Any, **kwargs: Any) -> Any:
    try:
        return upstream(filenames, *args, **kwargs)
    except (RuntimeError, LookupError) as error:
        if isinstance(error, RunFailed):
            raise
        raise misfit(", ".join(filenames), error) from error


def _load_ema(path: str) -> dict[str, Any]:
    """The state of a checkpoint, with its moving average of the weights as the model, in fp32."""
    if not os.path.isfile(path):
        raise OptionError("ema_seed_model", path, "there is no such file")
    try:
        with open(path, "rb") as file:
            state = load_file(file, map_location="cpu")
    except OptionError as error:
        raise OptionError("ema_seed_model", path, error.arguments[2]) from error
    average = state.get("extra_state", {}).get("ema")
    if not average:
        raise OptionError(
            "ema_seed_model", path, "has no moving average: give a checkpoint of --store-ema"
        )
    state["model"] = {
        name: value.float() if value.dtype == torch.half else value.clone()
        for name, value in average.items()
    }
    return state


def _check_folder(upstream: Callable, save_dir: str) -> None:
    try:
        upstream(save_dir)
    except OSError as error:
        raise OptionError("save_dir", save_dir, f"cannot be written: {error.strerror}") from error


def apply() -> None:
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu
    wrap(checkpoint_utils, "get_maybe_sharded_checkpoint_filename", _file_to_evaluate)
    wrap(checkpoint_utils, "load_model_ensemble_and_task", _load_models)
    checkpoint_utils.load_ema_from_checkpoint = _load_ema
    wrap(checkpoint_utils, "verify_checkpoint_directory", _check_folder)


PATCH = Patch(
    name="checkpoint-loading",
    broken=f"torch {torch.__version__} refuses checkpoints that hold an argparse.Namespace or a "
    "numpy number; unreadable files, those of another model and folders that cannot be "
    "written end in a traceback; fairseq-eval-lm prefers old shards to the file it is "
    "given, and cannot read shards",
    upstream="fairseq/checkpoint_utils.py",
    remove_when="fairseq lists what its checkpoints hold as safe, and explains such files",
    needed=always("checkpoints are data, whole, and explained"),
    apply=apply,
)
