"""The Python objects that a fairseq checkpoint may hold besides tensors and plain containers.

torch >= 2.6 refuses any other, and so do we: a pickle can run a program. What is allowed here
only holds data.
"""

from __future__ import annotations

import argparse
import collections
import inspect
import pathlib
import typing
from typing import Any

import numpy as np
import omegaconf
from fairseq.dataclass import constants


def allowed_globals() -> list[Any]:
    """What `torch.serialization.safe_globals` takes: classes, functions, (function, name)."""
    return [
        argparse.Namespace,
        collections.OrderedDict,
        collections.defaultdict,
        dict,
        list,
        set,
        tuple,
        int,
        float,
        str,
        bool,
        slice,
        pathlib.PosixPath,
        pathlib.PurePosixPath,
        typing.Any,
        *_numpy(),
        *_omegaconf(),
        *(kind for kind in vars(constants).values() if inspect.isclass(kind)),
    ]


def _numpy() -> list[Any]:
    core = getattr(np, "_core", None) or np.core
    multiarray = core.multiarray
    kinds = {type(np.dtype(code)) for code in np.typecodes["All"]}
    # Files of numpy 1 and numpy 2 name the same functions by different modules.
    names = [
        (getattr(multiarray, function), f"numpy.{module}.multiarray.{function}")
        for function in ("scalar", "_reconstruct")
        for module in ("core", "_core")
    ]
    return [np.dtype, np.ndarray, *kinds, *names]


def _omegaconf() -> list[Any]:
    from omegaconf import base, nodes

    containers = [omegaconf.DictConfig, omegaconf.ListConfig]
    metadata = [base.ContainerMetadata, base.Metadata]
    values = [
        kind
        for name, kind in vars(nodes).items()
        if name.endswith("Node") and inspect.isclass(kind)
    ]
    return containers + metadata + values
