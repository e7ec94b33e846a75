"""Group the records of a file into documents, as a stream of passages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.readers import Advance, Fragment, read_records
from evomoe_plugin.data.sources import SourceFile

PASSAGE_CHARS = 1 << 20


class Passage(NamedTuple):
    """Consecutive text of one document. Long documents are split, so that memory is bounded."""

    text: str
    ends_document: bool


def read_documents(
    source: SourceFile, options: PrepareOptions, advance: Advance
) -> Iterator[Passage]:
    """The documents of a file as passages of at most `PASSAGE_CHARS` characters, in order."""
    by_start = options.document_start is not None
    records = read_records(
        source,
        lines=by_start or options.documents_by != "file",
        text_field=options.text_field,
        errors=options.encoding_errors,
        advance=advance,
    )
    if by_start:
        return _from_starts(records, re.compile(options.document_start))
    if options.documents_by == "blank-line" and source.is_text:
        return _between_blank_lines(records)
    return _each_record(records)


class _Document:
    """Collects the text of a document and yields passages, split after a line if possible."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._chars = 0

    def add(self, text: str) -> Iterator[Passage]:
        self._parts.append(text)
        self._chars += len(text)
        if self._chars <= PASSAGE_CHARS:
            return
        text, start = "".join(self._parts), 0
        while len(text) - start > PASSAGE_CHARS:
            limit = start + PASSAGE_CHARS
            cut = text.rfind("\n", start, limit) + 1 or limit
            yield Passage(text[start:cut], False)
            start = cut
        self._parts, self._chars = [text[start:]], len(text) - start

    def end(self) -> Iterator[Passage]:
        yield Passage("".join(self._parts), True)
        self._parts, self._chars = [], 0


def _each_record(records: Iterator[Fragment]) -> Iterator[Passage]:
    document = _Document()
    for text, ends_record in records:
        yield from document.add(text)
        if ends_record:
            yield from document.end()


def _between_blank_lines(lines: Iterator[Fragment]) -> Iterator[Passage]:
    document, started = _Document(), False
    newline = indent = ""  # held back until text follows: documents end without a newline
    blank = True
    for text, ends_line in lines:
        if blank and not text.strip():
            indent += text
        else:
            yield from document.add(newline + indent + text)
            newline, indent, blank, started = "", "", False, True
        if ends_line:
            if blank and started:
                yield from document.end()
                started = False
            newline = "" if blank else "\n"
            indent, blank = "", True
    if started:
        yield from document.end()


def _from_starts(records: Iterator[Fragment], start: re.Pattern[str]) -> Iterator[Passage]:
    """Records joined by newlines; a record that matches `start` begins a new document."""
    document, started, begins = _Document(), False, True
    newline = ""  # between the last record and the next
    for text, ends_record in records:
        if begins:
            if started and start.search(text):
                yield from document.end()
                newline = ""
            yield from document.add(newline)
            started, begins = True, False
        yield from document.add(text)
        if ends_record:
            newline = "" if text.endswith("\n") else "\n"
            begins = True
    if started:
        yield from document.end()
