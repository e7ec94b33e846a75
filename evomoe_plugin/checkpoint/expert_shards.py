"""Sharded experts of a checkpoint in files of their own, one for each rank that held some.

The checkpoint's main file holds everything else, and a manifest that says what the files must be:
the checkpoint is read with all of them or not at all. Any number of ranks can read them, each its
rows.
"""

from __future__ import annotations

import contextlib
import copy
import os
import secrets
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from evomoe_plugin.checkpoint import expert_files
from evomoe_plugin.checkpoint.atomic_files import TEMPORARY, sha256, sync, write_files
from evomoe_plugin.checkpoint.tensor_files import dtype_name, num_bytes, write_tensors
from evomoe_plugin.config.errors import OptionError

KEY = "moe_experts"
"""The key of the manifest in the main file."""

MODEL, OPTIMIZER = "model", "optimizer"
VERSION = 1


@dataclass(frozen=True)
class Whole:
    """A tensor of all experts of a layer, its rows sharded over the files."""

    shape: list[int]
    dtype: str


@dataclass(frozen=True)
class ShardFile:
    """The name, size and hash of an expert file."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Entry:
    """A parameter's index in the optimizer's state, and the values kept there beside tensors."""

    index: int
    values: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """The main file's list of expert files and their contents.

    Attributes:
        update: the run's, when it was written.
        tag: the name of the files' folder.
        tensors: `model/NAME` and `optimizer/NAME/MOMENT`, NAME as in a checkpoint that holds all.
        optimizer: by NAME.
        files: one for each rank, in the order of their rows.
    """

    update: int
    tag: str
    tensors: dict[str, Whole]
    optimizer: dict[str, Entry]
    files: list[ShardFile]

    @property
    def size(self) -> int:
        """R, the ranks that the experts were sharded over."""
        return len(self.files)

    def weights(self) -> list[str]:
        """Names of parameters and buffers."""
        return [
            key.removeprefix(f"{MODEL}/") for key in self.tensors if key.startswith(f"{MODEL}/")
        ]

    def moments(self, name: str) -> list[str]:
        """Names of the optimizer's moments of a parameter."""
        prefix = f"{OPTIMIZER}/{name}/"
        return [key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix)]

    def plain(self) -> dict[str, Any]:
        """As stored in the main file: containers, strings and numbers."""
        return {"version": VERSION, **asdict(self)}


def manifest_of(state: Mapping[str, Any], path: str) -> Manifest | None:
    """The manifest in a main file's state; None if that holds the experts itself.

    Raises:
        OptionError: it is of a later version, or not what one is.
    """
    plain = state.get(KEY)
    if plain is None:
        return None
    try:
        given = dict(plain)
        if given.pop("version") != VERSION:
            raise OptionError(
                "checkpoint", path, "was written by a later version of this program: use that"
            )
        manifest = Manifest(
            update=int(given.pop("update")),
            tag=str(given.pop("tag")),
            tensors={
                str(k): Whole([int(n) for n in v["shape"]], str(v["dtype"]))
                for k, v in given.pop("tensors").items()
            },
            optimizer={
                str(k): Entry(int(v["index"]), dict(v["values"]))
                for k, v in given.pop("optimizer").items()
            },
            files=[
                ShardFile(str(f["name"]), int(f["bytes"]), str(f["sha256"]))
                for f in given.pop("files")
            ],
        )
        names = [manifest.tag, *(file.name for file in manifest.files)]
        fits = manifest.files and all(
            whole.shape
            and whole.shape[0] % manifest.size == 0
            and isinstance(getattr(torch, whole.dtype, None), torch.dtype)
            for whole in manifest.tensors.values()
        )
        if (
            given
            or not fits
            or any(name != os.path.basename(name) or not name.strip(".") for name in names)
        ):
            raise ValueError("it does not fit itself")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, OptionError):
            raise
        raise OptionError(
            "checkpoint", path, f"its list of experts is invalid ({error}): take an earlier one"
        ) from error
    return manifest


def file_name(rank: int, size: int) -> str:
    """The name of the file of rank `rank` of `size`."""
    return f"{rank:05d}-of-{size:05d}.safetensors"


