"""Rows of JSON arrays and of Arrow data that `datasets` saved."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

STATE, INFO = "state.json", "dataset_info.json"
MAX_ROW_CHARS = 1 << 28
_SPACES = re.compile(r"[ \t\r\n]*")


class BadRow(ValueError):
    """Says what is wrong with the next row, or with the file."""


def json_values(blocks: Iterable[str]) -> Iterator[Any]:
    """The elements of a JSON array, or JSON values that follow one another.

    Memory is bounded by the longest value and block.

    Raises:
        BadRow: the text is no JSON.
    """
    text = _Text(blocks)
    in_array = text.next() == "["
    text.at += in_array
    character = text.next()
    if in_array and character == "]":
        text.at += 1
        in_array, character = False, text.next()
    while character:
        yield text.value()
        character = text.next()
        if in_array:
            text.at += 1
            if character == "]":
                in_array = False
                if text.next():
                    raise BadRow("is not JSON: text follows the array")
            elif character and character != ",":
                raise BadRow(f"is not JSON: {character!r} where , or ] must be")
            character = text.next()
    if in_array:
        raise BadRow("is not JSON: the array has no end")


class _Text:
    """Text that is read block by block; `at` is the next character's index in what was read."""

    def __init__(self, blocks: Iterable[str]):
        self._blocks, self._decode = iter(blocks), json.JSONDecoder().raw_decode
        self._read, self.at = "", 0

    def _more(self, least: int) -> bool:
        """Read `least` characters; False if none are left."""
        parts, self.at = [self._read[self.at :]], 0
        while least > 0 and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            least -= len(block)
        self._read = "".join(parts)
        return len(self._read) > len(parts[0])

    def next(self) -> str:
        """The next character that is no whitespace, which stays; "" at the end."""
        while True:
            self.at = _SPACES.match(self._read, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self._read) or not self._more(1):
                return self._read[self.at : self.at + 1]

    def value(self) -> Any:
        """The JSON value that starts here."""
        while True:
            try:
                value, self.at = self._decode(self._read, self.at)
                return value
            except RecursionError:
                raise BadRow("is nested too deeply") from None
            except json.JSONDecodeError as error:
                # Twice as much at each try: together they cost as much as the last.
                size = len(self._read) - self.at
                if size > MAX_ROW_CHARS or not self._more(max(size, 1)):
                    raise BadRow(f"is not JSON: {error.msg}") from None


def saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a data set saved with `datasets.Dataset.save_to_disk`, in order.

    Raises:
        BadRow: it has no state.json or a damaged one, or a file is missing.
    """
    if not (folder / STATE).is_file():
        raise BadRow("is no folder that datasets saved: it has no state.json")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        paths = [folder / Path(name).name for name in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRow(f"its {STATE} does not list data files, as datasets writes it") from None
    if state.get("_indices_data_files"):
        raise BadRow("was saved with an index: load it with datasets and save it again")
    for path in paths:
        if not path.is_file():
            raise BadRow(f"has no {path.name}, which its {STATE} names")
    return paths


def is_saved(folder: Path) -> bool:
    """Whether `datasets` saved a data set to this folder."""
    return all((folder / name).is_file() for name in (STATE, INFO))


def arrow_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow IPC stream, mapped from the disk.

    Raises:
        BadRow: it is damaged.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                batch.validate(full=True)
                yield batch
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise BadRow(f"cannot be read as an Arrow stream: {reason}") from None


def batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch, without fields that are null.

    Raises:
        BadRow: two columns have the same name.
    """
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise BadRow(f"two of its columns have the same name ({', '.join(names)})")
    for row in batch.to_pylist():
        yield {name: value for name, value in row.items() if value is not None}
