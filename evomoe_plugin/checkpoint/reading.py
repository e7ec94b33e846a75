"""Reading a checkpoint of fairseq that a user named: data only, or one line that says why not."""

from __future__ import annotations

import os
from typing import Any

import torch
from fairseq import checkpoint_utils
from omegaconf import DictConfig

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.config.errors import OptionError


def read_checkpoint(option: str, path: str) -> dict[str, Any]:
    """What `checkpoint_utils.load_checkpoint_to_cpu` makes of a file, which may be of any age.

    Nothing in the file is run: `patches.checkpoint_reading` lets fairseq read tensors, plain
    containers and its own configurations (`weights_only=True`), and refuses the rest.

    Args:
        option: what the user named the file with, for messages.
        path: the file; of `--use-sharded-state`, the common name of the files of all ranks, or
            that of any rank.
    Returns:
        fairseq's state: `cfg` a configuration, `model` tensors by name.
    Raises:
        OptionError: no such file, cut short, not fairseq's, or with objects in it that are not
            data; of fsdp_shards, that one is missing or of another update.
    """
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(existing_file(option, path))
    except OptionError as error:
        raise OptionError(option, path, error.arguments[2]) from error
    except OSError as error:  # torch seeks to before the beginning of some
        raise OptionError(option, path, "cannot be read, it is cut short or no checkpoint "
                                        f"({error})") from error
    except Exception as error:  # what upgrading finds wrong is of any kind
        raise OptionError(option, path, "is no checkpoint of fairseq "
                                        f"({_first_line(error)})") from error
    cfg, weights = state.get("cfg"), state["model"]
    if not isinstance(cfg, DictConfig) or not isinstance(cfg.get("model"), DictConfig):
        raise OptionError(option, path, "is no checkpoint of fairseq: it does not say which model "
                                        "its weights are of (it has no options in cfg.model)")
    if not isinstance(weights, dict) or not all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in weights.items()):
        raise OptionError(option, path, "is no checkpoint of fairseq: its 'model' is not tensors "
                                        "by name")
    return state


def existing_file(option: str, path: str) -> str:
    """`path`, or the file of rank 0 where it is the common name of `--use-sharded-state`.

    Raises:
        OptionError: there is neither.
    """
    for file in (path, fsdp_shards.shard_path(path, 0)):
        if os.path.isfile(file):
            return file
    raise OptionError(option, path, "there is no such file")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]
