"""Readers for each format: stream a file as fragments of records, in bounded memory.

A record is the whole file or a line of plain text, or a row of JSON lines or Parquet. Plain text
records longer than a block are split into several fragments.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.sources import SourceFile

BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 28
BATCH_ROWS = 128
_REPLACE = "convert the file, --exclude it, or pass --encoding-errors replace"
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")

# Called with the number of bytes that a reader has processed.
Advance = Callable[[int], None]


class Fragment(NamedTuple):
    text: str
    ends_record: bool


def read_records(
    source: SourceFile, *, lines: bool, text_field: str, errors: str, advance: Advance
) -> Iterator[Fragment]:
    """The records of a file: each line of plain text if `lines`, otherwise the whole file.

    Raises OptionError with the position of unreadable data.
    """
    if source.path.suffix == ".parquet":
        return _parquet_rows(source.path, text_field, errors, advance)
    if source.path.suffix == ".jsonl":
        return _jsonl_rows(source.path, text_field, errors, advance)
    blocks = _text_blocks(source.path, errors, advance)
    if lines:
        return _lines(blocks)
    return itertools.chain((Fragment(block, False) for block in blocks), [Fragment("", True)])


def _text_blocks(path: Path, errors: str, advance: Advance) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    read = 0
    with open(path, "rb") as stream:
        for block in itertools.chain(iter(lambda: stream.read(BLOCK_BYTES), b""), [b""]):
            read += len(block)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _undecodable(path, read - len(error.object) + error.start, error) from None
            advance(len(block))


def _lines(blocks: Iterator[str]) -> Iterator[Fragment]:
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    rest, cut = "", False
    for block in blocks:
        *ended, rest = (rest + newlines.decode(block)).split("\n")
        for line in ended:
            yield Fragment(line, True)
            cut = False
        if len(rest) > BLOCK_BYTES:
            yield Fragment(rest, False)
            rest, cut = "", True
    rest += newlines.decode("", final=True).rstrip("\n")
    if rest or cut:
        yield Fragment(rest, True)


def _jsonl_rows(path: Path, text_field: str, errors: str, advance: Advance) -> Iterator[Fragment]:
    offset = 0
    with open(path, "rb") as stream:
        lines = iter(lambda: stream.readline(MAX_ROW_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_ROW_BYTES:
                fault = f"line {number} is longer than {MAX_ROW_BYTES >> 20} MiB"
                raise OptionError("INPUT", path, f"{fault}; JSON lines has one row per line")
            try:
                row = line.decode("utf-8-sig" if number == 1 else "utf-8", errors)
            except UnicodeDecodeError as error:
                start = offset + len(line) - len(error.object) + error.start
                raise _undecodable(path, start, error) from None
            offset += len(line)
            advance(len(line))
            if row.strip():
                yield Fragment(_field_of(row, text_field, errors, path, number), True)


def _field_of(row: str, text_field: str, errors: str, path: Path, number: int) -> str:
    try:
        fields = json.loads(row)
    except (ValueError, RecursionError) as error:
        raise OptionError("INPUT", path, f"line {number} is not JSON: {error}") from None
    if not isinstance(fields, dict) or text_field not in fields:
        has = f"its fields are {', '.join(fields)}" if isinstance(fields, dict) else "it has none"
        fault = f"no such field in line {number} of {path}; {has}"
        raise OptionError("text_field", text_field, fault)
    text = "" if fields[text_field] is None else fields[text_field]
    if not isinstance(text, str):
        fault = f"is a {type(text).__name__} in line {number} of {path}; choose a text field"
        raise OptionError("text_field", text_field, fault)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON strings may contain lone surrogates
        if errors == "strict":
            fault = f"line {number}: character {error.start} of the text is a lone surrogate"
            raise OptionError("INPUT", path, f"{fault}; {_REPLACE}") from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parquet_rows(path: Path, text_field: str, errors: str, advance: Advance) -> Iterator[Fragment]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # Without a buffer size a whole column chunk, often the whole file, is read at once.
        file = parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)
        names = file.schema_arrow.names
        if text_field not in names:
            fault = f"no such column in {path}; its columns are {', '.join(names)}"
            raise OptionError("text_field", text_field, fault)
        kind = file.schema_arrow.field(text_field).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(kind) not in TEXT_TYPES:
            fault = f"is {kind} in {path}; choose a text column"
            raise OptionError("text_field", text_field, fault)
        number, size, reported = 0, path.stat().st_size, 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[text_field], use_threads=False):
            column = batch.column(0)
            if pa.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            for value in column.cast(pa.large_binary()).to_pylist():
                number += 1
                try:
                    yield Fragment((value or b"").decode("utf-8", errors), True)
                except UnicodeDecodeError as error:
                    raise _undecodable(f"{path} row {number}", error.start, error) from None
            passed = size * number // file.metadata.num_rows
            advance(passed - reported)
            reported = passed
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise OptionError("INPUT", path, f"cannot be read as Parquet: {reason}") from None


def _undecodable(place: Path | str, offset: int, error: UnicodeDecodeError) -> OptionError:
    byte = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
    return OptionError("INPUT", place, f"{byte} is not UTF-8 ({error.reason}); {_REPLACE}")
