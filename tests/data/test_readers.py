"""The formats: what is read, what is refused, and that memory is bounded."""

import json
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data import readers
from evomoe_plugin.data.readers import read_records
from evomoe_plugin.data.rows import BadRow, batch_rows
from evomoe_plugin.data.sources import SourceFile
from tests.data.test_sft_files import save_to_disk


def records(path, **given):
    """The records of a file, each whole."""
    settings = {"lines": False, "text_field": "text", "errors": "strict", "advance": lambda n: None}
    whole, parts = [], []
    for text, ends_record in read_records(source(path), **{**settings, **given}):
        parts.append(text)
        if ends_record:
            whole.append("".join(parts))
            parts = []
    assert not parts
    return whole


def source(path):
    return SourceFile(Path(path), "name", Path(path).stat().st_size, None)


def write_rows(path, rows, kind=None, field="text", **given):
    if path.suffix == ".arrow":
        schema = pa.schema([("id", pa.int64()), (field, kind or pa.string())])
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            stream.write_table(pa.table([range(len(rows)), rows], schema=schema), 1000)
    elif path.suffix == ".parquet":
        column = pa.array(rows, kind)
        table = pa.table({"id": pa.array(range(len(rows))), field: column})
        parquet.write_table(table, path, **given)
    else:
        path.write_text("".join(json.dumps({"id": 0, field: row}) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("text", ["", "a", "a\nb\n", "é\r\n😀\r\rz", "\ufeffbom\n\n", "\n\n"])
def test_plain_text_is_exact_whatever_the_block(tmp_path, monkeypatch, text, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    text = text.removeprefix("\ufeff")
    assert records(path) == [text]
    lines = re.split("\r\n|\r|\n", text)
    assert records(path, lines=True) == (lines if lines[-1] else lines[:-1])


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
def test_parquet_text_columns(tmp_path, kind):
    rows = ["one\n two ", "", "é😀", None] * 100
    if kind == pa.binary():
        rows = [row and row.encode() for row in rows]
    path = write_rows(tmp_path / "a.parquet", rows, kind, row_group_size=30)
    assert records(path) == ["one\n two ", "", "é😀", ""] * 100


def test_jsonl_rows_and_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '\ufeff{"text": "a\\nb"}\n\n{"text": null}\r\n{"text": "\\ud83d\\ude00"}', encoding="utf-8"
    )
    assert records(path) == ["a\nb", "", "😀"]


def test_arrays_and_saved_data_sets_are_rows(tmp_path):
    rows = ["a\nb", None, "😀"] * 100
    path = tmp_path / "a.json"
    path.write_text(f"\ufeff{json.dumps([{'text': row} for row in rows], indent=1)}\n")
    assert records(path) == ["a\nb", "", "😀"] * 100
    saved = save_to_disk(tmp_path / "b", [pa.table({"text": rows})])
    assert records(saved / "data-00000-of-00001.arrow") == ["a\nb", "", "😀"] * 100


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".arrow"])
def test_rows_that_are_chats(tmp_path, suffix):
    chat = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": chat}, {"instruction": "c", "input": "d", "output": "e"}]
    path = tmp_path / f"a{suffix}"
    table = pa.table({name: [row.get(name) for row in rows] for row in rows for name in row})
    if suffix == ".arrow":
        path = save_to_disk(tmp_path / "a", [table]) / "data-00000-of-00001.arrow"
    elif suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    assert records(path, text_field=None) == ["User: a Assistant: b", "User: c\nd Assistant: e"]


def test_another_field(tmp_path):
    for suffix in (".jsonl", ".parquet"):
        path = write_rows(tmp_path / f"a{suffix}", ["x", "y"], field="content")
        assert records(path, text_field="content") == ["x", "y"]


