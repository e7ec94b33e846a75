"""Numbers on disk after each case, so that nothing is lost when a long run is stopped."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser, default: str) -> None:
    """`--json` and `--resume`."""
    parser.add_argument("--json", type=Path, default=Path(default),
                        help=f"the numbers, written after each case (default: {default})")
    parser.add_argument("--resume", action="store_true",
                        help="go on after the cases that the file has")


class Results:
    """What was measured, by parts; a new file, or one to go on with.

    Args:
        about: of a new file.
    Raises:
        SystemExit: the file is there, and nobody said that it is to be gone on with.
    """

    def __init__(self, args: argparse.Namespace, about: dict[str, Any]):
        self._path: Path = args.json
        self.numbers: dict[str, Any] = {**about, "results": []}
        if self._path.exists():
            if not args.resume:
                raise SystemExit(f"error: --json {self._path} is there already: give --resume to "
                                 "go on after what it has, or another file")
            self.numbers = json.loads(self._path.read_text())

    def part(self, part: str = "results") -> list[dict[str, Any]]:
        """All of a part."""
        return self.numbers.setdefault(part, [])

    def has(self, part: str = "results", /, **key: Any) -> bool:
        """Whether something of these properties was measured."""
        return any(all(one[field] == value for field, value in key.items())
                   for one in self.part(part))

    def add(self, result: dict[str, Any], part: str = "results") -> None:
        """Keep and write."""
        self.part(part).append(result)
        draft = self._path.with_name(f"{self._path.name}.draft")
        draft.write_text(json.dumps(self.numbers, indent=1))
        os.replace(draft, self._path)
