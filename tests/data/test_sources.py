"""Which files are read, and in which order."""

import pyarrow as pa
import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data import PrepareOptions
from evomoe_plugin.data.sources import find_sources
from tests.data.test_sft_files import save_to_disk


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    for name in (
        "b.txt",
        "a/c.jsonl",
        "a/b.parquet",
        "a/b/z.txt",
        "B.txt",
        "x.py",
        "test/t.txt",
        "a/test_x.txt",
        ".git/g.txt",
        "a/.hidden.txt",
        "data/dict.txt",
        "data/DATA_CARD.json",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return root


def names(*inputs, **given):
    options = PrepareOptions(inputs=tuple(map(str, inputs)), out="out", **given)
    return [source.name for source in find_sources(options)]


def test_folders_are_sorted_and_inputs_keep_their_order(tree):
    assert names(tree) == [
        "root/B.txt",
        "root/a/b.parquet",
        "root/a/b/z.txt",
        "root/a/c.jsonl",
        "root/a/test_x.txt",
        "root/b.txt",
        "root/test/t.txt",
    ]
    assert names(tree / "b.txt", tree / "a")[:2] == ["b.txt", "a/b.parquet"]


def test_text_suffix_and_exclude(tree):
    assert "root/x.py" in names(tree, text_suffix=(".py",))
    assert names(tree, exclude=("test*", "a/b")) == [
        "root/B.txt",
        "root/a/b.parquet",
        "root/a/c.jsonl",
        "root/b.txt",
    ]
    assert names(tree, exclude=("a/*",)) == ["root/B.txt", "root/b.txt", "root/test/t.txt"]


def test_arrays_are_named_and_saved_data_sets_found(tree):
    for name in ("package.json", "loose.arrow"):
        (tree / name).write_text("x")
    save_to_disk(tree / "saved", [pa.table({"text": ["a"]}), pa.table({"text": ["b"]})])
    found = set(names(tree))
    listed = {f"root/saved/data-{n:05d}-of-00002.arrow" for n in (0, 1)}
    assert {name for name in found if name.endswith((".json", ".arrow"))} == listed
    assert names(tree / "package.json", tree / "loose.arrow") == ["package.json", "loose.arrow"]
    options = PrepareOptions(inputs=(str(tree),), out="out", text_suffix=(".json",))
    texts = {source.name for source in find_sources(options) if source.is_text}
    assert {"root/package.json", "root/saved/state.json", "root/b.txt"} <= texts
    (tree / "saved" / "state.json").write_text("{}")
    with pytest.raises(OptionError, match="INPUT .*saved: its state.json does not list data files"):
        names(tree)


def test_no_file_is_read_twice(tree):
    (tree / "link.txt").symlink_to(tree / "b.txt")
    assert names(tree / "b.txt", tree, tree).count("b.txt") == 1
    assert "root/b.txt" not in names(tree / "b.txt", tree)
    assert "root/link.txt" not in names(tree)[1:] or "root/b.txt" not in names(tree)


def test_held_out_files_leave_the_inputs(tree):
    options = PrepareOptions(
        inputs=(str(tree),), out="out", valid=(str(tree / "a"),), test=(str(tree / "b.txt"),)
    )
    assert [(source.name, source.split) for source in find_sources(options)] == [
        ("root/B.txt", None),
        ("root/test/t.txt", None),
        ("a/b.parquet", "valid"),
        ("a/b/z.txt", "valid"),
        ("a/c.jsonl", "valid"),
        ("a/test_x.txt", "valid"),
        ("b.txt", "test"),
    ]


def test_a_name_that_is_no_text(tree):
    (tree / b"\xff.txt".decode("utf-8", "surrogateescape")).write_text("x")
    assert names(tree)[-1] == "root/\\xff.txt"
