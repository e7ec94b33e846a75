"""Check `--model-overrides`, of which fairseq leaves out what it does not know."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fairseq import utils
from omegaconf import DictConfig, OmegaConf

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.checkpoint.load import load_file
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.values import parse_model_overrides


def check_model_overrides(text: str, paths: str | None) -> None:
    """Raise `OptionError` for an override that is no option of a checkpoint.

    Args:
        text: the value of `--model-overrides`.
        paths: of `--path`. Files that are missing or remote are not looked at.
    """
    overrides = parse_model_overrides(text)
    for path in utils.split_paths(paths or "") if overrides else ():
        file = path if os.path.isfile(path) else fsdp_shards.shard_path(path, 0)
        if not os.path.isfile(file):
            continue
        with open(file, "rb") as opened:
            state = load_file(opened, map_location="cpu", mapped=True, tensors=False)
        known = {*_names(state.get("cfg")), *_names(state.get("args"))}
        for name in overrides:
            if name not in known:
                similar = difflib.get_close_matches(str(name), known, 1)
                hint = f"; did you mean {similar[0]}?" if similar else ""
                raise OptionError("model_overrides", name, f"{path} has no such option{hint}")


def _names(options: Any) -> Iterator[str]:
    """Names of options and of their groups."""
    if isinstance(options, argparse.Namespace):
        options = vars(options)
    if isinstance(options, (Mapping, DictConfig)):
        for name in options:
            yield str(name)
            if not (isinstance(options, DictConfig) and OmegaConf.is_missing(options, name)):
                yield from _names(options[name])
