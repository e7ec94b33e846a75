"""Save a run with sharded experts as if one rank had held them all."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from fairseq import utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from torch import Tensor

from evomoe_plugin.checkpoint import expert_files
from evomoe_plugin.checkpoint.expert_shards import (
    KEY,
    MODEL,
    OPTIMIZER,
    Entry,
    Manifest,
    ShardFile,
    insert,
    new_tag,
    replacing,
    wholes,
    with_experts,
    write_shard,
)
from evomoe_plugin.checkpoint.optimizer_layout import PARAMETER_NAMES
from evomoe_plugin.checkpoint.row_shards import gathered
from evomoe_plugin.checkpoint.sharded_experts import ShardedExperts
from evomoe_plugin.config.errors import RunFailed
from evomoe_plugin.dispatch.process_groups import ExpertGroups

# Seconds until a file that another machine wrote must be seen here.
PATIENCE = 60.0


class ExpertSave:
    """The expert files of one save. Each rank of the first replica of the experts has one.

    Rank 0 writes the main file inside `beside`, if one is due. In the end all call `finish`, in
    which the other ranks receive the file's name and write theirs.
    """

    def __init__(
        self,
        groups: ExpertGroups,
        update: int,
        tensors: Mapping[str, Tensor],
        optimizer: Mapping[str, Entry],
    ):
        self._groups, self._update = groups, update
        self._tensors, self._optimizer = tensors, optimizer
        self._is_written = False

    @contextlib.contextmanager
    def beside(self, state: dict[str, Any], path: str) -> Iterator[None]:
        """Write the expert files and add their manifest to `state`, which is written inside.

        Raises:
            RunFailed: a rank could not write, or its file is not visible here.
        """
        tag = new_tag(self._update)
        with replacing(path, tag):
            state[KEY] = self._write(path, tag).plain()
            yield

    def _write(self, path: str, tag: str) -> Manifest:
        if PathManager.path_requires_pathmanager(path):
            raise RunFailed(
                f"cannot write experts in shards to {path}, which is no folder: give "
                "--moe-ep-checkpoint consolidated"
            )
        self._is_written = True
        self._announce(os.path.abspath(path), tag)
        files = self._write_all(path, tag)
        _wait_for(os.path.join(expert_files.beside(path), tag), files)
        return Manifest(
            self._update,
            tag,
            wholes(self._tensors, self._groups.size),
            dict(self._optimizer),
            files,
        )

    def finish(self) -> None:
        """End the save on this rank."""
        if not self._is_written:
            path, tag = self._announce("", "")
            if path:
                self._write_all(path, tag)

    def _announce(self, path: str, tag: str) -> list[str]:
        """Receive the file's path and tag from rank 0; "" if none is due."""
        given = [path, tag]
        dist.broadcast_object_list(given, src=0, group=self._groups.exchange)
        return given

    def _write_all(self, path: str, tag: str) -> list[ShardFile]:
        """Each rank writes its own file; all receive all reports."""
        groups = self._groups
        try:
            own: Any = write_shard(path, tag, groups.rank, groups.size, self._tensors)
        except (RunFailed, OSError) as error:
            own = str(error)
        reports: list[Any] = [None] * groups.size
        dist.all_gather_object(reports, own, group=groups.exchange)
        for report in reports:
            if isinstance(report, str):
                raise RunFailed(report)
        return reports


def _wait_for(folder: str, files: list[ShardFile]) -> None:
    end = time.monotonic() + PATIENCE
    for file in files:
        path = os.path.join(folder, file.name)
        while not os.path.exists(path) or os.path.getsize(path) != file.bytes:
            if time.monotonic() > end:
                raise RunFailed(
                    f"{path} was written by another rank, but is not visible here: "
                    "give a --save-dir that all machines share, or "
                    "--moe-ep-checkpoint consolidated"
                )
            time.sleep(0.1)


def take(trainer: Trainer, experts: ShardedExperts) -> tuple[dict[str, Any], ExpertSave | None]:
    """What `trainer.state_dict()` would be with all experts on this rank. A collective.

    Returns:
        On rank 0 the whole state, or one without experts, which then are in the second result; on
        others what they have. The optimizer's state has an entry for each parameter, in the order
        of the model's, in whatever layout the run keeps it.
    """
    first_copy = dist.get_rank() < experts.groups.size
    is_first = dist.get_rank() == 0
    # Gathered below: fairscale's would leave out, or confuse, modules of smaller groups.
    trainer._gathered_optim_state = {}
    state = utils.move_to_cpu(trainer.state_dict())
    state.pop("fsdp_metadata", None)
    tensors = _own_weights(experts, trainer.layout.fp32_masters(trainer))
    order: dict[str, int] = {}
    optimizer: dict[str, Entry] = {}
    if "last_optimizer_state" in state:
        named, moments, values = _own_optimizer_state(trainer, experts, is_first)
        tensors.update(moments)
        order = (
            {name: i for i, name in enumerate(_optimizer_order(trainer, experts, state))}
            if is_first
            else dict.fromkeys(values, 0)
        )
        optimizer = {name: Entry(order[name], values[name]) for name in values}
        state["last_optimizer_state"] = _plain(trainer, order, named)
        state[PARAMETER_NAMES] = list(order)
    if not first_copy:
        return state, None
    if is_sharded(trainer, experts, tensors):
        return state, ExpertSave(experts.groups, trainer.get_num_updates(), tensors, optimizer)
    whole = {key: _on_first(part, experts.groups, trainer.device) for key, part in tensors.items()}
    if is_first:
        insert(state, whole, whole.__getitem__, optimizer)
    return state, None


