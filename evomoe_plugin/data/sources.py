"""Find the input files, in a fixed order."""

from __future__ import annotations

import fnmatch
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomoe_plugin.checkpoint.atomic_files import sha256
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.card import CARD
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.rows import BadRow, is_saved, saved_files

SUFFIXES = (".jsonl", ".parquet", ".txt")
# Folders have many other files of these kinds. They are read if they are named themselves; Arrow
# files also if they are part of a data set that `datasets` saved.
NAMED_SUFFIXES = (".arrow", ".json")
ROW_SUFFIXES = (".arrow", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `name` is its name in the data card, starting with that of the INPUT."""

    path: Path
    name: str
    bytes: int
    split: str | None  # of the whole file; None: each document by its hash
    as_text: bool = False  # though the suffix may be one of rows

    @property
    def is_text(self) -> bool:
        return self.as_text or self.path.suffix not in ROW_SUFFIXES


def find_sources(options: PrepareOptions) -> list[SourceFile]:
    """The files of all inputs: in the given order, each folder sorted by path, without duplicates.

    Files of `--valid` and `--test` are excluded from the INPUTs. Hidden folders and folders written
    by `prepare` are skipped; of data sets saved by `datasets` the listed files are read.

    Raises:
        OptionError: an input is missing, has an unknown format, or contains no file to read.
    """
    held_out: dict[Path, SourceFile] = {}
    for split in ("valid", "test"):
        for source in _find(getattr(options, split), split, options):
            if held_out.setdefault(source.path.resolve(), source).split != split:
                raise OptionError("test", source.path, "the same file is given to --valid")
    found: dict[Path, SourceFile] = {}
    for source in _find(options.inputs, None, options):
        if source.path.resolve() not in held_out:
            found.setdefault(source.path.resolve(), source)
    if not found:
        fault = "all its files are given to --valid or --test; none is left for training"
        raise OptionError("INPUT", " ".join(options.inputs), fault)
    return [*found.values(), *held_out.values()]


def inputs_difference(
    recorded: list[dict[str, Any]], not_read: int, sources: Sequence[SourceFile]
) -> str | None:
    """Describe the first difference between the files and the recorded ones."""
    read = 0
    for source in sources:
        entry = recorded[read] if read < len(recorded) else None
        if entry is None or (entry["split"], entry["name"]) != (source.split, source.name):
            continue
        if entry["bytes"] != source.bytes or entry["sha256"] != sha256(source.path):
            return f"{source.name} has changed"
        read += 1
    if read < len(recorded):
        return f"{recorded[read]['name']} is missing or has moved"
    if len(sources) != len(recorded) + not_read:
        return f"there were {len(recorded) + not_read} files, now there are {len(sources)}"
    return None


def _find(
    inputs: Iterable[str], split: str | None, options: PrepareOptions
) -> Iterator[SourceFile]:
    name = split or "INPUT"
    suffixes = {*SUFFIXES, *options.text_suffix}
    for given in inputs:
        root = Path(given)
        if not root.is_file() and not root.is_dir():
            raise OptionError(name, given, "no such file or folder")
        files = [Path()] if root.is_file() else list(_walk(root, options.exclude))
        label = Path(os.path.abspath(root))
        known = suffixes if root.is_dir() else suffixes | set(NAMED_SUFFIXES)
        saved = set(_saved([root / f for f in files], name))
        chosen = [f for f in files if (root / f).suffix in known or root / f in saved]
        if not chosen:
            raise OptionError(name, given, _unknown([(root / f).suffix for f in files], known))
        for file in sorted(chosen, key=Path.as_posix):
            relative = (label / file).relative_to(label.parent).as_posix()
            printable = os.fsencode(relative).decode("utf-8", "backslashreplace")
            path = root / file
            as_text = path.suffix in options.text_suffix and path.suffix not in SUFFIXES
            yield SourceFile(path, printable, path.stat().st_size, split, as_text)


def _saved(files: list[Path], name: str) -> Iterator[Path]:
    """Those that are part of saved data sets; other Arrow files next to them are a cache."""
    for folder in sorted({path.parent for path in files if path.suffix == ".arrow"}):
        if is_saved(folder):
            try:
                yield from saved_files(folder)
            except BadRow as error:
                raise OptionError(name, folder, str(error)) from None


def _walk(root: Path, exclude: tuple[str, ...]) -> Iterator[Path]:
    """The files under `root`, relative to it."""
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        folders[:] = (
            name
            for name in folders
            if _wanted(here / name, exclude) and not Path(folder, name, CARD).exists()
        )
        yield from (
            here / name
            for name in files
            if _wanted(here / name, exclude) and Path(folder, name).is_file()
        )


def _wanted(path: Path, exclude: tuple[str, ...]) -> bool:
    names = path.name, path.as_posix()
    return not path.name.startswith(".") and not any(
        fnmatch.filter(names, pattern) for pattern in exclude
    )


def _unknown(found: list[str], suffixes: Iterable[str]) -> str:
    known, counts = ", ".join(sorted(suffixes)), Counter(found)
    if not found:
        return f"contains no files; supported are {known}"
    common = counts.most_common(5)
    listed = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in common)
    remedy = next(
        (f"; --text-suffix {suffix} reads them as plain text" for suffix, _ in common if suffix), ""
    )
    return f"contains {listed}; supported are {known}{remedy}"
