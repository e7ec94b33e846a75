"""Tiny runs of fairseq's own commands, in this process where that will do.

Starting Python and importing fairseq takes longer than training these models, so `Runs.run` calls
the command's entry point here; ranks are spawned by it as ever. `Runs.start` is for what only a
process of its own shows: exit statuses, signals, what is printed.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[1]

# Ranks share few cores; a test that hangs must end.
os.environ.setdefault("OMP_NUM_THREADS", "1")
TIMEOUT = 300

MODEL = """--task language_modeling --arch transformer_lm --decoder-layers 2 --decoder-embed-dim 32
--decoder-input-dim 32 --decoder-output-dim 32 --decoder-ffn-embed-dim 64
--decoder-attention-heads 2 --share-decoder-input-output-embed --tokens-per-sample 32
--dropout 0 --criterion cross_entropy""".split()
TRAINING = """--batch-size 4 --optimizer adam --adam-betas (0.9,0.98) --weight-decay 0.1 --lr 0.005
--clip-norm 1.0 --log-format json --log-interval 1 --seed 7 --num-workers 0
--no-epoch-checkpoints""".split()
SCHEDULE = "--lr-scheduler polynomial_decay --warmup-updates 3 --total-num-update 50".split()


@dataclass
class Result:
    """What a run left: exit status, its log's JSON lines, its folder."""

    status: int
    log: list[dict]
    folder: Path

    def losses(self, after: int = 0) -> dict[int, tuple[str, str]]:
        """(loss, gradient norm) as printed, by update, of updates later than `after`."""
        return {
            int(line["num_updates"]): (line["loss"], line["gnorm"])
            for line in self.log
            if "num_updates" in line and int(line["num_updates"]) > after
        }

    def checkpoint(self, name: str = "checkpoint_last.pt") -> dict:
        return torch.load(self.folder / name, weights_only=False)


class Runs:
    """Runs fairseq's commands on a tiny data set, each in a folder of its own."""

    def __init__(self, data: Path, folder: Path):
        self.data, self.folder = data, folder

    def arguments(
        self, folder: Path, *extra: object, world: int = 1, updates: int = 6, validate: bool = False
    ) -> list:
        return [
            str(self.data),
            "--user-dir",
            str(ROOT / "evomoe_plugin"),
            *MODEL,
            *TRAINING,
            *([] if "--lr-scheduler" in extra else SCHEDULE),
            "--save-dir",
            str(folder),
            "--log-file",
            str(folder / "log"),
            "--distributed-world-size",
            str(world),
            "--max-update",
            str(updates),
            *([] if validate else ["--disable-validation"]),
            *map(str, extra),
        ]

    def train(self, name: str, *extra: object, **more: object) -> Result:
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "log").unlink(missing_ok=True)
        status = self.run("train", *self.arguments(folder, *extra, **more))
        lines = (folder / "log").read_text().splitlines() if (folder / "log").exists() else []
        return Result(status, [json.loads(x) for x in lines if x.startswith('{"')], folder)

    def run(self, command: str, *arguments: object) -> int:
        """The exit status of `fairseq-COMMAND ARGUMENTS…`, run in this process."""
        module = importlib.import_module(f"fairseq_cli.{command.replace('-', '_')}")
        before, level = sys.argv, logging.getLogger().level
        sys.argv = [f"fairseq-{command}", *map(str, arguments)]
        logging.getLogger().setLevel(logging.INFO)
        _forget_run()  # of other tests too
        try:
            # It removes every other handler of the root logger, pytest's too.
            with mock.patch.object(module, "reset_logging", create=True):
                module.cli_main()
        except SystemExit as end:
            return int(end.code or 0)
        finally:
            sys.argv = before
            logging.getLogger().setLevel(level)
            _forget_run()
        return 0

    def start(self, command: str, *arguments: object, **more: object) -> subprocess.Popen:
        """`LAUNCHER -m fairseq_cli.COMMAND` in a process of its own, its output piped."""
        launcher = more.pop("launcher", [sys.executable])
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            **more.pop("env", {}),
        }
        return subprocess.Popen(
            [*launcher, "-m", f"fairseq_cli.{command}", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            **more,
        )

    def output(self, command: str, *arguments: object, **more: object) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) of such a process."""
        process = self.start(command, *arguments, **more)
        try:
            out, err = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            pytest.fail(f"hangs: {out[-2000:]}{err[-2000:]}")
        return process.returncode, out, err


def _forget_run() -> None:
    """What fairseq keeps from one run to the next in a process: meant for one run only."""
    from fairseq import checkpoint_utils

    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    for name in ("fairseq_cli.train", "fairseq.logging.progress_bar"):
        logger = logging.getLogger(name)
        for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:
            logger.removeHandler(handler)
            handler.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A binarised language of 60 words, each of which tells much about the next."""
    text, data = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("data") / "bin"
    dice = random.Random(0)
    for split, count in (("train", 300), ("valid", 30), ("test", 30)):
        lines = []
        for _ in range(count):
            word = dice.randrange(60)
            line = []
            for _ in range(dice.randrange(8, 30)):
                word = (word * 7 + dice.choice([1, 3, 11])) % 60
                line.append(f"w{word}")
            lines.append(" ".join(line))
        (text / split).write_text("\n".join(lines) + "\n")
    splits = [part for s in ("train", "valid", "test") for part in (f"--{s}pref", str(text / s))]
    status = Runs(data, data).run(
        "preprocess", "--only-source", *splits, "--destdir", data, "--workers", "1"
    )
    assert status == 0 and (data / "train.bin").exists()
    return data


@pytest.fixture
def runs(tiny_data: Path, tmp_path: Path) -> Runs:
    return Runs(tiny_data, tmp_path)


@pytest.fixture(scope="module")
def module_runs(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """As `runs`, for runs that several tests of a file look at."""
    return Runs(tiny_data, tmp_path_factory.mktemp("runs"))
