"""A split of the data without any text."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from fairseq.data import indexed_dataset

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrapping


def _make_dataset(upstream: Callable, path: str, *args: Any, **kwargs: Any) -> Any:
    file = f"{path}.bin"
    if os.path.isfile(file) and os.path.getsize(file) == 0:
        raise OptionError(
            "DATA",
            file,
            "is empty: prepare the data with some text for this split, or name another",
        )
    return upstream(path, *args, **kwargs)


PATCH = Patch(
    name="empty-split",
    broken="an empty split of the data ends in 'cannot mmap an empty file' and an AttributeError "
    "of __del__",
    upstream="fairseq/data/indexed_dataset.py: MMapIndexedDataset",
    remove_when="fairseq names the file",
    needed=always("which file is empty"),
    apply=wrapping(indexed_dataset, make_dataset=_make_dataset),
)
