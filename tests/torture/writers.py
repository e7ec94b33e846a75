"""Commands that write, on a disk that is full, read-only or broken: one line names the path, no
final name has half of a file, what was there stays, and the command succeeds later."""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import json
import os
import random
import resource
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture import disks, faults, forked, tiny
from tests.torture.harness import Outcome, folder_of

NAME, TITLE, CASES, DRAW = "writers", "Other writers", 60, 1

LIMIT_SECONDS = 900
KINDS = ("full", "read-only", "a file's limit", "write", "fsync", "rename")
_ERRORS = {
    "write": ("write", "open", "mkdir"),
    "fsync": ("fsync",),
    "rename": ("replace", "rename"),
}
_ROOM = 64 * 2**20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x20000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 0x4000, 0x40000


@dataclass(frozen=True)
class Writer:
    """A command of `evomoe`.

    Attributes:
        reads: the inputs that are made for it.
        arguments: with the folder of inputs and the folder to write to.
        flag: to replace what is there; None: there is none; empty: it does anyway.
        continues: whether a hidden folder may stay, from which the next run goes on.
    """

    reads: str
    arguments: Callable[[Path, Path], list[object]]
    flag: str | None = "--overwrite"
    continues: bool = False

    def command(self, inputs: Path, out: Path, replaces: bool) -> Callable[[], Any]:
        from evomoe_plugin.cli import main

        given = [*self.arguments(inputs, out), *([self.flag] if replaces and self.flag else [])]
        return lambda: sys.exit(main([str(a) for a in given]))


WRITERS = {
    "prepare": Writer(
        "text.txt",
        lambda i, o: [
            *("prepare", i / "text.txt", "--out", o / "data", "--vocab-size", 300),
            *("--documents-by", "blank-line", "--workers", 1),
        ],
        continues=True,
    ),
    "prepare --pairs": Writer(
        "pairs.en",
        lambda i, o: [
            *("prepare", "--pairs", i / "pairs.en", i / "pairs.de", "--out", o / "data"),
            *("--vocab-size", 300, "--workers", 1),
        ],
        continues=True,
    ),
    "export": Writer("one.pt", lambda i, o: ["export", i / "one.pt", o / "model"], None),
    "reshard": Writer(
        "one.pt", lambda i, o: ["checkpoint", "reshard", i / "one.pt", o / "a.pt", "--size", 2]
    ),
    "consolidate": Writer(
        "two.pt", lambda i, o: ["checkpoint", "consolidate", i / "two.pt", o / "a.pt"]
    ),
    "import": Writer(
        "model-shared.pt", lambda i, o: ["checkpoint", "import", i / "model-shared.pt", o / "a.pt"]
    ),
    "import-hf": Writer("llama", lambda i, o: ["import-hf", i / "llama", o / "a.pt"]),
    "upcycle": Writer(
        "llama", lambda i, o: ["upcycle", i / "llama", o / "a.pt", "--max-update", 100]
    ),
    "report": Writer(
        "train.log", lambda i, o: ["report", i / "train.log", "--out", o / "a.html"], ""
    ),
    "plot": Writer("train.log", lambda i, o: ["plot", i / "train.log", "--out", o / "a.png"], ""),
}


def smoke() -> Iterable[int]:
    """A failing rename, of `evomoe import`."""
    return (list(WRITERS).index("import") + len(WRITERS) * KINDS.index("rename"),)


def prepare(work: Path) -> None:
    tiny.data(work)


def inputs(work: Path, name: str) -> Path:
    """The folder with what a command reads, made where it is missing."""
    folder = work / "inputs"
    for needed, make in _INPUTS.items():
        if needed == WRITERS[name].reads and not (folder / needed).exists():
            folder.mkdir(parents=True, exist_ok=True)
            ended = forked.call(functools.partial(make, work, folder), LIMIT_SECONDS)
            assert ended.status == 0, ended.output[-2000:]
    return folder


def _text(work: Path, folder: Path) -> None:
    from tests.data.texts import words

    (folder / "text.txt").write_text("\n\n".join(words(n) for n in range(20)))


def _pairs(work: Path, folder: Path) -> None:
    from tests.data.texts import words

    for language in ("de", "en"):
        lines = (words(n, 10).replace("\n", " ") for n in range(100))
        (folder / f"pairs.{language}").write_text("\n".join(lines))


def _branch(work: Path, folder: Path) -> None:
    from tests.evolve.test_import_moe_branch import theirs

    theirs(folder)


def _llama(work: Path, folder: Path) -> None:
    from tests.models.hf_models import save_hf

    save_hf(folder / "llama", "llama 2")


def _log(work: Path, folder: Path) -> None:
    arguments = tiny.train_arguments(tiny.data(work), folder / "run", *tiny.SAVING)
    ended = forked.call(lambda: forked.command("train", arguments), LIMIT_SECONDS)
    (folder / "train.log").write_text(ended.output)


def _checkpoint(name: str, layout: str) -> Callable[[Path, Path], None]:
    def make(work: Path, folder: Path) -> None:
        (folder / name).symlink_to(tiny.unbroken(work, layout) / "checkpoint_last.pt")

    return make


