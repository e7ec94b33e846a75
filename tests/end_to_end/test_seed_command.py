"""EvoMoE's own command line, as shipped in examples/, at small dimensions on two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import Run, load

ROOT = Path(__file__).parents[2]
SMALL = (
    "--decoder-layers",
    "2",
    "--decoder-embed-dim",
    "32",
    "--decoder-ffn-embed-dim",
    "64",
    "--decoder-attention-heads",
    "2",
)


def start(folder, data_bin, binaries):
    """The script with its options; the programs that it starts are looked up in `binaries`."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    process = subprocess.run(
        ["bash", ROOT / "examples/pretraining/train.sh", *SMALL],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=400,
        env={
            **os.environ,
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": "1",
            "DATA_PATH": str(data_bin),
            "CHECKPOINT_PATH": str(folder / "checkpoints"),
            "LOG_PATH": str(folder / "train.log"),
            "GPUS": "2",
            "MASTER_PORT": str(port),
            "MAX_UPDATES": "8",
            "CHECKPOINT_FREQUENCY": "4",
            "TOKENS_PER_SAMPLE": "32",
            "BATCH_SIZE": "2",
            "WARMUP_STEPS": "2",
            "LOG_INTERVAL": "1",
            "NUM_WORKERS": "0",
        },
    )
    assert process.returncode == 0, process.stdout[-6000:]
    return process


@pytest.fixture(scope="module", params=["forked", pytest.param("started", marks=pytest.mark.slow)])
def finished(request, data_bin, run_command, tmp_path_factory):
    """The run's folder and output, and the script's output.

    Forked, the script starts a program that keeps its arguments and says a word, and they are run.
    """
    folder = tmp_path_factory.mktemp("seed-command")
    if request.param == "started":
        process = start(folder, data_bin, Path(sys.executable).parent)
        return folder, Run(process), process.stdout
    stub, kept = folder / "bin/fairseq-train", folder / "arguments.json"
    stub.parent.mkdir()
    stub.write_text(
        f"#!{sys.executable} -S\nimport json, sys\n"
        f"json.dump(sys.argv[1:], open({str(kept)!r}, 'w'))\nprint('words', file=sys.stderr)\n"
    )
    stub.chmod(0o755)
    process = start(folder, data_bin, stub.parent)
    return folder, run_command("train", *json.loads(kept.read_text())), process.stdout


def test_it_trains_an_moe_model_to_the_end(finished):
    _, run, _ = finished
    assert "1 of 2 layers, gate dense_to_sparse, experts per layer 16" in run.output
    assert [record["num_updates"] for record in run.logged("train_inner")] == list(range(1, 9))
    assert run.logged("valid")[-1]["valid_num_updates"] == 8
    assert "gate losses are not added" in run.output  # its criterion is plain cross_entropy


def test_checkpoints_are_complete_and_linked(finished):
    checkpoints = finished[0] / "checkpoints"
    numbered = checkpoints / "checkpoint_1_8.pt"
    assert (checkpoints / "checkpoint_1_4.pt").is_file()
    last = checkpoints / "checkpoint_last.pt"
    assert last.is_symlink() and last.resolve() == numbered.resolve()
    state = load(last)["model"]
    assert state["decoder.layers.1.moe.experts.fc1_weight"].shape == (16, 64, 32)
    assert not [path for path in checkpoints.iterdir() if "tmp" in path.name]


def test_the_log_is_kept(finished):
    folder, _, printed = finished
    assert (folder / "train.log").read_text() == printed != ""
