"""Group the records of a file into documents, as a stream of passages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.readers import Advance, Fragment, read_records
from evomoe_plugin.data.sources import SourceFile

PASSAGE_CHARS = 1 << 20


class Passage(NamedTuple):
    """Consecutive text of one document. Long documents are split, so that memory is bounded."""

    text: str
    ends_document: bool
    starts_document: bool = False  # set by `staging`


def read_documents(
    source: SourceFile, options: PrepareOptions, advance: Advance
) -> Iterator[Passage]:
    """The documents of a file as passages of at most `PASSAGE_CHARS` characters, in order."""
    start = options.document_start
    records = read_records(
        source,
        lines=start is not None or options.documents_by != "file",
        text_field=None if options.rows == "chat" else options.text_field,
        errors=options.encoding_errors,
        advance=advance,
    )
    if start is not None:
        records = _from_starts(records, re.compile(start))
    elif options.documents_by == "blank-line" and source.is_text:
        records = _between_blank_lines(records)
    return _passages(records)


def _passages(fragments: Iterable[Fragment]) -> Iterator[Passage]:
    """Join the fragments of each document, and split long text, after a line if possible."""
    parts: list[str] = []
    chars = 0
    for text, ends_document in fragments:
        parts.append(text)
        chars += len(text)
        if chars > PASSAGE_CHARS:
            text, start = "".join(parts), 0
            while len(text) - start > PASSAGE_CHARS:
                limit = start + PASSAGE_CHARS
                cut = text.rfind("\n", start, limit) + 1 or limit
                yield Passage(text[start:cut], False)
                start = cut
            parts, chars = [text[start:]], len(text) - start
        if ends_document:
            yield Passage("".join(parts), True)
            parts, chars = [], 0


def _between_blank_lines(lines: Iterable[Fragment]) -> Iterator[Fragment]:
    newline = indent = ""  # held back until text follows: documents end without a newline
    blank, started = True, False
    for text, ends_line in lines:
        if blank and not text.strip():
            indent += text
        else:
            yield Fragment(newline + indent + text, False)
            newline, indent, blank, started = "", "", False, True
        if ends_line:
            if blank and started:
                yield Fragment("", True)
                started = False
            newline = "" if blank else "\n"
            indent, blank = "", True
    if started:
        yield Fragment("", True)


def _from_starts(records: Iterable[Fragment], start: re.Pattern[str]) -> Iterator[Fragment]:
    """Records joined by newlines; a record that matches `start` begins a new document."""
    started, begins = False, True
    newline = ""  # between the last record and the next
    for text, ends_record in records:
        if begins and started and start.search(text):
            yield Fragment("", True)
            newline = ""
        yield Fragment(newline + text if begins else text, False)
        started, begins = True, ends_record
        if ends_record:
            newline = "" if text.endswith("\n") else "\n"
    if started:
        yield Fragment("", True)