_INPUTS: dict[str, Callable[[Path, Path], None]] = {
    "text.txt": _text,
    "pairs.en": _pairs,
    "model-shared.pt": _branch,
    "llama": _llama,
    "train.log": _log,
    "one.pt": _checkpoint("one.pt", "one process"),
    "two.pt": _checkpoint("two.pt", "sharded experts"),
}


def moments(work: Path, name: str) -> tuple[int, int, list]:
    """How often a command changes files, the bytes that it writes, and its files by `_sizes`."""
    file = work / "moments" / f"{name}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        out, counters = work / "moments" / name, faults.Counters()
        out.mkdir()

        def run() -> None:
            faults.watch_disk(out, None, counters)
            WRITERS[name].command(inputs(work, name), out, False)()

        ended = forked.call(run, LIMIT_SECONDS)
        assert ended.status == 0, ended.output[-2000:]
        file.write_text(json.dumps([counters.values()[0], tiny.size(out), _sizes(out)]))
    count, size, files = json.loads(file.read_text())
    return count, size, files


def _sizes(folder: Path) -> list[list]:
    """Names, without tags of folders, and sizes."""
    return sorted([p.name, p.stat().st_size] for p in folder.rglob("*") if p.is_file())


def case(seed: int, work: Path) -> Outcome:
    dice = random.Random(seed)
    name = list(WRITERS)[seed % len(WRITERS)]
    kind = KINDS[seed // len(WRITERS) % len(KINDS)]
    replaces = WRITERS[name].flag is not None and dice.random() < 0.5
    at = dice.random()
    moments(work, name)
    folder = folder_of(NAME, seed, work) / "out"
    folder.mkdir()
    ended = forked.call(lambda: _struck(work, name, kind, replaces, at, folder), LIMIT_SECONDS)
    label = f"{kind}, {name}{', in place of an older one' if replaces else ''}"
    if ended.status != 0:
        return Outcome(label, f"the case ended with {ended.status}: {ended.tail}")
    came, fault = ended.value
    return Outcome(f"{label}: {came}", fault)


def _struck(
    work: Path, name: str, kind: str, replaces: bool, at: float, out: Path
) -> tuple[str, str]:
    """What came of the command, and what should not have."""
    writer = WRITERS[name]
    count, size, files = moments(work, name)
    if kind in ("full", "read-only"):
        _mount(out, f"size={_ROOM}")
    if replaces:
        first = forked.call(writer.command(inputs(work, name), out, False), LIMIT_SECONDS)
        assert first.status == 0, first.output[-500:]
    before = _content(out, writer)
    command = writer.command(inputs(work, name), out, replaces)
    fault = None
    if kind == "full":
        used = os.statvfs(out).f_blocks - os.statvfs(out).f_bfree
        pages = 1 + int(at * size / 4096)
        _mount(out, f"size={4096 * (used + pages)}", _MS_REMOUNT)
    elif kind == "read-only":
        _mount(out, "", _MS_REMOUNT | _MS_RDONLY)
    elif kind in _ERRORS:
        number = 1 + int(at * count)
        fault = faults.Error(number, 0, errno.EIO, _ERRORS[kind], lasting=False)

    def run() -> None:
        if fault is not None:
            faults.watch_disk(out, fault, faults.Counters())
        elif kind == "a file's limit":
            most = 1 + int(at * size / 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        command()

    ended = forked.call(run, LIMIT_SECONDS)
    came = "went on" if ended.status == 0 else "ended in one line"
    if problem := disks.verdict(ended):
        return came, problem
    if ended.status != 0:
        if str(out) not in ended.error:
            return came, f"it does not name what could not be written: {ended.error}"
        # A folder that cannot be flushed after the rename has the new file, which is whole.
        if _content(out, writer) != before and not (kind == "fsync" and _sizes(out) == files):
            changed = set(before.items()) ^ set(_content(out, writer).items())
            return came, f"it left {', '.join(sorted({path for path, _ in changed}))}"
    if kind in ("full", "read-only"):
        _mount(out, f"size={_ROOM}", _MS_REMOUNT)
    written = bool(_content(out, writer))
    if written and writer.flag is None:
        return came, ""
    again = writer.command(inputs(work, name), out, written)
    last = forked.call(again, LIMIT_SECONDS)
    return came, "" if last.status == 0 else f"the next run ended with: {last.error or last.tail}"


def _content(folder: Path, writer: Writer) -> dict[str, str]:
    """Digests of the files in a folder, by their path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not (writer.continues and name.startswith(".data.preparing")):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _mount(folder: Path, options: str, flags: int = 0) -> None:
    """Mount a disk in memory, which only this process and its children see, or change it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not flags & _MS_REMOUNT:
        user = os.getuid()
        if libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if user else 0)):
            raise OSError(ctypes.get_errno(), "unshare")
        if user:
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        _call_mount(libc, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    _call_mount(libc, b"none", os.fsencode(folder), b"tmpfs", flags, options.encode())


def _call_mount(libc: ctypes.CDLL, *arguments: Any) -> None:
    if libc.mount(*arguments):
        raise OSError(ctypes.get_errno(), "mount")