def write_shard(
    path: str, tag: str, rank: int, size: int, tensors: Mapping[str, Tensor]
) -> ShardFile:
    """Write the rows of one rank beside the main file `path`, which may not exist yet.

    Args:
        tensors: by the names of a manifest's, each with 1 / `size` of its rows.
    Raises:
        RunFailed: the disk is full or cannot be written.
    """
    folder = os.path.join(expert_files.beside(path), tag)
    os.makedirs(folder, exist_ok=True)
    sync(os.path.dirname(folder))
    name = file_name(rank, size)
    full = os.path.join(folder, name)
    metadata = {"format": "pt", "tag": tag, "rank": str(rank), "size": str(size)}
    write_files({full: lambda file: write_tensors(file.name, tensors, metadata)})
    return ShardFile(name, os.path.getsize(full), sha256(full))


def new_tag(update: int) -> str:
    """A new tag for a checkpoint that is about to be written."""
    return f"u{update}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def replacing(path: str, tag: str) -> Iterator[None]:
    """Inside, write experts with `tag`, then the main file `path`. On exit the earlier experts are
    removed; on an error, the new ones."""
    try:
        yield
    except BaseException:
        shutil.rmtree(os.path.join(expert_files.beside(path), tag), ignore_errors=True)
        raise
    expert_files.keep_only(path, [tag])


def wholes(tensors: Mapping[str, Tensor], size: int) -> dict[str, Whole]:
    """A manifest's tensors, from those that one of `size` ranks writes."""
    return {
        name: Whole([len(t) * size, *t.shape[1:]], dtype_name(t.dtype))
        for name, t in tensors.items()
    }


