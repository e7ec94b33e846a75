"""Read fairseq checkpoints: data only, whole, and one line for whatever is wrong with a file."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.file_io import PathManager
from omegaconf import OmegaConf
from torch.serialization import safe_globals

from evomoe_plugin.checkpoint import fsdp_shards
from evomoe_plugin.checkpoint.build_model import describe
from evomoe_plugin.checkpoint.content import check_content
from evomoe_plugin.checkpoint.expert_shards import ExpertShards, manifest_of, merge
from evomoe_plugin.checkpoint.safe_pickles import allowed_globals
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.options import MoEOptions
from evomoe_plugin.dispatch.process_groups import expert_groups
from evomoe_plugin.dispatch.sharded_layers import is_expert_parameter

# The attribute of a record that stands for a folder.
_DIRECTORY = 0x10


def load_file(
    file: BinaryIO, map_location: Any = None, mapped: bool = False, tensors: bool = True
) -> dict[str, Any]:
    """`torch.load` of a checkpoint, of data only (`weights_only=True`), if its checksums are right.

    Args:
        mapped: memory-map the tensors, if the file's format allows it.
        tensors: whether values of tensors are used; else only the checksum of the rest is verified.
    Raises:
        OptionError: naming the file, and what is wrong with it.
    """
    damage = _damage(file, tensors)
    if damage is not None:
        raise OptionError(
            "checkpoint", file.name, f"has been altered: {damage}; take an earlier one"
        )
    try:
        with safe_globals(allowed_globals()):
            if mapped and zipfile.is_zipfile(file.name):
                state = torch.load(
                    file.name, map_location=map_location, weights_only=True, mmap=True
                )
            else:
                state = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise OptionError("checkpoint", file.name, _unpickling_reason(str(error))) from error
    except Exception as error:  # a damaged file can lead the unpickler anywhere
        first_line = str(error).split("\n")[0]
        raise OptionError(
            "checkpoint",
            file.name,
            f"cannot be read, it is cut short or no checkpoint ({first_line}); take an earlier one",
        ) from error
    if not isinstance(state, dict) or "model" not in state:
        raise OptionError(
            "checkpoint",
            file.name,
            "is a file of torch, but no checkpoint of fairseq (it has no 'model')",
        )
    return state


def _damage(file: BinaryIO, tensors: bool) -> str | None:
    """What is wrong with the first record of a file of torch whose CRC-32 is not the one that was
    written; None if there is none.

    torch writes checksums, but does not read them. Files of torch before 1.6 have none.

    Args:
        file: open at its start, as it is left.
        tensors: verify the records of tensors too, which reads the whole file.
    """
    part = "(its directory)"
    try:
        if not zipfile.is_zipfile(file):
            return None
        with zipfile.ZipFile(file) as records:
            for record in records.infolist():
                part = record.filename
                # Else torch would read another number of bytes than zipfile, or none.
                if (
                    record.compress_type != zipfile.ZIP_STORED
                    or record.file_size != record.compress_size
                    or record.external_attr & _DIRECTORY
                ):
                    return f"its part {part} is compressed or a folder, as torch writes none"
                if tensors or not part.rpartition("/")[0].endswith("/data"):
                    with records.open(record) as content:
                        while content.read(2**20):
                            pass
    except Exception:  # a flag or length that is wrong leads zipfile anywhere
        return f"the checksum of its part {part} is wrong"
    finally:
        file.seek(0)
    return None


def _unpickling_reason(message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return "cannot be read, it is cut short or no checkpoint; take an earlier one"
    return (
        f"holds {found[1]}, which is not data and could run a program: refused; if you trust "
        f"the file, load it with torch.load(…, weights_only=False) and save it without that"
    )


def read_state(
    path: str,
    arg_overrides: dict[str, Any] | None = None,
    load_on_all_ranks: bool = False,
    mapped: bool = False,
) -> dict[str, Any]:
    """One file's state on the CPU, in the form of today's fairseq.

    Args:
        arg_overrides: options to set in the stored configuration.
        load_on_all_ranks: whether all ranks read, not one only.
        mapped: as `load_file`.
    """
    local = _local_path(path, load_on_all_ranks)
    if os.path.exists(local) and not os.path.isfile(local):  # a pipe would never end
        raise OptionError("checkpoint", path, "is no file")
    try:
        file = open(local, "rb")
    except OSError as error:
        raise OptionError("checkpoint", path, f"cannot be read: {error.strerror}") from error
    with file:
        state = load_file(file, map_location="cpu", mapped=mapped)
    if arg_overrides and state.get("args") is not None:
        vars(state["args"]).update(arg_overrides)
    if isinstance(state.get("cfg"), Mapping):
        state["cfg"] = OmegaConf.create(state["cfg"], flags={"allow_objects": True})
        if arg_overrides is not None:
            overwrite_args_by_name(state["cfg"], arg_overrides)
    try:
        state = checkpoint_utils._upgrade_state_dict(state)
    except Exception as error:  # of what is not there
        raise OptionError(
            "checkpoint", path, f"is no checkpoint of fairseq ({describe(error)})"
        ) from error
    check_content(state, path)
    return state


def _local_path(path: str, load_on_all_ranks: bool) -> str:
    """Where a file is on this machine; of a remote one, a fresh copy."""
    local = PathManager.get_local_path(path)
    if local == path or not PathManager.path_requires_pathmanager(path):
        return local
    with contextlib.suppress(FileNotFoundError):  # another rank was first
        os.remove(local)
    if load_on_all_ranks:
        dist.barrier()
    return PathManager.get_local_path(path)


def load_checkpoint_to_cpu(
    path: str, arg_overrides: dict[str, Any] | None = None, load_on_all_ranks: bool = False
) -> dict[str, Any]:
    """In place of fairseq's `checkpoint_utils.load_checkpoint_to_cpu`: a model to evaluate.

    FSDP shards and sharded experts are put together. How training sharded the experts is no matter:
    the stored configuration says that each rank holds all of them, unless `arg_overrides` shard
    them, in which case the ranks read their own from expert files. Tensors may be memory-mapped;
    the optimizer's state of experts in files of their own is left there.

    Raises:
        OptionError: a file is missing or unreadable, weights are NaN/Inf, or `arg_overrides` shard
            the experts of a model that has none.
    """
    overrides = _unless_sharded(arg_overrides)

    def read(file: str) -> dict[str, Any]:
        return read_state(file, overrides, load_on_all_ranks, mapped=True)

    manifest = None
    if fsdp_shards.SHARD.search(path):
        state = fsdp_shards.consolidated(path, read)
        del state["fsdp_metadata"]  # it would make fairseq look for shards
    else:
        state = read(path)
        manifest = manifest_of(state, path)
    size = overrides["moe_expert_parallel_size"]
    if size > 1 and "moe_expert_parallel_size" not in ((state.get("cfg") or {}).get("model") or {}):
        raise OptionError("moe_expert_parallel_size", size, f"{path} has no experts: leave it out")
    groups, model = expert_groups(size), state["model"]
    if manifest is not None:
        own = groups.own if groups is not None else None
        merge(state, ExpertShards(path, manifest), own, with_optimizer=False)
    elif groups is not None:
        for name in filter(is_expert_parameter, list(model)):
            model[name] = model[name][groups.own(len(model[name]))]
    check_finite(state["model"], path)
    return state


# Options of a model that decide on the names and shapes of its weights.
_SHAPE = re.compile(
    r"_dim$|_layers$|_embed$|_output_dim|_heads$|_norm$|_pos$|_position|_embeddings$|_freq$|expert"
    r"|moe_(gate|scorer|shared|null|hash)|^share_|max_target_positions"
)


def _unless_sharded(arg_overrides: dict[str, Any] | None) -> dict[str, Any]:
    """Overrides by which each rank holds all experts, where they do not say otherwise."""
    whole = {
        option.name: option.default
        for option in fields(MoEOptions)
        if option.name.startswith(("moe_expert_parallel_", "moe_ep_"))
    }
    return {**whole, **(arg_overrides or {})}


def check_finite(model: Mapping[str, Any], path: str) -> None:
    """Raise `OptionError` if a weight or buffer of the checkpoint is NaN/Inf."""
    fault = next(nan_or_inf(model), None)
    if fault is not None:
        raise OptionError("checkpoint", path, f"{fault}: take an earlier one")


def nan_or_inf(tensors: Mapping[str, Any]) -> Iterator[str]:
    """One line for each tensor with NaN/Inf."""
    for name, value in tensors.items():
        is_plain = torch.is_tensor(value) and value.layout is torch.strided
        if not (is_plain and value.is_floating_point() and value.numel()):
            continue
        # Faster than counting, and without a copy: minimum and maximum propagate NaN.
        if not torch.stack(value.aminmax()).isfinite().all():
            count = value.numel() - int(value.isfinite().sum())
            yield f"{name} has {count} NaN/Inf values"


def misfit(
    filename: str, error: BaseException, saved: Mapping[str, Any] = {}, own: Any = None
) -> OptionError:
    """From torch's "Error(s) in loading state_dict", which has one line a fault.

    Args:
        saved: the options of the checkpoint's model.
        own: those of the run's.
    """
    faults = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
    first = (faults or [str(error)])[0][:300]
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    remedy = "give the architecture and options it was trained with"
    different = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in saved.items()
        if _SHAPE.search(name) and name in own and own[name] != value
    ]
    if different:
        remedy += ": " + ", ".join(different)
    if "size mismatch" in first and "embed_tokens" in first and not different:
        remedy = "give the data, and so the dictionary, that it was trained with"
    return OptionError("checkpoint", filename, f"does not fit the model: {first}{more}; {remedy}")
