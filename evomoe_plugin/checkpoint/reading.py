"""Read a fairseq checkpoint that a user named: data only, with one-line errors."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

from fairseq import checkpoint_utils
from omegaconf import DictConfig, OmegaConf

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.checkpoint.load import read_state
from evomoe_plugin.config.errors import OptionError


def read_checkpoint(
    option: str, path: str, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read a checkpoint of any fairseq version with `checkpoint_utils.load_checkpoint_to_cpu`.

    Nothing in the file is executed: `checkpoint.load` restricts fairseq to tensors,
    plain containers and its own configurations (`weights_only=True`).

    Args:
        option: the option that named the file, for messages.
        path: the file; of `--use-sharded-state`, the common name of all ranks' files, or any
            rank's.
        overrides: options to set in the stored configuration; with `moe_expert_parallel_size`, each
            rank reads its own experts (`checkpoint.load.load_checkpoint_to_cpu`).
    Returns:
        fairseq's state: `cfg` a configuration, `model` tensors by name.
    Raises:
        OptionError: missing, truncated, not fairseq's, or with objects that are not data; of
            sharded state, that one file is missing or of another update.
    """
    with _faults_of(option, path):
        state = checkpoint_utils.load_checkpoint_to_cpu(existing_file(option, path), overrides)
    cfg = state.get("cfg")
    if isinstance(cfg, DictConfig) and isinstance(cfg.get("model"), argparse.Namespace):
        # Of fairseq's models without a dataclass, such as roberta and transformer.
        cfg.model = OmegaConf.create(vars(cfg.model), flags={"allow_objects": True})
    if not isinstance(cfg, DictConfig) or not isinstance(cfg.get("model"), DictConfig):
        raise OptionError(
            option,
            path,
            "is no checkpoint of fairseq: it does not say which model "
            "its weights are of (it has no options in cfg.model)",
        )
    return state


def read_task(option: str, path: str) -> str:
    """The registered name of the task that a checkpoint was trained with; reads no weights.

    Args:
        option, path: as `read_checkpoint`.
    Raises:
        OptionError: as `read_checkpoint`.
    """
    with _faults_of(option, path):
        state = read_state(existing_file(option, path), mapped=True)
        name = ((state.get("cfg") or {}).get("task") or {}).get("_name")
    if not isinstance(name, str):
        raise OptionError(option, path, "does not say which task it was trained with: give --task")
    return name


@contextlib.contextmanager
def _faults_of(option: str, path: str) -> Iterator[None]:
    """Inside, whatever is wrong with a file is told of the option that named it."""
    try:
        yield
    except OptionError as error:
        # Not of the file, but of the options given with it.
        own = error.arguments[0] not in ("checkpoint", option)
        raise error if own else OptionError(option, path, error.arguments[2]) from error
    except OSError as error:  # torch seeks before the start of some truncated files
        raise OptionError(
            option, path, f"cannot be read, it is cut short or no checkpoint ({error})"
        ) from error
    except Exception as error:  # upgrading an invalid state raises anything
        raise OptionError(
            option, path, f"is no checkpoint of fairseq ({describe(error)})"
        ) from error


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
    fault = "is no file" if os.path.exists(path) else "there is no such file"
    raise OptionError(option, path, fault)
