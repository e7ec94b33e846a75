"""Check that all ranks run the same code with the same options: else they train different models,
or wait for each other."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fairseq
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import evomoe_plugin
from evomoe_plugin.config.errors import OptionError, RunFailed

# Of a machine or a rank: names of ranks and ports, folders, and what only logs.
_OWN = frozenset(
    """
    distributed_rank device_id distributed_init_method distributed_port distributed_num_procs
    distributed_no_spawn nprocs_per_node data save_dir log_file log_interval log_format
    no_progress_bar tensorboard_logdir wandb_project aim_repo aim_run_hash user_dir num_workers
    data_buffer_size plasma_path path results_path
    """.split()
)


def check_same_everywhere(cfg: Any) -> None:
    """Compare this rank's code and options with those of the other ranks, of which all call this.

    Raises:
        OptionError: an option has another value on a rank.
        RunFailed: a rank has other code, torch or fairseq.
    """
    own = {
        "code": _code(),
        "options": dict(_options(OmegaConf.to_container(cfg, enum_to_str=True))),
    }
    text = json.dumps(own, default=str, sort_keys=True)
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    everything: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everything, text)
    first, *others = (json.loads(each) for each in everything)
    for rank, other in enumerate(others, 1):
        if other["code"] != first["code"]:
            found = ", ".join(f"{name} {version}" for name, version in other["code"].items())
            wanted = ", ".join(first["code"].values())
            raise RunFailed(
                f"rank {rank} has other code than rank 0: {found}, not {wanted}: install the same "
                "on all machines"
            )
        for name in sorted(first["options"].keys() | other["options"].keys()):
            values = first["options"].get(name), other["options"].get(name)
            if values[0] != values[1]:
                raise OptionError(
                    name.rpartition(".")[2],
                    f"{values[1]} on rank {rank}",
                    f"it is {values[0]} on rank 0: give the same on all ranks",
                )


def _code() -> dict[str, str]:
    digest = hashlib.sha256()
    folder = Path(evomoe_plugin.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return {
        "evomoe_plugin": f"{evomoe_plugin.__version__} ({digest.hexdigest()[:8]})",
        "torch": torch.__version__,
        "fairseq": fairseq.__version__,
    }


def _options(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, argparse.Namespace):  # of a model without a dataclass
        value = vars(value)
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _OWN:
                yield from _options(item, f"{prefix}{name}.")
    else:
        yield prefix.rstrip("."), value
