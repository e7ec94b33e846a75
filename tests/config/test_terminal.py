"""Standard output of any locale."""

import io
import sys

import pytest

from evomoe_plugin.config.terminal import show_any_text


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [("ascii", "train …", b"train \\u2026"), ("utf-8", "caf\udce9 …", b"caf\\udce9 \xe2\x80\xa6")],
)
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding, text, shown):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    show_any_text()
    print(text, end="", flush=True)
    assert written.getvalue() == shown


def test_a_stream_of_a_program_is_left_as_it_is(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    show_any_text()
