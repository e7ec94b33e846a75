"""What share of a training step is spent waiting for data?

The quickstart's model on its text, and its smallest variant with very short steps, each with
--num-workers 0 (batches are built between steps) and 1 (in a parallel process). The numbers are
from the log: `data_wait_ms` per update, and `ups`, updates per second. The first interval, which
opens the data, is excluded.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

import torch
from processes import call
from quickstart_text import Recipe, flags, prepare, program

from evomoe_plugin.metrics.log import parse_log


def measure(data: Path, recipe: Recipe, workers: int, folder: Path) -> tuple[float, float]:
    """Milliseconds per update, and milliseconds waiting for batches; medians."""
    save = folder / f"{'quick' if recipe.quick else 'whole'}-{workers}"
    output = call(
        [
            program("fairseq-train"),
            str(data),
            *flags(recipe.train),
            "--max-update",
            str(recipe.updates),
            "--save-dir",
            str(save),
            "--num-workers",
            str(workers),
            "--log-interval",
            str(recipe.updates // 10),
            "--disable-validation",
            "--no-save",
        ]
    )
    intervals = [r.values for r in parse_log(output.splitlines(), save.name).intervals][1:]
    return tuple(
        statistics.median(values)
        for values in (
            [1000 / values["ups"] for values in intervals],
            [values["data_wait_ms"] for values in intervals],
        )
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("data-wait"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    folder = args.folder.absolute()
    print(
        "| model | tokens per update | workers | update, ms | waiting for data, ms | share |\n"
        "|---|---|---|---|---|---|"
    )
    for quick in (False, True):
        data = folder / ("data-quick" if quick else "data")
        prepare(data, quick)
        recipe = Recipe(updates=args.updates, quick=quick)
        for workers in (0, 1):
            update, wait = measure(data, recipe, workers, folder)
            print(
                f"| {'D 32' if quick else 'D 128'} | {128 if quick else 1024} | {workers} "
                f"| {update:.1f} | {wait:.2f} | {wait / update:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