def test_replaces_what_is_no_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\xffb")
    assert records(path, errors="replace") == ["a\ufffdb"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\ud800b"}')
    assert records(path, errors="replace") == ["a\ufffdb"]
    path = write_rows(tmp_path / "a.parquet", [b"a\xffb"], pa.binary())
    assert records(path, errors="replace") == ["a\ufffdb"]


UNREADABLE = {
    "byte": ("a.txt", b"ab\xc3\xa9\xffcd", r"a\.txt: byte 0xff at offset 4 is not UTF-8"),
    "cut off": ("a.txt", b"ab\xc3", r"byte 0xc3 at offset 2 .*--encoding-errors replace"),
    "after a BOM": ("a.txt", b"\xef\xbb\xbfa\xff", "byte 0xff at offset 4 "),
    "UTF-16": ("a.txt", "\ufeffab".encode("utf-16-le"), "byte 0xff at offset 0 "),
    "jsonl byte": ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', "byte 0xff at offset 24 "),
    "jsonl": ("a.jsonl", b'{"text": "a"}\n{text}', "line 2 is not JSON"),
    "jsonl value": ("a.jsonl", b"[1]", "no such field in line 1 of .*it has none"),
    "jsonl field": (
        "a.jsonl",
        b'{"body": "a", "id": 1}',
        "--text-field text: no such field in line 1 of .*its fields are body, id",
    ),
    "jsonl type": ("a.jsonl", b'{"text": 5}', "--text-field text: is a int in line 1"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}', "line 1: character 0 .* lone surrogate"),
    "array": ("a.json", b'[{"text": "a"} 1', "record 2 is not JSON: '1' where , or ] must be"),
    "array field": ("a.json", b'[{"body": 1}]', "no such field in record 1 of .*fields are body"),
    "arrow": ("a.arrow", b"ARROW1", "a.arrow: cannot be read as an Arrow stream"),
    "parquet": ("a.parquet", b"PAR1 it is not", "cannot be read as Parquet"),
    "empty parquet": ("a.parquet", b"", "cannot be read as Parquet"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_names_the_place_that_cannot_be_read(tmp_path, case):
    name, content, message = UNREADABLE[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=message) as error:
        records(tmp_path / name)
    assert "\n" not in str(error.value)


def test_offset_beyond_the_first_block(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 16)
    path = tmp_path / "a.txt"
    path.write_bytes("é".encode() * 50 + b"\xff")
    with pytest.raises(OptionError, match="offset 100 "):
        records(path)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([1, 2], pa.int64(), "--text-field text: is int64 in .*a.parquet"),
        ([b"a", b"\xff"], pa.binary(), "a.parquet row 2: byte 0xff at offset 0 is not UTF-8"),
    ],
)
def test_parquet_columns_that_are_no_text(tmp_path, rows, kind, message):
    path = write_rows(tmp_path / "a.parquet", rows, kind)
    with pytest.raises(OptionError, match=message):
        records(path)


def test_parquet_without_the_column(tmp_path):
    path = write_rows(tmp_path / "a.parquet", ["a"], field="body")
    with pytest.raises(OptionError, match="no such column in .*its columns are id, body"):
        records(path)


def test_rejects_an_endless_row(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1 << 10)
    path = write_rows(tmp_path / "a.jsonl", ["a", "b" * 2000])
    with pytest.raises(OptionError, match="line 2 is longer than"):
        records(path)


@pytest.mark.parametrize("name", ["a.txt", "line.txt", "a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    """24 MB of text (one line of it in line.txt) in less than 8 MB: Python's and pyarrow's."""
    path, line = tmp_path / name, "some words of text, " * 250 + "\n"
    count = 24_000_000 // len(line)
    if path.suffix == ".txt":
        path.write_text((line.rstrip("\n") if name == "line.txt" else line) * count)
    else:
        write_rows(path, [f"{i} {line}" for i in range(count)], use_dictionary=False)
    pool = pa.default_memory_pool()
    pool.release_unused()
    before, most_arrow, chars, passed = pool.bytes_allocated(), 0, 0, []
    tracemalloc.start()
    for text, _ in read_records(
        source(path),
        lines=name != "a.txt",
        text_field="text",
        errors="strict",
        advance=passed.append,
    ):
        chars += len(text)
        most_arrow = max(most_arrow, pool.bytes_allocated() - before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert chars > 23_000_000
    assert peak + most_arrow < 8_000_000
    assert sum(passed) == path.stat().st_size


def test_columns_of_the_same_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    for field, message in (("text", "several columns of"), (None, "have the same name")):
        with pytest.raises(OptionError, match=message):
            records(tmp_path / "a.parquet", text_field=field)
    with pytest.raises(BadRow, match="same name"):
        next(batch_rows(table.to_batches()[0]))
