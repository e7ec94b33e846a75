"""Real runs of fairseq's commands on a small synthetic text."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fairseq.data import Dictionary, indexed_dataset

from tests.end_to_end import forks
from tests.end_to_end.runs import Run
from tests.rank_server import COMMANDS

ROOT = Path(__file__).parents[2]
TINY = [
    "--arch",
    "transformer_lm_gpttiny_moe",
    "--decoder-layers",
    "2",
    "--decoder-embed-dim",
    "32",
    "--decoder-ffn-embed-dim",
    "64",
    "--decoder-attention-heads",
    "2",
    "--moe-expert-count",
    "4",
    "--share-decoder-input-output-embed",
]


@pytest.fixture(scope="session")
def data_bin(tmp_path_factory) -> Path:
    """train and valid of a first-order Markov text over 60 words."""
    folder = tmp_path_factory.mktemp("data-bin")
    write_text(folder)
    return folder


def write_text(folder: Path, train: int = 400, valid: int = 40) -> None:
    """Prepared as fairseq does, train and valid of so many sentences of 25 words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(1)
    words = [f"w{i}" for i in range(60)]
    follow = {word: rng.choices(words, k=5) for word in words}
    dictionary = Dictionary()
    for word in words:
        dictionary.add_symbol(word, n=10)
    dictionary.finalize(padding_factor=8)
    dictionary.save(str(folder / "dict.txt"))
    for split, lines in [("train", train), ("valid", valid)]:
        builder = indexed_dataset.make_builder(
            str(folder / f"{split}.bin"), impl="mmap", vocab_size=len(dictionary)
        )
        for _ in range(lines):
            sentence = [rng.choice(words)]
            while len(sentence) < 25:
                sentence.append(rng.choice(follow[sentence[-1]]))
            builder.add_item(dictionary.encode_line(" ".join(sentence), add_if_not_exist=False))
        builder.finalize(str(folder / f"{split}.idx"))


def _path() -> str:
    """The clone, and where else packages are."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def run_command():
    """Run one of fairseq's commands in a process of its own."""
    settled = {"PYTHONPATH": _path(), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}

    def run(command: str, *arguments, cwd=ROOT, check=True, timeout=300, **environment) -> Run:
        environment = {**os.environ, **settled, **environment}
        arguments = [str(argument) for argument in arguments]
        if command in COMMANDS and environment["PYTHONPATH"] == settled["PYTHONPATH"]:
            process = forks.run(command, arguments, cwd, environment, timeout)
        else:
            module = command if "." in command else f"fairseq_cli.{command}"
            process = subprocess.run(
                [sys.executable, "-m", module, *arguments],
                cwd=cwd,
                env=environment,
                text=True,
                timeout=timeout,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        if check:
            assert process.returncode == 0, process.stdout[-6000:]
        return Run(process)

    return run


@pytest.fixture(scope="session")
def train(run_command, data_bin):
    """Train a tiny model; what is given overrides or adds to these options.

    With `torchrun`, its options, it starts the processes.
    """

    def run(save_dir, *given, torchrun=None, **settings) -> Run:
        command = (
            ["train"]
            if torchrun is None
            else ["torch.distributed.run", *torchrun, "-m", "fairseq_cli.train"]
        )
        return run_command(
            *command,
            data_bin,
            "--user-dir",
            "evomoe_plugin",
            "--task",
            "language_modeling",
            *TINY,
            "--criterion",
            "moe_cross_entropy",
            "--moe-gate-loss-wt",
            "0.01",
            "--tokens-per-sample",
            "32",
            "--batch-size",
            "4",
            "--optimizer",
            "adam",
            "--lr",
            "0.003",
            "--clip-norm",
            "1.0",
            "--max-update",
            "12",
            "--log-format",
            "json",
            "--log-interval",
            "1",
            "--num-workers",
            "0",
            "--no-epoch-checkpoints",
            "--save-dir",
            save_dir,
            "--seed",
            "7",
            *given,
            **settings,
        )

    return run
