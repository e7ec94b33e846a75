"""Two files with a sentence a line, each the translation of the other's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from evomoe_plugin.config.errors import OptionError


def read_pairs(option: str, files: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    """Pairs of lines, with single spaces and none at the ends.

    Args:
        option: that gave the files, for messages.
        files: of source and target; None: there are none.
    Raises:
        OptionError: not UTF-8, or of different numbers of lines.
    """
    if files is None:
        return
    source, target = (_decoded(option, file) for file in files)
    for number, pair in enumerate(zip_longest(source, target), start=1):
        if None in pair:
            shorter = files[pair.index(None)]
            raise OptionError(
                option,
                " ".join(files),
                f"the files are not parallel: {shorter} has {number - 1} lines, the other has more",
            )
        one, other = pair
        yield " ".join(one.split()), " ".join(other.split())


def _decoded(option: str, file: str) -> Iterator[str]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise OptionError(option, file, f"line {number} is not UTF-8") from None
