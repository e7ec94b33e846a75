"""A split of the data that is missing, or has no text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fairseq import utils
from fairseq.data import data_utils, indexed_dataset
from fairseq.tasks.language_modeling import LanguageModelingTask

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrap


def _make_dataset(upstream: Callable, path: str, *args: Any, **kwargs: Any) -> Any:
    file = f"{path}.bin"
    if os.path.isfile(file) and os.path.getsize(file) == 0:
        raise OptionError(
            "DATA",
            file,
            "is empty: prepare the data with some text for this split, or name another",
        )
    return upstream(path, *args, **kwargs)


def _load_dataset(
    upstream: Callable, task: LanguageModelingTask, split: str, *args: Any, **kwargs: Any
) -> Any:
    try:
        return upstream(task, split, *args, **kwargs)
    except FileNotFoundError as error:
        folders = utils.split_paths(task.args.data)
        found = sorted({p.stem for folder in folders for p in Path(folder).glob("*.idx")})
        raise OptionError(
            "DATA",
            task.args.data,
            f"has no split {split!r}, but {', '.join(found) or 'none'}: name one of them by "
            "--train-subset, --valid-subset or --gen-subset",
        ) from error


def _raise_if_ignored(upstream: Callable, cfg: Any) -> None:
    try:
        upstream(cfg)
    except ValueError as error:
        raise OptionError("valid_subset", cfg.dataset.valid_subset, str(error)) from error


def apply() -> None:
    wrap(indexed_dataset, "make_dataset", _make_dataset)
    wrap(LanguageModelingTask, "load_dataset", _load_dataset)
    wrap(data_utils, "raise_if_valid_subsets_unintentionally_ignored", _raise_if_ignored)


PATCH = Patch(
    name="empty-split",
    broken="an empty split of the data ends in 'cannot mmap an empty file' and an AttributeError "
    "of __del__; a missing one, and one of valid, valid1, … that is not named, in a traceback",
    upstream="fairseq/data/indexed_dataset.py: MMapIndexedDataset; "
    "fairseq/tasks/language_modeling.py: load_dataset; fairseq/data/data_utils.py",
    remove_when="fairseq names the file, and the splits that there are",
    needed=always("which split is meant"),
    apply=apply,
)