class ExpertShards:
    """The experts beside a checkpoint.

    Every file must be there, with its number of bytes, and no other; one that is read must have
    its hash, which costs reading it once more.

    Args:
        path: the main file, as it is named to the user.
        check: whether the files must be there now; else `faults_of_folder` reports.
    Raises:
        OptionError: naming the file that is missing, or is none of them, or has changed.
    """

    def __init__(self, path: str, manifest: Manifest, check: bool = True):
        self.path, self.manifest = path, manifest
        self.folder = os.path.join(expert_files.of(path), manifest.tag)
        for fault in self.faults_of_folder() if check else ():
            raise self._error(fault)
        self._open: dict[int, Any] = {}

    def faults_of_folder(self) -> Iterator[str]:
        """Faults of names and sizes."""
        wanted = {file.name: file for file in self.manifest.files}
        try:
            found = {
                entry.name: entry.stat().st_size
                for entry in os.scandir(self.folder)
                if not entry.name.endswith(TEMPORARY)
            }
        except OSError:
            found = {}
        for rank, (name, file) in enumerate(wanted.items()):
            full = os.path.join(self.folder, name)
            if name not in found:
                yield f"shard {rank} of {self.manifest.size} is missing: {full}"
            elif found[name] != file.bytes:
                yield f"{full} has {found[name]} bytes, {file.bytes} were written: it is cut short"
        for name in sorted(found.keys() - wanted.keys()):
            yield f"{os.path.join(self.folder, name)} is no part of it: move it away"

    def faults_of_file(self, rank: int) -> Iterator[str]:
        """Faults of a file's content."""
        file = self.manifest.files[rank]
        full = os.path.join(self.folder, file.name)
        if sha256(full) != file.sha256:
            yield f"{full} has been altered: its sha256 is not the one that was written"
            return
        try:
            with safe_open(full, "pt") as opened:
                found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                shapes = {name: list(part.get_shape()) for name, part in found.items()}
        except SafetensorError as error:
            yield f"{full} is no file of safetensors ({error})"
            return
        for name, whole in self.manifest.tensors.items():
            rows = [whole.shape[0] // self.manifest.size, *whole.shape[1:]]
            if name not in shapes:
                yield f"{full} has no {name}"
            elif shapes[name] != rows:
                yield f"{full} has {name} of shape {shapes[name]}, which should be {rows}"
        for name in sorted(shapes.keys() - self.manifest.tensors.keys()):
            yield f"{full} has {name}, which does not belong to it"

    def _error(self, fault: str) -> OptionError:
        return OptionError(
            "checkpoint", self.path, f"{fault}; if it cannot be put right, take another checkpoint"
        )

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            for fault in self.faults_of_file(rank):
                raise self._error(fault)
            full = os.path.join(self.folder, self.manifest.files[rank].name)
            self._open[rank] = safe_open(full, "pt")
        return self._open[rank]

    def rows(self, key: str, rows: slice | None = None) -> Tensor:
        """Rows of one of the manifest's tensors; None: all. Reads only the files that hold them."""
        whole = self.manifest.tensors[key]
        wanted = range(whole.shape[0])[rows or slice(None)]
        held = whole.shape[0] // self.manifest.size
        value = torch.empty(len(wanted), *whole.shape[1:], dtype=getattr(torch, whole.dtype))
        for rank in range(self.manifest.size):
            first = rank * held
            begin, end = max(wanted.start, first), min(wanted.stop, first + held)
            if begin < end:
                part = self._file(rank).get_slice(key)[begin - first : end - first]
                value[begin - wanted.start : end - wanted.start] = part
        return value

    def rows_of_file(self, key: str, rank: int) -> Tensor:
        """The rows of one of the manifest's tensors in a file."""
        return self._file(rank).get_tensor(key)


def merge(
    state: dict[str, Any],
    shards: ExpertShards,
    rows_of: Callable[[int], slice] | None = None,
    with_optimizer: bool = True,
) -> None:
    """Insert experts into the main file's state, as a consolidated checkpoint has them.

    Args:
        rows_of: of E experts, those that are wanted; None: all.
    """
    manifest = shards.manifest

    def read(key: str) -> Tensor:
        return shards.rows(key, rows_of and rows_of(manifest.tensors[key].shape[0]))

    insert(state, manifest.tensors, read, manifest.optimizer if with_optimizer else {})
    del state[KEY]


def insert(
    state: dict[str, Any],
    keys: Iterable[str],
    tensor: Callable[[str], Tensor],
    optimizer: Mapping[str, Entry],
) -> None:
    """Insert experts into a state.

    Args:
        keys: as a manifest's tensors.
        tensor: gives that of a key.
        optimizer: entries of experts, whose moments are among the keys.
    """
    weights, moments = {}, defaultdict[str, dict[str, str]](dict)
    for key in keys:
        part, _, name = key.partition("/")
        if part == MODEL:
            weights[name] = tensor(key)
        else:
            parameter, _, moment = name.rpartition("/")
            moments[parameter][moment] = key
    state["model"] = with_experts(state["model"], weights)
    if optimizer and state.get("last_optimizer_state"):
        entries = dict(state["last_optimizer_state"]["state"])
        for name, entry in optimizer.items():
            entries[entry.index] = {
                **entry.values,
                **{moment: tensor(key) for moment, key in moments[name].items()},
            }
        state["last_optimizer_state"]["state"] = dict(sorted(entries.items()))


def with_experts(model: dict[str, Any], experts: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with experts inserted in the order of a whole model's.

    A layer lists what is its own, its gate, its experts, and its shared ones.
    """
    by_layer: dict[str, dict[str, Any]] = {}
    for name, value in experts.items():
        by_layer.setdefault(name.rpartition("experts.")[0], {})[name] = value
    last = {
        prefix: name
        for name in model
        for prefix in by_layer
        if name.startswith(prefix) and not name.startswith(f"{prefix}shared.")
    }
    missing = by_layer.keys() - last.keys()
    if missing:
        raise OptionError(
            "checkpoint",
            "with experts of its own",
            f"has no layer {sorted(missing)[0].rstrip('.')} that they are of",
        )
    after = {name: by_layer[prefix] for prefix, name in last.items()}
    result = copy.copy(model)  # keeps what state dicts have beside their entries
    result.clear()
    for name, value in model.items():
        result[name] = value
        result.update(after.get(name, {}))
    return result


def total_bytes(manifest: Manifest) -> int:
    """The size of all tensors of all experts."""
    return sum(num_bytes(whole.shape, whole.dtype) for whole in manifest.tensors.values())