def is_sharded(trainer: Trainer, experts: ShardedExperts, own: Mapping[str, Tensor]) -> bool:
    """Whether experts go to files of their own, by the options and the size of all of them."""
    options = trainer.cfg.model
    if options.moe_ep_checkpoint != "auto":
        return options.moe_ep_checkpoint == "sharded"
    total = experts.groups.size * sum(t.numel() * t.element_size() for t in own.values())
    return total > options.moe_ep_consolidate_below * 2**30


def _own_weights(experts: ShardedExperts, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's rows of parameters and buffers, as a plain run's checkpoint has them.

    Args:
        masters: fp32 masters of parameters in half precision, by name.
    """
    own = {}
    for prefix, layer in experts.layers.items():
        weights = _whole_on_every_rank(layer.experts)
        for name in layer.expert_names:
            key = f"{prefix}experts.{name}"
            value = masters.get(key, weights[name]).detach()
            own[f"{MODEL}/{key}"] = gathered(value).cpu()
    return own


def _whole_on_every_rank(module: torch.nn.Module) -> Mapping[str, Tensor]:
    """A state dict; fairseq's FSDP would return one on the first rank of a group only."""
    try:
        from fairscale.nn.data_parallel import FullyShardedDataParallel
    except ImportError:
        return module.state_dict()
    if isinstance(module, FullyShardedDataParallel):
        return FullyShardedDataParallel.state_dict(module)
    return module.state_dict()


def _own_optimizer_state(
    trainer: Trainer, experts: ShardedExperts, is_first: bool
) -> tuple[dict[str, dict], dict[str, Tensor], dict[str, dict]]:
    """Entries by name of all but experts, on rank 0; moments of this rank's experts, by the
    manifest's keys; and what else the optimizer keeps of experts, by name."""
    names = experts.names()
    named: dict[str, dict] = {}
    moments: dict[str, Tensor] = {}
    values: dict[str, dict] = {}
    for storage in trainer.layout.storages(trainer):
        state = trainer.optimizer.optimizer.state.get(storage.owner)
        if not state:
            continue
        flat = storage.moments(state)
        others = {key: _number(key, value) for key, value in state.items() if key not in flat}
        for name in storage.names:
            (values if name in names else named)[name] = dict(others)
        for key, own in flat.items():
            whole, _ = storage.gathered(own)
            for name, shape, begin, end in storage.pieces():
                if name not in names and not is_first:
                    continue
                part = whole[begin:end].view(shape).cpu()
                if len(storage.names) > 1:
                    part = part.clone()  # a file would hold the whole for every view of it
                if name in names:
                    moments[f"{OPTIMIZER}/{name}/{key}"] = part
                else:
                    named[name][key] = part
    return (named if is_first else {}), moments, values


def _number(key: str, value: Any) -> Any:
    """A value that is kept once for a parameter, as a plain number."""
    if not torch.is_tensor(value):
        return value
    if value.dim() == 0:
        return value.item()
    raise RunFailed(
        f"the optimizer keeps {key} of shape {tuple(value.shape)}, which cannot be "
        "sharded like experts: give --optimizer adam"
    )


def _optimizer_order(
    trainer: Trainer, experts: ShardedExperts, state: Mapping[str, Any]
) -> list[str]:
    names = trainer.layout.optimizer_layout(trainer).names
    if not trainer.layout.has_fsdp_metadata:
        return list(names)
    everything = with_experts(state["model"], dict.fromkeys(experts.names()))
    trained = set(names)
    return [name for name in everything if name in trained]


def _plain(trainer: Trainer, order: Mapping[str, int], named: Mapping[str, dict]) -> dict[str, Any]:
    """The state of an optimizer with an entry for each parameter that has been updated."""
    given = trainer.optimizer.state_dict()
    groups = [dict(given["param_groups"][0], params=list(range(len(order))))]
    entries = {order[name]: entry for name, entry in named.items()}
    return dict(given, state=dict(sorted(entries.items())), param_groups=groups)


def _on_first(own: Tensor, groups: ExpertGroups, device: torch.device) -> Tensor:
    """The rows of all ranks, on the first of them; on others their own."""
    sent = own.to(device).contiguous()
    flat = sent.view(-1).view(torch.uint8)  # backends differ in the number types they move
    parts = [torch.empty_like(flat) for _ in range(groups.size)] if groups.rank == 0 else None
    dist.gather(flat, parts, dst=0, group=groups.exchange)
    if parts is None:
        return own
    return torch.cat([part.cpu().view(own.dtype) for part in parts]).view(-1, *own.shape[1:])
