"""Files of fine-tuning records: JSON lines, JSON arrays, and folders that `datasets` saved."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.readers import text_blocks
from evomoe_plugin.data.rows import BadRow, arrow_batches, batch_rows, json_values, saved_files
from evomoe_plugin.data.turns import FORMATS

SUFFIXES = (".jsonl", ".json", "")  # the last is a folder


def file_of_split(folder: Path, split: str) -> Path:
    """SPLIT.jsonl, SPLIT.json, or the folder SPLIT.

    Raises:
        OptionError: there is none, or more than one.
    """
    found = [path for suffix in SUFFIXES if (path := folder / f"{split}{suffix}").exists()]
    if not found:
        fault = (
            f"has no {split}.jsonl, {split}.json or folder {split} of datasets: each name in "
            "--train-subset, --valid-subset and --gen-subset needs one"
        )
        raise OptionError("DATA", folder, fault)
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise OptionError("DATA", folder, f"has {names}, which are the same split: remove one")
    return found[0]


def bad_record(place: str, wrong: Any) -> OptionError:
    """The error for a record, which `place` names."""
    return OptionError("DATA", place, f"{wrong}; {FORMATS}")


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file, with the name of the place of each.

    Raises:
        OptionError: it is damaged or empty.
    """
    records, place = _lines(path), "line"
    if path.is_dir():
        records, place = _saved_rows(path), "row"
    elif path.suffix == ".json":
        records, place = json_values(text_blocks(path, "DATA")), "record"
    for number in itertools.count(1):
        where = f"{path}, {place} {number}"
        try:
            record = next(records, records)
        except BadRow as error:
            raise bad_record(where, error) from None
        if record is records:
            break
        yield where, record
    if number == 1:
        raise bad_record(str(path), "is empty")


def _lines(path: Path) -> Iterator[Any]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                raise BadRow("is empty")
            try:
                yield json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise BadRow(f"is not UTF-8 (byte {error.start + 1})") from None
            except ValueError as error:
                raise BadRow(f"is not JSON ({error})") from None
            except RecursionError:
                raise BadRow("is nested too deeply") from None


def _saved_rows(folder: Path) -> Iterator[Any]:
    for path in saved_files(folder):
        for batch in arrow_batches(path):
            yield from batch_rows(batch)
