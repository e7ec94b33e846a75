"""Standard output that takes any text."""

from __future__ import annotations

import io
import sys


def show_any_text() -> None:
    """Print characters that the encoding of standard output lacks as escapes, not as an error.

    A terminal of another locale lacks most characters; UTF-8 lacks bytes of file names that are no
    text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
