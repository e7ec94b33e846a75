"""Runs of thousands of updates: memory, open files, threads and temporary files stay what they are
after the first tenth, also with a slow disk under the asynchronous writer."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.torture import disks, faults, forked, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, DRAW = "long", "Long runs", 2

UPDATES = 20_000
UPDATES_OF_TWO_RANKS = 5_000
"""Which take five times as long an update."""
_EVERY = 100
_WARM = 10
"""A part of the updates, of which one is left out at the start."""

_MOST_GROWTH = 8 * 2**20
"""Bytes of memory, from the first half after warm-up to the second."""

_SLOW_SECONDS = 0.002
_LIMIT_SECONDS = 4 * 3600

VARIANTS: dict[str, tuple[str, ...]] = {
    "one process": (),
    "asynchronous, slow disk": ("--write-checkpoints-asynchronously",),
    "validated": ("--validate-interval-updates", "100", "--max-valid-steps", "1"),
    "two workers": ("--num-workers", "2"),
    "fully sharded": tiny.LAYOUTS["fully sharded"],
    "sharded experts": tiny.LAYOUTS["sharded experts"],
}
CASES = len(VARIANTS)


def smoke() -> Iterable[int]:
    """None: what leaks is seen only after a while."""
    return ()


def prepare(work: Path) -> None:
    tiny.data(work)


def _sample(update: int) -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "update": update,
        "bytes of memory": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "open files": len(os.listdir("/proc/self/fd")),
        "temporary files": len(os.listdir(tempfile.gettempdir())),
    }


def case(seed: int, work: Path, updates: int = 0) -> Outcome:
    """
    Args:
        updates: 0: those of the campaign.
    """
    name = list(VARIANTS)[seed]
    updates = updates or (UPDATES if tiny.ranks_of(name) == 1 else UPDATES_OF_TWO_RANKS)
    folder = folder_of(NAME, seed, work)
    temporary = folder / "temporary"
    temporary.mkdir()
    validating = [] if name == "validated" else ["--disable-validation"]
    arguments = tiny.train_arguments(
        *(tiny.data(work), folder / "run", *VARIANTS[name], *validating),
        *("--max-update", updates, "--save-interval-updates", "200", "--batch-size", "2"),
        *("--keep-interval-updates", "2", "--log-interval", "1000", "--lr", "0.0003"),
        *("--clip-norm", "0.1"),
    )

    def run() -> list[dict[str, int]]:
        from evomoe_plugin.trainer.hooks import after_update

        os.environ["TMPDIR"] = tempfile.tempdir = str(temporary)
        samples: list[dict[str, int]] = []

        def look(trainer: Any) -> None:
            if trainer.get_num_updates() % _EVERY == 0:
                samples.append(_sample(trainer.get_num_updates()))
                if faults.rank() == 0:
                    print("SAMPLE", samples[-1], flush=True)

        after_update(look)
        if "slow" in name:
            faults.watch_disk(folder / "run", faults.Slow(_SLOW_SECONDS), faults.Counters())
        forked.command("train", arguments)
        return samples

    ended = forked.call(run, timeout=_LIMIT_SECONDS)
    fault = disks.verdict(ended)
    if fault or ended.status != 0:
        return Outcome(name, fault or ended.error)
    samples = _samples_of(ended)
    return Outcome(f"{name}, {updates:,} updates: {grown(samples)}", too_much(samples))


def _samples_of(ended: forked.Ended) -> list[dict[str, int]]:
    """Of the first rank, from what it printed."""
    import ast

    lines = (line.partition("SAMPLE ")[2] for line in ended.lines)
    return [ast.literal_eval(text) for text in lines if text.startswith("{")]


def _warm_and_last(samples: list[dict[str, int]]) -> tuple[dict[str, int], dict[str, int]]:
    """The largest values after warm-up in the first and in the second half of the rest."""
    warm = samples[len(samples) // _WARM :]
    half = len(warm) // 2
    first, second = (
        {name: max(sample[name] for sample in part) for name in warm[0]}
        for part in (warm[:half], warm[half:])
    )
    return first, second


def grown(samples: list[dict[str, int]]) -> str:
    """How much each grew from the first to the second half."""
    first, last = _warm_and_last(samples)
    memory = (last["bytes of memory"] - first["bytes of memory"]) / 2**20
    return f"memory {memory:+.1f} MiB of {last['bytes of memory'] / 2**20:.0f}"


def too_much(samples: list[dict[str, int]]) -> str:
    """What grew; empty: nothing."""
    if not samples:
        return "there are no samples"
    first, last = _warm_and_last(samples)
    for name in ("threads", "open files", "temporary files"):
        if last[name] > first[name]:
            return f"{name}: {first[name]} in the first half, {last[name]} in the second"
    growth = last["bytes of memory"] - first["bytes of memory"]
    return f"{growth} bytes of memory more in the second half" if growth > _MOST_GROWTH else ""
