"""Checkpoints of the code before the package was laid out anew resume bit-equal with today's.

The old code comes from this repository's history, trains to a checkpoint and on to the end. Today's
code resumes a copy of that checkpoint; the end must be the same, bit for bit.
"""

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.runs import copy_as_last, load

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OLD = "3da3acd489d141b3620a92bbfef671565a4698a6"
END = 8
COMMON = (
    "--max-update",
    END,
    "--save-interval-updates",
    "2",
    "--disable-validation",
    "--weight-decay",
    "0.1",
)  # dropout is on
ANNEAL = ("--moe-temperature-updates", "6", "--moe-temperature-end", "0.1")
FP16 = ("--fp16", "--fp16-init-scale", "4")
TWO = ("--distributed-world-size", "2")
LEGACY = (*TWO, "--ddp-backend", "legacy_ddp")
SHARDED = (*TWO, "--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
EXPERTS = ("--moe-expert-parallel-size", "2", "--moe-ep-checkpoint")
SPAWN = ("--moe-spawn-updates", "3")
FROZEN = (*SPAWN, "--moe-spawn-trainable-masked", "false")
RUNS = {
    "fp32": (),
    "fp16": FP16,
    "fp16, unflattened": (*FP16, "--fp16-no-flatten-grads"),
    "fp16, memory-efficient": ("--memory-efficient-fp16", *FP16[1:]),
    "bf16": ("--bf16",),
    "fused adamw": ("--optimizer", "fused_adamw"),
    "top-any": (
        "--moe-gate",
        "top_any",
        "--moe-expert-count",
        "3",
        "--moe-max-experts",
        "6",
        "--moe-adapt-record-interval",
        "3",
        "--moe-adapt-window",
        "2",
        "--moe-top-any-learned-scale",
    ),
    "fully sharded": SHARDED,
    "fully sharded, file a rank": (*SHARDED, "--use-sharded-state"),
    "fully sharded, fp16": (*SHARDED, *FP16),
    "sharded experts": (*SHARDED, *EXPERTS, "consolidated"),
    "sharded experts, in files of their own": (*SHARDED, *EXPERTS, "sharded"),
    "sharded experts, legacy ddp": (*LEGACY, *EXPERTS, "consolidated"),
    "sharded experts, legacy ddp, in files of their own": (*LEGACY, *EXPERTS, "sharded"),
    "sharded experts, fp16": (*SHARDED, *FP16, *EXPERTS, "sharded"),
    "sharded experts, legacy ddp, fp16": (*LEGACY, *FP16, *EXPERTS, "sharded"),
    "spawned": SPAWN,
    "spawned, frozen, fp16": (*FROZEN, *FP16),
    "spawned, frozen, fully sharded": (*FROZEN, *SHARDED),
    "spawned, sharded experts": (*SPAWN, *SHARDED, *EXPERTS, "sharded"),
}
# The spawn is after update 3; adapting records updates 2 and 3.
CASES = [
    (name, update)
    for name in RUNS
    for update in ((2, 4) if name.startswith(("spawned", "top-any")) else (4,))
]


def options(name):
    return *COMMON, *(() if name == "top-any" else ANNEAL), *RUNS[name]


@pytest.fixture(scope="module")
def old_code(tmp_path_factory) -> dict:
    """What to run commands with for them to be of the old code."""
    if subprocess.run(["git", "cat-file", "-e", f"{OLD}^{{commit}}"], cwd=ROOT).returncode:
        pytest.fail(
            f"commit {OLD[:12]} is not in this clone ({ROOT}): fetch its whole history "
            "(git fetch --unshallow), so that its code can write the checkpoints"
        )
    archive = subprocess.run(
        ["git", "archive", OLD, "evomoe_plugin"], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    where = subprocess.run(
        [sys.executable, "-c", "import evomoe_plugin; print(evomoe_plugin.__file__)"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    ).stdout
    assert Path(where.strip()) == folder / "evomoe_plugin/__init__.py"
    return {"cwd": folder, "PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def old_run(old_code, train, tmp_path_factory):
    """A maker of (folder, run) of the old code."""
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            made[name] = folder, train(folder, *options(name), **old_code)
        return made[name]

    return make


ROUNDED = ("top-any",)
"""Cases whose arithmetic has another order now: of their losses over active experts."""


def assert_holds(new, old, where, atol=0.0):
    """All of `old` is in `new`: tensors of the same type and bits, equal values.

    Args:
        atol: of floating-point numbers; with it biases of keys are left out, as in
            `assert_same_weights`.
    """
    if atol and where.endswith("k_proj.bias"):
        return
    if torch.is_tensor(old):
        assert (new.dtype, new.shape) == (old.dtype, old.shape), where
        if atol and old.is_floating_point():
            torch.testing.assert_close(new, old, rtol=0, atol=atol, msg=where)
        else:
            assert torch.equal(new, old), where
    elif isinstance(old, dict):
        assert old.keys() <= new.keys(), where
        for key, value in old.items():
            assert_holds(new[key], value, f"{where}.{key}", atol)
    elif isinstance(old, (list, tuple)):
        assert len(new) == len(old), where
        for i, (one, other) in enumerate(zip(new, old, strict=True)):
            assert_holds(one, other, f"{where}.{i}", atol)
    else:
        assert new == old, where


def compared(state):
    """What a run leaves but for wall times, folders, and its history of resumptions."""
    return {
        "model": state["model"],
        "last_optimizer_state": state.get("last_optimizer_state"),
        "optimizer_history": state["optimizer_history"][-1],
        "train_iterator": state["extra_state"]["train_iterator"],
    }


def assert_same_checkpoint(new, old, atol=0.0):
    """Equal weights, optimizer state and masters in all files of the last checkpoint."""
    files = [sorted(folder.glob("checkpoint_last*.pt")) for folder in (new, old)]
    assert [path.name for path in files[0]] == [path.name for path in files[1]]
    for path, wanted in zip(*files, strict=True):
        one, other = load(path), load(wanted)
        other["model"] = {
            name.removesuffix("_bits"): value.view(torch.float64)
            if name.endswith("_bits")  # of fp64 values, which checkpoints hold now
            else value
            for name, value in other["model"].items()
        }
        assert other.keys() <= one.keys() and other["model"].keys() == one["model"].keys()
        assert_holds(compared(one), compared(other), path.name, atol)
    experts = [
        sorted(folder.glob("checkpoint_last.experts/*/*.safetensors")) for folder in (new, old)
    ]
    assert [path.name for path in experts[0]] == [path.name for path in experts[1]]
    for path, wanted in zip(*experts, strict=True):
        one, other = load_file(path), load_file(wanted)
        assert one.keys() == other.keys()
        assert_holds(one, other, path.name, atol)


@pytest.mark.parametrize("name, update", CASES)
def test_it_resumes_bit_equal(name, update, old_run, train, tmp_path):
    folder, whole = old_run(name)
    copy_as_last(folder, update, tmp_path / "new")
    resumed = train(tmp_path / "new", *options(name))
    records = resumed.logged("train_inner")
    assert [record["num_updates"] for record in records] == list(range(update + 1, END + 1))
    for record, wanted in zip(records, whole.logged("train_inner")[update:], strict=True):
        for key in ("loss", "inner_loss", "gnorm", "lr", "experts_per_token"):
            assert record[key] == wanted[key], (record["num_updates"], key)
    assert_same_checkpoint(tmp_path / "new", folder, atol=1e-6 if name in ROUNDED else 0.0)


@pytest.mark.parametrize(
    "name, update",
    [
        case
        for case in CASES
        if case[0]
        in (
            "fp32",
            "fp16",
            "fully sharded, file a rank",
            "sharded experts, in files of their own",
            "spawned",
        )
    ],
)
def test_it_evaluates_to_the_same_perplexity(
    name, update, old_run, old_code, run_command, data_bin, tmp_path
):
    copy_as_last(old_run(name)[0], update, tmp_path / "copy")
    results = []
    for code in (old_code, {}):
        run = run_command(
            "eval_lm",
            data_bin,
            "--user-dir",
            "evomoe_plugin",
            "--task",
            "language_modeling",
            "--path",
            tmp_path / "copy/checkpoint_last.pt",
            "--gen-subset",
            "valid",
            "--tokens-per-sample",
            "32",
            "--batch-size",
            "4",
            "--num-workers",
            "0",
            **code,
        )
        results += re.findall(r"Loss \(base 2\): [\d.]+, Perplexity: [\d.]+", run.output)
    assert len(results) == 2
    assert results[0] == results[1]
