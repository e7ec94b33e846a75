"""`kill -9` at any moment: half of them inside saves, half anywhere in a run.

After each, every checkpoint in the folder is whole and of the unbroken run, the disk holds little
more than theirs; and the same command goes on to the unbroken run's files, bit for bit.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from evomoe_plugin.checkpoint import fsdp_shards, verify
from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
from tests.torture import faults, forked, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "kills", "Kills", 200, 1

LIMIT_SECONDS = 900
"""Of a run that takes two on a quiet machine: it hangs."""

LAYOUTS = tuple(tiny.LAYOUTS)


def smoke() -> Iterable[int]:
    """Inside a save of one process."""
    return (0,)


def prepare(work: Path) -> None:
    for layout in LAYOUTS:
        moments(work, layout)


def moments(work: Path, layout: str) -> dict[str, list[int]]:
    """How many moments a run of a layout has, by rank: `disk` and `calls`."""
    file = work / "moments" / f"{layout}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        tiny.unbroken(work, layout)
        found = {}
        for kind in ("disk", "calls"):
            folder = work / "moments" / f"{layout}-{kind}"
            counters = faults.Counters()
            ended = forked.call(_run(work, layout, folder, kind, None, counters), LIMIT_SECONDS)
            assert ended.status == 0, ended.output[-2000:]
            found[kind] = counters.values()[: tiny.ranks_of(layout)]
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _run(
    work: Path,
    layout: str,
    folder: Path,
    kind: str,
    kill: faults.Kill | None,
    counters: faults.Counters,
) -> Callable[[], None]:
    """A run of a layout, killed at a moment."""
    trained = train(work, layout, folder)

    def run() -> None:
        if kind == "disk":
            faults.watch_disk(folder, kill, counters)
        else:
            at = (None, 0, False) if kill is None else (kill.at, kill.rank, kill.everyone)
            faults.watch_calls(*at, counters)
        trained()

    return run


def train(work: Path, layout: str, folder: Path) -> Callable[[], None]:
    """A run of a layout that saves to `folder`, in a child."""
    cfg = _configuration(work, layout)

    def run() -> None:
        cfg.checkpoint.save_dir = str(folder)
        forked.start("train", cfg)

    return run


@functools.cache
def _configuration(work: Path, layout: str) -> Any:
    """Its options, which take half of a command's time."""
    arguments = tiny.train_arguments(tiny.data(work), "", *tiny.SAVING, *tiny.LAYOUTS[layout])
    return forked.configuration("train", arguments)


def case(seed: int, work: Path) -> Outcome:
    dice = random.Random(seed)
    layout = LAYOUTS[seed % len(LAYOUTS)]
    kind = ("disk", "calls")[seed // len(LAYOUTS) % 2]
    counts = moments(work, layout)[kind]
    rank = dice.choice([rank for rank, count in enumerate(counts) if count])
    kill = faults.Kill(1 + dice.randrange(counts[rank]), rank, dice.random() < 0.5)
    folder = folder_of(NAME, seed, work) / "run"
    run = _run(work, layout, folder, kind, kill, faults.Counters())
    killed = forked.call(run, LIMIT_SECONDS)
    label = f"{layout}, {'inside a save' if kind == 'disk' else 'anywhere'}"
    if killed.timed_out:
        return Outcome(label, f"rank {kill.rank} was killed, and the others hang")
    if killed.status == 0 and kind == "disk":  # the count of calls varies a little
        return Outcome(label, "nobody was killed")
    wanted = tiny.unbroken(work, layout)
    fault = broken_file(folder, wanted) or too_much(folder, wanted)
    if fault:
        return Outcome(label, f"after the kill: {fault}")
    return after(label, resumed(work, layout, folder), layout)


def after(label: str, fault: str, layout: str) -> Outcome:
    """Of a case that was resumed.

    A first save of a file a rank that did not end left nothing to resume from, and the same
    command may not remove what could be all that is left of a run.
    """
    if layout == "file a rank" and "of 2 is missing" in fault:
        return Outcome(f"{label}, in its first save: the next run says what to do")
    return Outcome(label, fault)


def resumed(work: Path, layout: str, folder: Path) -> str:
    """Run the command again, to its end: how it differs from the unbroken run; empty: nowhere."""
    ended = forked.call(train(work, layout, folder), LIMIT_SECONDS)
    if ended.status != 0:
        return f"the next run ended with {ended.status}: {ended.error or ended.tail}"
    left = sorted(p.name for p in folder.rglob("*") if p.name.endswith((".tmp", ".part")))
    if left:
        return f"the next run left {', '.join(left)}"
    return tiny.difference(tiny.content(folder), _content(tiny.unbroken(work, layout)))


@functools.cache
def _content(folder: Path) -> dict:
    return tiny.content(folder)


def broken_file(folder: Path, wanted: Path) -> str:
    """What is wrong with a file under a checkpoint's name: each is that of an update, whole."""
    if found := unreadable(folder):
        return found
    for path in sorted(folder.glob("*.pt")):
        values = tiny.values(path)
        updates = values["/optimizer_history/0/num_updates"]
        name = path.name.replace("checkpoint_last", f"checkpoint_1_{updates}")
        if name in _content(wanted):
            found = tiny.difference(values, _content(wanted)[name])
            if found:
                return f"{path.name}, of update {updates}: {found}"
    return ""


def unreadable(folder: Path) -> str:
    """The first checkpoint that cannot be read, or whose experts' files are not what was written;
    empty: none. Where each rank has a file, the others' may be of the save before."""
    for path in sorted(folder.glob("*.pt")):
        try:
            tiny.values(path)
            if fsdp_shards.SHARD.search(path.name) is None:
                for found in verify.faults(read_main_file("CKPT", str(path))):
                    return f"{path.name}: {found}"
        except Exception as error:
            return f"{path.name} cannot be read: {error}"
    return ""


def too_much(folder: Path, wanted: Path) -> str:
    """Whether the disk holds more than the kept checkpoints, the one that goes and the next."""
    used, usual = tiny.size(folder), tiny.size(wanted)
    return f"{used} bytes on the disk, {usual} are usual" if used > 3 * usual + 2**16 else ""
