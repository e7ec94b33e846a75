"""Results saved after each case, so that an interrupted run loses nothing."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any


def add_options(parser: argparse.ArgumentParser, default: str) -> None:
    """`--json` and `--resume`."""
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(default),
        help=f"results, written after each case (default: {default})",
    )
    parser.add_argument("--resume", action="store_true", help="skip the cases in the file")


def add_unattended(parser: argparse.ArgumentParser) -> None:
    """`--minutes` and `--markdown`."""
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="start no case after this many, and write the tables of those that are done",
    )
    parser.add_argument("--markdown", type=Path, help="also write the tables here")


class Results:
    """Results by part, in a new or continued file.

    Args:
        about: metadata of a new file.
    Raises:
        SystemExit: the file exists, without --resume.
    """

    def __init__(self, args: argparse.Namespace, about: dict[str, Any]):
        self._path: Path = args.json
        self._end = time.monotonic() + 60 * getattr(args, "minutes", math.inf)
        self.numbers: dict[str, Any] = {**about, "results": []}
        if self._path.exists():
            if not args.resume:
                raise SystemExit(
                    f"error: --json {self._path} exists: give --resume to "
                    "continue it, or another file"
                )
            self.numbers = json.loads(self._path.read_text())

    def is_late(self) -> bool:
        """Whether no further case is to be started."""
        return time.monotonic() > self._end

    def part(self, part: str = "results") -> list[dict[str, Any]]:
        """All results of a part."""
        return self.numbers.setdefault(part, [])

    def has(self, part: str = "results", /, **key: Any) -> bool:
        """Whether a result with these values exists."""
        return any(
            all(one[field] == value for field, value in key.items()) for one in self.part(part)
        )

    def add(self, result: dict[str, Any], part: str = "results") -> None:
        """Add a result and save."""
        self.part(part).append(result)
        draft = self._path.with_name(f"{self._path.name}.draft")
        draft.write_text(json.dumps(self.numbers, indent=1))
        os.replace(draft, self._path)
