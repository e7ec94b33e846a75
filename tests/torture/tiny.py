"""Tiny runs that every part of the campaign breaks, and what their checkpoints hold."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from evomoe_plugin.checkpoint.expert_shards import KEY
from tests.end_to_end.conftest import TINY, write_text
from tests.torture import forked

UPDATES = 8
TRAINING = (
    *("--user-dir", "evomoe_plugin", "--task", "language_modeling", *TINY),
    *("--criterion", "moe_cross_entropy", "--moe-gate-loss-wt", "0.01"),
    *("--tokens-per-sample", "32", "--batch-size", "4", "--optimizer", "adam", "--lr", "0.003"),
    *("--clip-norm", "1.0", "--log-format", "json", "--log-interval", "1", "--num-workers", "0"),
    *("--no-epoch-checkpoints", "--seed", "7"),
)
SAVING = (
    *("--max-update", str(UPDATES), "--save-interval-updates", "1", "--disable-validation"),
    *("--keep-interval-updates", "2"),
)
_TWO = ("--distributed-world-size", "2")
_SHARDED = (*_TWO, "--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
_NO_DROPOUT = ("--dropout", "0", "--attention-dropout", "0")

# What a run may be made of; each saves at every update and keeps the last two.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one process": (),
    "fully sharded": _SHARDED,
    "sharded experts": (
        *(*_TWO, "--ddp-backend", "legacy_ddp", "--moe-expert-parallel-size", "2"),
        *("--moe-ep-checkpoint", "sharded"),
    ),
    "asynchronous": ("--write-checkpoints-asynchronously",),
    "fp16": ("--fp16",),
    "spawn": ("--moe-spawn-updates", "3", *_NO_DROPOUT),
    "adaptation": (
        *("--moe-gate", "top_any", "--moe-expert-count", "3", "--moe-max-experts", "5"),
        *("--moe-adapt-record-interval", "3", "--moe-adapt-window", "2", *_NO_DROPOUT),
    ),
    "file a rank": (*_SHARDED, "--use-sharded-state"),
    "spawn, fully sharded": (*_SHARDED, "--moe-spawn-updates", "3", *_NO_DROPOUT),
}


def ranks_of(layout: str) -> int:
    """The number of processes of a layout."""
    return 2 if _TWO[0] in LAYOUTS.get(layout, ()) else 1


def warm_up() -> None:
    """Import in this process what the forked ones need, without starting threads."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    for name in ("train", "eval_lm", "validate", "generate"):
        importlib.import_module(f"fairseq_cli.{name}")
    # Which building an optimizer imports: three quarters of the time of a tiny run.
    importlib.import_module("torch._dynamo")
    importlib.import_module("fairscale.nn.data_parallel")
    importlib.import_module("evomoe_plugin").register()
    gc.freeze()  # children need not copy what they never free


def data(work: Path) -> Path:
    """The folder of prepared text, made where it is missing."""
    folder = work / "data"
    if not folder.is_dir():
        part = work / "data.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_text(part)
        part.rename(folder)
    return folder


def train_arguments(text: Path, save_dir: Path, *more: object) -> list[str]:
    """Of fairseq-train."""
    return [str(text), *TRAINING, "--save-dir", str(save_dir), *map(str, more)]


def evaluation_arguments(text: Path, path: Path, *more: object) -> list[str]:
    """Of fairseq-eval-lm."""
    return [
        *(str(text), "--user-dir", "evomoe_plugin", "--task", "language_modeling"),
        *("--path", str(path), "--gen-subset", "valid", "--tokens-per-sample", "32"),
        *("--batch-size", "4", "--num-workers", "0", *map(str, more)),
    ]


def unbroken(work: Path, layout: str) -> Path:
    """The folder of a run of this layout that nothing happened to, trained where it is missing."""
    folder = work / "unbroken" / layout.replace(" ", "-").replace(",", "")
    if not folder.is_dir():
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        arguments = train_arguments(data(work), part, *SAVING, *LAYOUTS[layout])
        ended = forked.call(lambda: forked.command("train", arguments), timeout=600)
        assert ended.status == 0, ended.output[-3000:]
        part.rename(folder)
    return folder


def content(folder: Path) -> dict[str, Any]:
    """Of each checkpoint in a folder, by its file's name: its values by name, as tensors or text.

    Raises:
        Exception: a file cannot be read.
    """
    return {_name(path.relative_to(folder)): values(path) for path in sorted(_files(folder))}


def _name(path: Path) -> str:
    """Without the tag of expert files, which is drawn anew in each run."""
    tagged = path.suffix == ".safetensors"
    return str(path.parent.parent / path.name if tagged else path)


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix in (".pt", ".safetensors"):
            yield path


# Seconds, names of folders, and tags and hashes of expert files.
_OF_THE_RUN = ("previous_training_time", "cfg", "metrics", "args", KEY)


def values(path: Path) -> dict[str, Any]:
    """The values of one file, by names."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    state = torch.load(path, weights_only=False, map_location="cpu")
    state["optimizer_history"] = state["optimizer_history"][-1:]  # one more for each resume
    return dict(_flat("", state))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in _OF_THE_RUN:
                yield from _flat(f"{name}/{key}", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _flat(f"{name}/{number}", item)
    else:
        yield name, value if torch.is_tensor(value) else repr(value)


def difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The first value that differs between two results of `values` or `content`; empty: none."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other:
            return f"{name} is only in one of them"
        a, b = one[name], other[name]
        if isinstance(a, dict):
            found = difference(a, b)
            if found:
                return f"{name}: {found}"
        elif torch.is_tensor(a) and torch.is_tensor(b):
            if a.dtype != b.dtype or not torch.equal(a.nan_to_num(), b.nan_to_num()):
                return f"{name} differs"
        elif str(a) != str(b):
            return f"{name} is {str(a)[:60]} and {str(b)[:60]}"
    return ""


def size(folder: Path) -> int:
    """Bytes on the disk; of hard links once."""
    found = {p.stat().st_ino: p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file()}
    return sum(found.values())
