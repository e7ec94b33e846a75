"""Readers for each format: stream a file as fragments of records, in bounded memory.

A record is the whole file or a line of plain text, or a row of JSON, Parquet or Arrow. Plain text
records longer than a block are split into several fragments.
"""

from __future__ import annotations

import codecs
import io
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.rows import BadRow, arrow_batches, batch_rows, json_values
from evomoe_plugin.data.sources import SourceFile
from evomoe_plugin.data.turns import FORMATS, BadRecord, Templates, read_turns

if TYPE_CHECKING:
    import pyarrow as pa

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
    source: SourceFile,
    *,
    lines: bool,
    text_field: str | None,
    errors: str,
    advance: Advance,
) -> Iterator[Fragment]:
    """The records of a file: each line of plain text if `lines`, otherwise the whole file.

    Args:
        text_field: of rows; None: rows are chats, or prompts with responses (`data.turns`).
        errors: what to do with bytes that are not UTF-8, as `bytes.decode`.
    Raises:
        OptionError: unreadable data, with its position.
    """
    if source.is_text:
        blocks = text_blocks(source.path, "INPUT", errors, advance)
        if lines:
            return _lines(blocks)
        return itertools.chain((Fragment(block, False) for block in blocks), [Fragment("", True)])
    suffix, path = source.path.suffix, source.path
    if suffix in (".parquet", ".arrow"):
        batches = (_parquet_batches if suffix == ".parquet" else _arrow_batches)(path, text_field)
        texts = _chats if text_field is None else partial(_column, text_field=text_field)
        return _batch_rows(path, batches, partial(texts, errors=errors), advance)
    rows = _jsonl_rows if suffix == ".jsonl" else _json_rows
    return (
        Fragment(_text_of(fields, text_field, errors, path, number), True)
        for number, fields in rows(path, errors, advance)
    )


def text_blocks(
    path: Path, option: str, errors: str = "strict", advance: Advance = lambda _: None
) -> Iterator[str]:
    """The text of a file, without a byte-order mark.

    Raises:
        OptionError: it is not UTF-8, with `option` in the message.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors)
    read = 0
    with open(path, "rb") as stream:
        for block in itertools.chain(iter(lambda: stream.read(BLOCK_BYTES), b""), [b""]):
            read += len(block)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                offset = read - len(error.object) + error.start
                raise _undecodable(path, offset, error, option) from None
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


def _jsonl_rows(path: Path, errors: str, advance: Advance) -> Iterator[tuple[str, Any]]:
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
                try:
                    yield f"line {number}", json.loads(row)
                except (ValueError, RecursionError) as error:
                    raise OptionError(
                        "INPUT", path, f"line {number} is not JSON: {error}"
                    ) from None


def _json_rows(path: Path, errors: str, advance: Advance) -> Iterator[tuple[str, Any]]:
    values = json_values(text_blocks(path, "INPUT", errors, advance))
    for number in itertools.count(1):
        try:
            yield f"record {number}", next(values)
        except StopIteration:
            return
        except BadRow as error:
            raise OptionError("INPUT", path, f"record {number} {error}") from None


def _text_of(fields: Any, text_field: str | None, errors: str, path: Path, number: str) -> str:
    if text_field is None:
        return _chat_text(fields, f"{path}, {number}")
    if not isinstance(fields, dict) or text_field not in fields:
        has = f"its fields are {', '.join(fields)}" if isinstance(fields, dict) else "it has none"
        fault = f"no such field in {number} of {path}; {has}"
        raise OptionError("text_field", text_field, fault)
    text = "" if fields[text_field] is None else fields[text_field]
    if not isinstance(text, str):
        fault = f"is a {type(text).__name__} in {number} of {path}; choose a text field"
        raise OptionError("text_field", text_field, fault)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON strings may contain lone surrogates
        if errors == "strict":
            fault = f"{number}: character {error.start} of the text is a lone surrogate"
            raise OptionError("INPUT", path, f"{fault}; {_REPLACE}") from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _chat_text(record: Any, place: str) -> str:
    """The text of a record in the templates that fine-tuning has by default."""
    try:
        turns = read_turns(record, Templates()).turns
    except BadRecord as error:
        raise OptionError("INPUT", place, f"{error}; {FORMATS}") from None
    return "".join(turn.text for turn in turns)


def _parquet_batches(path: Path, text_field: str | None) -> Iterator[tuple[pa.RecordBatch, float]]:
    """The batches of a file, with the share of its rows that were read after each."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        # Without a buffer size a whole column chunk, often the whole file, is read at once.
        file = parquet.ParquetFile(path, buffer_size=BLOCK_BYTES, pre_buffer=False)
        columns = None
        if text_field is not None:
            _check_column(file.schema_arrow, text_field, path)
            columns = [text_field]
        rows = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            rows += batch.num_rows
            yield batch, rows / file.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0]
        raise OptionError("INPUT", path, f"cannot be read as Parquet: {reason}") from None


def _arrow_batches(path: Path, text_field: str | None) -> Iterator[tuple[pa.RecordBatch, float]]:
    """As of Parquet; the share is known at the end only."""
    try:
        for batch in arrow_batches(path):
            if text_field is not None:
                _check_column(batch.schema, text_field, path)
            for start in range(0, batch.num_rows, BATCH_ROWS):
                yield batch.slice(start, BATCH_ROWS), 0.0
    except BadRow as error:
        raise OptionError("INPUT", path, str(error)) from None


def _check_column(schema: pa.Schema, text_field: str, path: Path) -> None:
    import pyarrow as pa

    if text_field not in schema.names:
        fault = f"no such column in {path}; its columns are {', '.join(schema.names)}"
        raise OptionError("text_field", text_field, fault)
    if schema.names.count(text_field) > 1:
        raise OptionError("text_field", text_field, f"several columns of {path} have this name")
    kind = schema.field(text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(kind) not in TEXT_TYPES:
        fault = f"is {kind} in {path}; choose a text column"
        raise OptionError("text_field", text_field, fault)


def _batch_rows(
    path: Path,
    batches: Iterator[tuple[pa.RecordBatch, float]],
    texts: Callable[[pa.RecordBatch, Path, int], Iterator[str]],
    advance: Advance,
) -> Iterator[Fragment]:
    rows, size, reported = 0, path.stat().st_size, 0
    for batch, share in batches:
        for text in texts(batch, path, rows):
            yield Fragment(text, True)
        rows += batch.num_rows
        passed = int(size * share)
        advance(passed - reported)
        reported = passed
    advance(size - reported)


def _column(
    batch: pa.RecordBatch, path: Path, before: int, *, text_field: str, errors: str
) -> Iterator[str]:
    import pyarrow as pa

    column = batch.column(text_field)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    for number, value in enumerate(column.cast(pa.large_binary()).to_pylist(), before + 1):
        try:
            yield (value or b"").decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise _undecodable(f"{path} row {number}", error.start, error) from None


def _chats(batch: pa.RecordBatch, path: Path, before: int, *, errors: str) -> Iterator[str]:
    try:
        records = list(batch_rows(batch))
    except BadRow as error:
        raise OptionError("INPUT", path, str(error)) from None
    for number, record in enumerate(records, before + 1):
        yield _chat_text(record, f"{path}, row {number}")


def _undecodable(
    place: Path | str, offset: int, error: UnicodeDecodeError, option: str = "INPUT"
) -> OptionError:
    byte = f"byte 0x{error.object[error.start]:02x} at offset {offset}"
    remedy = _REPLACE if option == "INPUT" else "convert the file"
    return OptionError(option, place, f"{byte} is not UTF-8 ({error.reason}); {remedy}")
