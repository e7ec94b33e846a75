"""What a run left behind: its log and its checkpoints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import eval_lm


class Run:
    """A finished command."""

    def __init__(self, process: subprocess.CompletedProcess):
        self.status = process.returncode
        self.output = process.stdout

    def logged(self, tag: str) -> list[dict]:
        """The JSON records of `train_inner`, `train` or `valid`."""
        pattern = rf"\| {tag} \| (\{{.*\}})$"
        found = re.findall(pattern, self.output, re.M)
        return [{k: _number(v) for k, v in json.loads(record).items()} for record in found]


def _number(text):
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def load(path) -> dict:
    """A checkpoint file; ours, so it may hold objects."""
    return torch.load(path, weights_only=False, map_location="cpu")


def copy_as_last(folder: Path, update: int, to: Path) -> None:
    """Copy all files of the checkpoint of an update, for a run in `to` to resume from."""
    to.mkdir(exist_ok=True)
    files = list(folder.glob(f"checkpoint_*_{update}[.-]*"))
    assert files
    for file in files:
        copy = to / re.sub(rf"checkpoint_\d+_{update}(?=[.-])", "checkpoint_last", file.name)
        shutil.copytree(file, copy) if file.is_dir() else shutil.copy(file, copy)


def assert_same_weights(one, other, atol: float = 0.0) -> None:
    """Equal names and values of two checkpoints' models.

    With a tolerance, biases of keys are left out: the softmax of attention does not see them, so
    their gradient is rounding noise, which Adam blows up to steps of full size.
    """
    one, other = load(one)["model"], load(other)["model"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        if atol and name.endswith("k_proj.bias"):
            continue
        value, wanted = (
            v.view(torch.float64) if name.endswith("_bits") else v.double()
            for v in (value, other[name])
        )
        difference = (value - wanted).abs().max().item()
        assert difference <= atol, f"{name} differs by {difference}"


def evaluate(data_bin, path, *given) -> dict:
    """What `fairseq-eval-lm` returns, unrounded: loss in base 2 and perplexity."""
    parser = options.get_eval_lm_parser()
    args = options.parse_args_and_arch(
        parser,
        [
            str(data_bin),
            "--user-dir",
            "evomoe_plugin",
            "--task",
            "language_modeling",
            "--path",
            str(path),
            "--gen-subset",
            "valid",
            "--tokens-per-sample",
            "32",
            "--num-workers",
            "0",
            *given,
        ],
    )
    return eval_lm.main(convert_namespace_to_omegaconf(args))
