"""Files of records: their formats, and the place of what is wrong."""

import json

import pyarrow as pa
import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.sft_files import file_of_split, read_records

RECORDS = [
    {"instruction": "a", "input": "b", "output": "é"},
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "]},{"}]},
]


def save_to_disk(folder, tables, **state):
    """As `datasets.Dataset.save_to_disk` does: Arrow streams, and two files about them."""
    folder.mkdir()
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file:
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table, max_chunksize=2)
    files = [{"filename": name} for name in names]
    content = {"_data_files": files, "_fingerprint": "x", "_split": "train", **state}
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text("{}")
    # Left by `map`, and no part of the data set.
    (folder / "cache-00.arrow").write_bytes(b"")
    return folder


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


WRITTEN = {
    "train.jsonl": lines(RECORDS),
    "train.json": json.dumps(RECORDS, indent=2, ensure_ascii=False),
}


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte-order mark"])
@pytest.mark.parametrize("name", WRITTEN)
def test_json(tmp_path, name, mark):
    (tmp_path / name).write_text(mark + WRITTEN[name], encoding="utf-8")
    path = file_of_split(tmp_path, "train")
    assert path == tmp_path / name
    found = list(read_records(path))
    assert [record for _, record in found] == RECORDS
    place = "line" if name.endswith("l") else "record"
    assert [where for where, _ in found] == [f"{path}, {place} {n}" for n in (1, 2)]


def test_the_last_line_needs_no_end(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(WRITTEN[path.name].strip())
    assert [record for _, record in read_records(path)] == RECORDS


def test_saved_data_sets(tmp_path):
    rows = [{"instruction": str(n), "input": None, "output": "c"} for n in range(5)]
    chats = pa.table({"messages": [[{"role": "user", "content": "a"}]] * 3})
    save_to_disk(tmp_path / "train", [pa.Table.from_pylist(rows), chats])
    found = list(read_records(file_of_split(tmp_path, "train")))
    assert [record for _, record in found] == [
        *({"instruction": str(n), "output": "c"} for n in range(5)),
        *([{"messages": [{"role": "user", "content": "a"}]}] * 3),
    ]
    assert found[6][0] == f"{tmp_path / 'train'}, row 7"


GOOD = '{"prompt": "a", "response": "b"}'
BAD = {
    "not json": ("a.jsonl", GOOD + "\n{'a'", "line 2: is not JSON (Expecting property name"),
    "blank": ("a.jsonl", GOOD + "\n\n" + GOOD, "line 2: is empty"),
    "deep": ("a.jsonl", "[" * 100_000, "line 1: is nested too deeply"),
    "bytes": ("a.jsonl", b'{"prompt": "\xff"}', "line 1: is not UTF-8 (byte 13)"),
    "UTF-16": ("a.jsonl", GOOD.encode("utf-16"), "line 1: is not UTF-8 (byte 1)"),
    "empty": ("a.jsonl", "", "a.jsonl: is empty"),
    "array": ("a.json", f"[{GOOD},\n{GOOD}", "record 3: is not JSON: the array has no end"),
    "array element": ("a.json", f"[{GOOD}, x]", "record 2: is not JSON: Expecting value"),
    "deep array": ("a.json", "[" * 100_000, "record 1: is nested too deeply"),
    "array bytes": ("a.json", b'["\xff"]', "a.json: byte 0xff at offset 2 is not UTF-8"),
    "empty array": ("a.json", "[]", "a.json: is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_damage_is_named(tmp_path, case):
    name, content, wrong = BAD[case]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError) as error:
        list(read_records(file_of_split(tmp_path, "a")))
    assert wrong in str(error.value) and "\n" not in str(error.value)


def spoil_file(folder):
    with open(folder / "data-00000-of-00001.arrow", "r+b") as file:
        file.truncate(100)


SPOILT = {
    "state": (lambda f: (f / "state.json").write_text("{"), "state.json does not list data files"),
    "names": (
        lambda f: (f / "state.json").write_text('{"_data_files": [{"filename": "../../x.arrow"}]}'),
        "has no x.arrow, which its state.json names",
    ),
    "stream": (spoil_file, "row 1: cannot be read as an Arrow stream"),
    "no stream": (
        lambda f: (f / "data-00000-of-00001.arrow").write_bytes(b""),
        "row 1: cannot be read as an Arrow stream",
    ),
    "no state": (lambda f: (f / "state.json").unlink(), "is no folder that datasets saved"),
    "no rows": (
        lambda f: (f / "state.json").write_text('{"_data_files": []}'),
        "a: is empty",
    ),
    "index": (
        lambda f: (f / "state.json").write_text('{"_data_files": [], "_indices_data_files": [1]}'),
        "was saved with an index: load it with datasets and save it again",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_damaged_data_sets(tmp_path, case):
    spoil, wrong = SPOILT[case]
    spoil(save_to_disk(tmp_path / "a", [pa.table({"prompt": ["x"] * 9})]))
    with pytest.raises(OptionError) as error:
        list(read_records(file_of_split(tmp_path, "a")))
    assert wrong in str(error.value) and "\n" not in str(error.value)


def test_one_file_for_a_split(tmp_path):
    with pytest.raises(OptionError, match="has no a.jsonl, a.json or folder a of datasets: each"):
        file_of_split(tmp_path, "a")
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a").mkdir()
    with pytest.raises(OptionError, match="has a.jsonl and a, which are the same split: remove"):
        file_of_split(tmp_path, "a")
