"""Run the campaign, or a part of it: `python -m tests.torture.run --help`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from tests.torture import (
    configurations,
    damage,
    disks,
    harness,
    hostile,
    kills,
    long_runs,
    ranks,
    report,
    text,
    tiny,
    writers,
)

PARTS: tuple[ModuleType, ...] = (
    kills,
    disks,
    writers,
    damage,
    hostile,
    configurations,
    text,
    long_runs,
    ranks,
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="make torture", description="Break runs and files in every way that is listed here."
    )
    names = [part.NAME for part in PARTS]
    parser.add_argument("--part", choices=names, nargs="+", default=names, metavar="PART",
                        help=f"only these: {', '.join(names)}")  # fmt: skip
    parser.add_argument("--hours", type=float, default=12.0, help="start no case after (12)")
    parser.add_argument("--cases", type=int, help="of each part (what each asks for)")
    parser.add_argument("--seed", type=int, default=0, help="of the first case (0)")
    parser.add_argument("--case", type=int, help="run the case of this seed again; keep no outcome")
    parser.add_argument("--again", action="store_true", help="run the cases again that failed last")
    parser.add_argument("--smoke", action="store_true", help="a few cases of each; keep no outcome")
    parser.add_argument("--report", action="store_true", help="write the pages, and run nothing")
    parser.add_argument("--work", type=Path, help="a folder for temporary files, which is kept")
    given = parser.parse_args(arguments)
    tiny.warm_up()
    if given.report:
        report.write(PARTS, harness.RESULTS)
        return 0
    os.nice(5)
    parts = [part for part in PARTS if part.NAME in given.part]
    end = time.monotonic() + 3600 * given.hours
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        work = given.work or Path(folder)
        failures = sum(_run_part(part, given, work, end) for part in parts)
    if not (given.smoke or given.case is not None):
        report.write(PARTS, harness.RESULTS)
    return int(failures > 0)


def _run_part(part: ModuleType, given: argparse.Namespace, work: Path, end: float) -> int:
    """Run what is left of a part; print and return the number of failures."""
    history = harness.read(part, harness.RESULTS)
    results: Path | None = harness.RESULTS
    seeds: Sequence[int]
    if given.case is not None:
        seeds, results = [given.case], None
    elif given.smoke:
        seeds, results = list(part.smoke()), None
    elif given.again:
        seeds = history.left
    else:
        most = given.seed + (given.cases or part.CASES)
        seeds = [seed for seed in range(given.seed, most) if seed not in history.last]
    print(f"{part.TITLE}: {len(seeds)} cases", flush=True)
    tried, failed = 0, 0
    for seed, outcome in harness.run(part, seeds, work, results, end):
        tried += 1
        if outcome.fault:
            failed += 1
            print(f"  {outcome.kind}: {outcome.fault}", flush=True)
            print(f"    again: {harness.repeated_by(part, seed)}", flush=True)
        elif given.case is not None:
            print(f"  {outcome.kind}: as promised", flush=True)
    print(f"{part.TITLE}: {tried} tried, {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
