"""Reading a checkpoint: data only, whole, and fairseq's; anything else ends in one line."""

from __future__ import annotations

import pickle
import re
import zipfile
from typing import Any, BinaryIO

import torch
from fairseq import checkpoint_utils
from torch.serialization import safe_globals

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import ModuleView, Patch
from evomoe_plugin.patches.safe_pickles import allowed_globals


def needed() -> str | None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6):
        return f"torch {torch.__version__} loads only weights by default"
    return "unreadable files are explained"


def load(file: BinaryIO, map_location: Any = None, mapped: bool = False) -> dict:
    """`torch.load` as `checkpoint_utils` shall see it.

    Args:
        mapped: whether tensors are read when they are looked at, if the file is of the kind.
    Raises:
        OptionError: naming the file, and what is wrong with it.
    """
    try:
        with safe_globals(allowed_globals()):
            if mapped and zipfile.is_zipfile(file.name):
                state = torch.load(file.name, map_location=map_location, weights_only=True,
                                   mmap=True)
            else:
                state = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise OptionError("checkpoint", file.name, _unpickling_reason(str(error))) from error
    except Exception as error:  # a damaged file can lead the unpickler anywhere
        first_line = str(error).split("\n")[0]
        raise OptionError("checkpoint", file.name,
                          f"cannot be read, it is cut short or no checkpoint ({first_line}); "
                          "take an earlier one") from error
    if not isinstance(state, dict) or "model" not in state:
        raise OptionError("checkpoint", file.name,
                          "is a file of torch, but no checkpoint of fairseq (it has no 'model')")
    return state


def _unpickling_reason(message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return "cannot be read, it is cut short or no checkpoint; take an earlier one"
    return (f"holds {found[1]}, which is not data and could run a program: refused; if you trust "
            f"the file, load it with torch.load(…, weights_only=False) and save it without that")


def apply() -> None:
    checkpoint_utils.torch = ModuleView(torch, load=load)


PATCH = Patch(
    name="checkpoint-reading",
    broken="checkpoints with an argparse.Namespace or a numpy number are not loaded by torch >= "
           "2.6, and unreadable ones end in a traceback",
    upstream="fairseq/checkpoint_utils.py: load_checkpoint_to_cpu, load_ema_from_checkpoint",
    remove_when="fairseq lists what its checkpoints hold as safe",
    needed=needed,
    apply=apply,
)
