"""Documents: how records are grouped, and that long ones come in passages."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe_plugin.data import documents, readers
from evomoe_plugin.data.documents import (
    _between_blank_lines,
    _from_starts,
    _passages,
    read_documents,
)
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.readers import Fragment
from evomoe_plugin.data.sources import SourceFile


def grouped(path, **given):
    options = PrepareOptions(inputs=(str(path),), out="out", **given)
    source = SourceFile(path, "name", path.stat().st_size, None)
    return joined(read_documents(source, options, lambda n: None))


def joined(passages):
    texts, parts = [], []
    for text, ends_document, *_ in passages:
        parts.append(text)
        if ends_document:
            texts.append("".join(parts))
            parts = []
    assert not parts
    return texts


WIKITEXT = " \n = One = \n \n First . \n Second . \n\n = Two = \n\n = = Part = = \n Third . \n"

GROUPED = {
    "file": ({}, [WIKITEXT]),
    "line": ({"documents_by": "line"}, WIKITEXT.split("\n")[:-1]),
    "blank-line": (
        {"documents_by": "blank-line"},
        [" = One = ", " First . \n Second . ", " = Two = ", " = = Part = = \n Third . "],
    ),
    "start": (
        {"document_start": "^ = [^=]"},
        [" ", " = One = \n \n First . \n Second . \n", " = Two = \n\n = = Part = = \n Third . "],
    ),
}


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize("case", GROUPED)
def test_plain_text(tmp_path, monkeypatch, case, block):
    monkeypatch.setattr(readers, "BLOCK_BYTES", max(block, 20))
    monkeypatch.setattr(documents, "PASSAGE_CHARS", block)
    (tmp_path / "a.txt").write_text(WIKITEXT)
    options, expected = GROUPED[case]
    assert grouped(tmp_path / "a.txt", **options) == expected


def test_rows_are_documents_or_are_joined(tmp_path):
    rows = [" = A = \n", "", " b \n", " = C = ", " d"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert grouped(tmp_path / "a.jsonl") == rows
    assert grouped(tmp_path / "a.jsonl", document_start="^ = ") == [
        " = A = \n\n b \n",
        " = C = \n d",
    ]


FRAGMENTS = st.lists(
    st.builds(Fragment, st.text("a =\n", max_size=12), st.booleans()), max_size=8
).map(lambda fragments: [*fragments, Fragment("", True)])


@settings(max_examples=200, deadline=None)
@given(FRAGMENTS, st.integers(1, 5))
def test_passages_are_short_and_hold_all_text(fragments, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PASSAGE_CHARS", limit)
        passages = list(_passages(fragments))
    assert all(0 < len(p.text) <= limit or p.ends_document for p in passages)
    assert joined(passages) == joined(fragments)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("a =\t", max_size=6), max_size=8), st.integers(1, 4), st.integers(1, 9))
def test_blank_lines_divide_as_a_regular_expression_does(lines, limit, width):
    fragments = [
        Fragment(line[start : start + width], start + width >= len(line))
        for line in lines
        for start in range(0, max(len(line), 1), width)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PASSAGE_CHARS", limit)
        got = joined(_passages(_between_blank_lines(fragments)))
    paragraphs = re.split(r"(?m)^[ \t]*$", "\n".join(lines))
    assert got == [p.strip("\n") for p in paragraphs if p.strip()]


def test_starts_join_what_stands_between():
    rows = ["x", "= a", "b", "= c", "= d"]
    got = joined(_from_starts([Fragment(r, True) for r in rows], re.compile("^= ")))
    assert got == ["x", "= a\nb", "= c", "= d"]
    assert joined(_from_starts([], re.compile("a"))) == []


def test_a_passage_is_cut_after_a_line(monkeypatch):
    monkeypatch.setattr(documents, "PASSAGE_CHARS", 10)
    text = "one\ntwo\nthree\n" + "x" * 25
    assert [p.text for p in _passages([Fragment(text, True)])] == [
        "one\ntwo\n",
        "three\n",
        "x" * 10,
        "x" * 10,
        "x" * 5,
    ]
