"""Ranks and commands that need not import torch and fairseq, which takes longer than most tests.

They are forked from a process that has imported both and `tests/warm.py`, and done nothing else.
Runs in a process of their own (`Runs.start`) start, and start their ranks, as users' do.
"""

from __future__ import annotations

import functools
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch.multiprocessing

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "eval_lm", "validate", "generate", "interactive", "hydra_train")
IMPORTS = [
    *(f"fairseq_cli.{command}" for command in COMMANDS),
    "evomoe_plugin",
    "fairscale.nn.data_parallel",
    "torch._dynamo",  # by torch's optimizers
    "pytest",
    "tests.warm",
]


@functools.cache
def new_context() -> Any:
    """In place of `evomoe_plugin.launch.ranks.new_context`."""
    forkserver.set_forkserver_preload(IMPORTS)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        forkserver.ensure_running()
    return torch.multiprocessing.get_context("forkserver")
