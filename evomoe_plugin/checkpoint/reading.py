"""Read a fairseq checkpoint that a user named: data only, with one-line errors."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from fairseq import checkpoint_utils
from omegaconf import DictConfig, OmegaConf

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.config.errors import OptionError


def read_checkpoint(option: str, path: str) -> dict[str, Any]:
    """Read a checkpoint of any fairseq version with `checkpoint_utils.load_checkpoint_to_cpu`.

    Nothing in the file is executed: `checkpoint.load` restricts fairseq to tensors,
    plain containers and its own configurations (`weights_only=True`).

    Args:
        option: the option that named the file, for messages.
        path: the file; of `--use-sharded-state`, the common name of all ranks' files, or any
            rank's.
    Returns:
        fairseq's state: `cfg` a configuration, `model` tensors by name.
    Raises:
        OptionError: missing, truncated, not fairseq's, or with objects that are not data; of
            sharded state, that one file is missing or of another update.
    """
    try:
        state = checkpoint_utils.load_checkpoint_to_cpu(existing_file(option, path))
    except OptionError as error:
        raise OptionError(option, path, error.arguments[2]) from error
    except OSError as error:  # torch seeks before the start of some truncated files
        raise OptionError(
            option, path, f"cannot be read, it is cut short or no checkpoint ({error})"
        ) from error
    except Exception as error:  # upgrading an invalid state raises anything
        raise OptionError(
            option, path, f"is no checkpoint of fairseq ({describe(error)})"
        ) from error
    cfg, weights = state.get("cfg"), state["model"]
    if not isinstance(cfg, DictConfig) or not isinstance(cfg.get("model"), DictConfig):
        raise OptionError(
            option,
            path,
            "is no checkpoint of fairseq: it does not say which model "
            "its weights are of (it has no options in cfg.model)",
        )
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in weights.items()
    ):
        raise OptionError(
            option, path, "is no checkpoint of fairseq: its 'model' is not tensors by name"
        )
    return state


def plain_config(cfg: DictConfig) -> dict[str, Any]:
    """A configuration as a plain dictionary, interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))


def existing_file(option: str, path: str) -> str:
    """`path`, or the file of rank 0 where it is the common name of `--use-sharded-state`.

    Raises:
        OptionError: there is neither.
    """
    for file in (path, fsdp_shards.shard_path(path, 0)):
        if os.path.isfile(file):
            return file
    raise OptionError(option, path, "there is no such file")
