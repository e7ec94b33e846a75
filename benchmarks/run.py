"""Run the speed benchmarks, and print their tables and goals.

`layer.py`, `whole_step.py` and `whole_run.py` write results into a folder as they go; `--folder`
with an existing one continues it. The studies `dense_to_sparse.py` and `spawn_phase.py` print their
own tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import whole_run
import whole_step
from speed import goals, report
from speed.machine import slug

HERE = Path(__file__).parent
STUDIES = ("dense_to_sparse.py", "spawn_phase.py")
PARTS = {"layers": "layer.py", "steps": "whole_step.py", "runs": "whole_run.py"}
PRECISIONS = {"layers", "steps"}  # parts that run in several precisions


def call(script: str, given: list[str]) -> None:
    """Run a script of this folder.

    Raises:
        SystemExit: it failed.
    """
    status = subprocess.run([sys.executable, "-W", "ignore", HERE / script, *given]).returncode
    if status:
        raise SystemExit(f"error: benchmarks/{script} failed; see above")


def tables(found: dict[str, Any]) -> str:
    """The report in Markdown."""
    parts = ["## One layer", report.layers(found["layers"]), report.nulls_table(found["nulls"])]
    if found["steps"]:
        parts += ["## The whole training step", whole_step.text(found["steps"])]
    if found["runs"]:
        parts.append("## The whole run")
        parts += [
            f"{result['name']}, {result['updates']} updates, {result['threads']} threads\n\n"
            f"{whole_run.text(result['rows'])}"
            for result in found["runs"]
        ]
    parts += ["## Goals", goals.goals_table(found)]
    if lines := goals.missed(found):
        parts.append(f"Missed:\n\n{lines}")
    return "\n\n".join(part for part in parts if part)


def read(folder: Path) -> dict[str, Any]:
    """Read the results of all parts."""
    found: dict[str, Any] = {"machine": {}, "nulls": []}
    for part, script in PARTS.items():
        path = (folder / script).with_suffix(".json")
        numbers = json.loads(path.read_text()) if path.exists() else {"results": [], "machine": {}}
        found[part] = numbers["results"]
        found["machine"] = found["machine"] or numbers["machine"]
        found["nulls"] += numbers.get("nulls", [])
    return found


def main() -> None:
    """Measure, print, and write if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="few small cases and no studies, takes minutes"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", nargs="+", default=["1", "2"])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["studies", *PARTS],
        default=["studies", *PARTS],
        help="parts (default: all)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(f"speed-results/{time.strftime('%Y-%m-%dT%H-%M-%S')}"),
        help="folder of results (default: a new one in speed-results)",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="write the tables to benchmarks/results/DATE-CPU.md, with a plot",
    )
    parser.add_argument("--overwrite", action="store_true", help="even if it exists")
    args = parser.parse_args()
    report_path = HERE / "results" / f"{time.strftime('%Y-%m-%d')}-{slug()}.md"
    if args.write and report_path.exists() and not args.overwrite:
        parser.error(f"--write: {report_path} exists: give --overwrite, or move it")
    args.folder.mkdir(parents=True, exist_ok=True)
    common = ["--rounds", str(args.rounds)]
    quick = ["--quick"] if args.quick else []
    if "studies" in args.only and not args.quick:
        for script in STUDIES:
            call(script, [*common, "--threads", args.threads[0]])
    for part, script in PARTS.items():
        if part not in args.only:
            continue
        given = [
            *quick,
            "--threads",
            *args.threads,
            "--resume",
            "--json",
            str((args.folder / script).with_suffix(".json")),
        ]
        given += ["--dtype", *args.dtype] if part in PRECISIONS else []
        given += common if part in PRECISIONS else ["--rounds", "3"]
        call(script, given)
    found = read(args.folder)
    text = f"{report.heading(found['machine'])}\n\n{tables(found)}\n"
    print(f"\n{text}")
    if args.write:
        write(report_path, text, found["layers"])


def write(path: Path, text: str, layers: list[dict[str, Any]]) -> None:
    """Write the report and its plot."""
    from speed.plot import draw

    plot = path.with_suffix(".svg")
    draw(layers, plot)
    given = " ".join(sys.argv[1:])
    command = f'make bench ARGS="{given}"' if given else "make bench"
    path.write_text(f"# Speed\n\n`{command}`\n\n![Ratios]({plot.name})\n\n{text}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
