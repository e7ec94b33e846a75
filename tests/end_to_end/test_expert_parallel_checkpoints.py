"""One checkpoint, however many processes divide the experts: resumed, evaluated, and killed."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
from evomoe_plugin.checkpoint.optimizer_names import make_plain, optimizer_names
from evomoe_plugin.checkpoint.verify import faults
from evomoe_plugin.cli import main as evomoe
from tests.checkpoint.expert_states import assert_same
from tests.end_to_end.runs import Run, assert_same_weights, copy_as_last, evaluate

# Dropout masks depend on the split of the batch; everything else of ours does not.
SAME = (
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
    "--batch-size",
    "2",
    "--disable-validation",
    "--moe-temperature-updates",
    "6",
    "--moe-temperature-end",
    "0.1",
    "--max-update",
    "8",
)
SHARDED = ("--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
LEGACY = ("--ddp-backend", "legacy_ddp")
FORMS = {
    "one file": ("--moe-ep-checkpoint", "consolidated"),
    "experts beside": ("--moe-ep-checkpoint", "sharded"),
}


def layout(world, size=1, backend=SHARDED):
    """Options of `world` processes that divide the experts by `size`, with the same updates."""
    return (
        "--distributed-world-size",
        world,
        "--moe-expert-parallel-size",
        size,
        "--update-freq",
        4 // world,
        *(backend if world > 1 else ()),
    )


LAYOUTS = {
    "one process": layout(1),
    "fsdp 2": layout(2),
    "ep 2": layout(2, 2),
    "ep 2, ddp": layout(2, 2, LEGACY),
    "ep 4": layout(4, 4),
    "ep 2 x fsdp 2": layout(4, 2),
    "ep 2 x ddp 2": layout(4, 2, LEGACY),
}


@pytest.fixture(scope="module")
def unbroken(train, tmp_path_factory):
    """A maker of runs of 8 updates without a stop."""
    runs = {}

    def make(*given):
        if given not in runs:
            folder = tmp_path_factory.mktemp("unbroken")
            runs[given] = folder, train(folder, *SAME, "--save-interval-updates", "4", *given)
        return runs[given]

    return make


@pytest.fixture(scope="module")
def halfway(unbroken, tmp_path_factory):
    """A maker of folders with the checkpoint of update 4 of some layout, each to be gone on in."""

    def make(*given):
        copy = tmp_path_factory.mktemp("copy") / "run"
        copy_as_last(unbroken(*given)[0], 4, copy)
        return copy

    return make


def assert_goes_on(resumed, whole, tolerance=0.0):
    """The records of the resumed run are the last ones of the other."""
    records = resumed.logged("train_inner")
    assert [record["num_updates"] for record in records] == [5, 6, 7, 8]
    for a, b in zip(records, whole.logged("train_inner")[4:], strict=True):
        for key in ("loss", "gnorm", "experts_per_token"):
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), key


def same_logical(one, other):
    """Bit-equal weights and optimizer, by name, whatever the forms of the two files."""
    states = []
    for path in (one, other):
        main = read_main_file("CKPT", str(path))
        state = main.whole()
        make_plain(state)
        names = optimizer_names(str(path), state)
        entries = state["last_optimizer_state"]["state"]
        states.append(
            {
                "model": state["model"],
                "optimizer_history": None,
                "last_optimizer_state": {"state": {names[i]: e for i, e in entries.items()}},
            }
        )
    assert_same(*states)


def test_two_processes_resume_bit_equal(unbroken, halfway, train, data_bin):
    given = (*LAYOUTS["ep 2"], *FORMS["experts beside"])
    whole_folder, whole = unbroken(*given)
    folder = halfway(*given)
    (tag,) = (folder / "checkpoint_last.experts").iterdir()
    assert {path.name for path in tag.iterdir()} == {
        "00000-of-00002.safetensors",
        "00001-of-00002.safetensors",
    }
    assert not any(
        ".experts." in name
        for name in torch.load(folder / "checkpoint_last.pt", weights_only=False)["model"]
    )
    assert_goes_on(train(folder, *SAME, *given), whole)
    same_logical(folder / "checkpoint_last.pt", whole_folder / "checkpoint_last.pt")
    assert len(list((folder / "checkpoint_last.experts").iterdir())) == 1
    assert not list(faults(read_main_file("CKPT", str(folder / "checkpoint_last.pt"))))
    # On one process, as one file and as it is.
    one = folder / "one.pt"
    assert evomoe(["checkpoint", "consolidate", str(folder / "checkpoint_last.pt"), str(one)]) == 0
    results = [
        evaluate(data_bin, path, "--batch-size", "4")["loss"].item()
        for path in (one, folder / "checkpoint_last.pt")
    ]
    assert results[0] == results[1]


FP16 = ("--fp16", "--fp16-init-scale", "4")


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, precision",
    [("one file", ()), ("experts beside", ()), ("experts beside", FP16)],
    ids=["one file", "experts beside", "fp16"],
)
@pytest.mark.parametrize("way", ["ep 2", "ep 2, ddp", "ep 4", "ep 2 x fsdp 2"])
def test_resuming_is_bit_equal(unbroken, halfway, train, way, form, precision):
    whole_folder, whole = unbroken(*LAYOUTS[way], *FORMS[form], *precision)
    folder = halfway(*LAYOUTS[way], *FORMS[form], *precision)
    resumed = train(folder, *SAME, *LAYOUTS[way], *FORMS[form], *precision)
    if precision and way == "ep 2, ddp":
        # Its fp32 masters are in no checkpoint, as with fairseq alone.
        assert_goes_on(resumed, whole, tolerance=5e-3)
        return
    assert_goes_on(resumed, whole)
    same_logical(folder / "checkpoint_last.pt", whole_folder / "checkpoint_last.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, before, after",
    [
        *(("experts beside", "ep 2", way) for way in LAYOUTS if way != "ep 2"),
        *(("experts beside", way, "ep 2") for way in LAYOUTS if way != "ep 2"),
        ("experts beside", "ep 4", "one process"),
        ("experts beside", "ep 2 x fsdp 2", "ep 2 x ddp 2"),
        ("one file", "ep 2", "one process"),
        ("one file", "ep 2, ddp", "fsdp 2"),
        ("one file", "ep 4", "ep 2"),
    ],
)
def test_every_layout_resumes_from_every_other(unbroken, halfway, train, form, before, after):
    whole_folder, whole = unbroken(*LAYOUTS["one process"])
    is_divided = before.startswith("ep")
    folder = halfway(*LAYOUTS[before], *(FORMS[form] if is_divided else ()))
    assert_goes_on(train(folder, *SAME, *LAYOUTS[after]), whole, tolerance=2e-3)
    assert_same_weights_of_any_form(folder, whole_folder)


def assert_same_weights_of_any_form(one, other):
    for folder in (one, other):
        path = folder / "checkpoint_last.pt"
        if path.with_suffix(".experts").exists():
            evomoe(["checkpoint", "consolidate", str(path), str(path), "--overwrite"])
    assert_same_weights(one / "checkpoint_last.pt", other / "checkpoint_last.pt", atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ep 2", "ep 2, ddp", "ep 2 x fsdp 2"])
def test_forms_are_the_same_checkpoint(halfway, data_bin, way):
    files = [halfway(*LAYOUTS[way], *given) / "checkpoint_last.pt" for given in FORMS.values()]
    same_logical(*files)
    results = [evaluate(data_bin, path, "--batch-size", "4")["loss"].item() for path in files]
    assert results[0] == results[1]


EFFICIENT = ("--fp16", "--memory-efficient-fp16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "before, after, given",
    [
        ("ep 2", "one process", FP16),
        ("one process", "ep 2", FP16),
        ("ep 2, ddp", "one process", FP16),
        ("one process", "ep 2, ddp", FP16),
        ("ep 2", "ep 2, ddp", FP16),
        ("ep 2, ddp", "ep 2", FP16),
        ("ep 2", "ep 2, ddp", EFFICIENT),
        ("one process", "ep 2", EFFICIENT),
    ],
)
def test_half_precision_in_every_layout(unbroken, halfway, train, before, after, given):
    _, whole = unbroken(*LAYOUTS["one process"], *given)
    folder = halfway(*LAYOUTS[before], *given)
    assert_goes_on(train(folder, *SAME, *LAYOUTS[after], *given), whole, tolerance=2e-2)


@pytest.mark.slow
def test_names_copies_and_what_is_no_longer_kept(train, tmp_path):
    given = (
        *LAYOUTS["ep 2"],
        *FORMS["experts beside"],
        "--save-interval-updates",
        "2",
        "--keep-interval-updates",
        "2",
    )
    train(tmp_path, *(option for option in SAME if option != "--disable-validation"), *given)
    kept = {path.name for path in tmp_path.glob("*.pt")}
    assert {
        "checkpoint_last.pt",
        "checkpoint_best.pt",
        "checkpoint_1_6.pt",
        "checkpoint_1_8.pt",
    } == kept
    assert {path.stem for path in tmp_path.glob("*.experts")} == {
        name.removesuffix(".pt") for name in kept
    }
    same_logical(tmp_path / "checkpoint_last.pt", tmp_path / "checkpoint_1_8.pt")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_written_behind_the_training(unbroken, train, tmp_path, form):
    given = (*LAYOUTS["ep 2"], *FORMS[form])
    run = train(
        tmp_path,
        *SAME,
        *given,
        "--save-interval-updates",
        "3",
        "--write-checkpoints-asynchronously",
    )
    assert run.output.count("training waits while ranks") == (form == "experts beside")
    same_logical(tmp_path / "checkpoint_last.pt", unbroken(*given)[0] / "checkpoint_last.pt")
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "checkpoint_1_3.pt",
        "checkpoint_1_6.pt",
        "checkpoint_last.pt",
    }


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["experts,gate", "attention,norms,gate,experts"])
def test_what_is_frozen(unbroken, halfway, train, trained):
    given = (*LAYOUTS["ep 2"], *FORMS["experts beside"], "--moe-train-only", trained)
    assert_goes_on(train(halfway(*given), *SAME, *given), unbroken(*given)[1])


@pytest.mark.slow
def test_without_the_optimizer(halfway, data_bin):
    files = [
        halfway(*LAYOUTS["ep 2"], *form, "--no-save-optimizer-state") / "checkpoint_last.pt"
        for form in FORMS.values()
    ]
    for file in files:
        main = read_main_file("CKPT", str(file))
        assert not main.whole().get("last_optimizer_state") and not list(faults(main))
    results = [evaluate(data_bin, file, "--batch-size", "4")["loss"].item() for file in files]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing", "altered"])
def test_a_fault_ends_the_run_with_one_line(halfway, train, fault):
    given = (*LAYOUTS["ep 2"], *FORMS["experts beside"])
    folder = halfway(*given)
    (tag,) = (folder / "checkpoint_last.experts").iterdir()
    file = tag / "00001-of-00002.safetensors"
    if fault == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
    run = train(folder, *SAME, *given, check=False)
    assert run.status == 2
    wanted = "shard 1 of 2 is missing" if fault == "missing" else "has been altered"
    assert re.search(rf"error: --checkpoint .*{wanted}", run.output)
    assert "Traceback" not in run.output


@pytest.mark.slow
def test_adagrad_is_divided(unbroken, halfway, train):
    """It keeps its sums from the first update on, and fairseq shards it nowhere."""
    given = ("--optimizer", "adagrad", "--lr", "0.05", *FORMS["experts beside"])
    way = LAYOUTS["ep 2, ddp"]
    whole_folder, whole = unbroken(*way, *given)
    folder = halfway(*way, *given)
    assert_goes_on(train(folder, *SAME, *way, *given), whole)
    same_logical(folder / "checkpoint_last.pt", whole_folder / "checkpoint_last.pt")
    alone = halfway(*way, *given)
    assert_goes_on(train(alone, *SAME, *LAYOUTS["one process"], *given[:4]), whole, tolerance=2e-3)


@pytest.mark.slow
def test_validation_in_several_processes(halfway, data_bin, run_command):
    """fairseq-validate gives each process all experts, and as many batches as there are for it."""
    folders = [halfway(*LAYOUTS["ep 2"], *form) for form in FORMS.values()]
    common = (
        "validate",
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--task",
        "language_modeling",
        "--valid-subset",
        "valid",
        "--batch-size",
        "4",
        "--tokens-per-sample",
        "32",
        "--log-format",
        "json",
        "--num-workers",
        "0",
        "--path",
    )
    (wanted,) = run_command(*common, folders[0] / "checkpoint_last.pt").logged("valid")
    for folder, world in zip(folders, (3, 2), strict=True):  # 3 is no multiple of 2, which divided
        run = run_command(*common, folder / "checkpoint_last.pt", "--distributed-world-size", world)
        records = run.logged("valid")
        assert records and "Traceback" not in run.output
        for got in records:
            assert got == pytest.approx(wanted, abs=2e-3, rel=2e-3)


# Kills.

KILLS = int(os.environ.get("EVOMOE_TEST_KILLS", "20"))
ROOT = Path(__file__).parents[2]


def children(pid):
    """Processes that a process started, by /proc."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def ranks(pid):
    return [
        child
        for child in children(pid)
        if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def started(command, log):
    with open(log, "wb") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
                "PYTHONUNBUFFERED": "1",
            },
        )


def wait_for(process, log, text, timeout=240):
    end = time.monotonic() + timeout
    while text not in log.read_text(errors="replace"):
        if process.poll() is not None or time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def logged(text):
    return Run(subprocess.CompletedProcess([], 0, text)).logged("train_inner")


@pytest.mark.slow
def test_killed_at_random_moments(unbroken, data_bin, tmp_path):
    """One rank is killed while training or while saving, again and again; the run goes on from the
    last good checkpoint, and in the end is the unbroken one."""
    from tests.end_to_end.conftest import TINY

    # Saving at each update: kills hit it often.
    given = (
        *LAYOUTS["ep 2"],
        *FORMS["experts beside"],
        "--max-update",
        "60",
        "--save-interval-updates",
        "1",
        "--keep-interval-updates",
        "2",
    )
    wanted_folder, wanted = unbroken(*given)
    losses = {
        record["num_updates"]: (record["loss"], record["gnorm"])
        for record in wanted.logged("train_inner")
    }
    assert len(losses) == 60
    rng = random.Random(11)
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "fairseq_cli.train",
        str(data_bin),
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
        "--optimizer",
        "adam",
        "--lr",
        "0.003",
        "--clip-norm",
        "1.0",
        "--log-format",
        "json",
        "--log-interval",
        "1",
        "--num-workers",
        "0",
        "--no-epoch-checkpoints",
        "--save-dir",
        str(folder),
        "--seed",
        "7",
        *map(str, SAME),
        *map(str, given),
    ]
    seen, last = {}, 0
    for kill in range(KILLS + 1):
        process = started(command, log)
        done = kill == KILLS
        while_saving = rng.random() < 0.5
        # From where it goes on: a few updates more, and then any moment.
        target = last + 1 + rng.randrange(2)
        mark = (
            f"Preparing to save checkpoint for epoch 1 @ {target} updates"
            if while_saving
            else f'"num_updates": "{target}"'
        )
        if not done and wait_for(process, log, mark):
            time.sleep(rng.random() * (0.03 if while_saving else 0.3))
            if found := ranks(process.pid):
                os.kill(rng.choice(found), signal.SIGKILL)
        began = time.monotonic()
        status = process.wait(timeout=600 if done else 60)
        text = log.read_text(errors="replace")
        for record in logged(text):
            update = record["num_updates"]
            seen[update] = record["loss"], record["gnorm"]
            assert seen[update] == losses[update], (kill, update)
        if done:
            assert status == 0, text[-3000:]
            break
        if status != 0:
            assert time.monotonic() - began < 60
            assert status == 1 and re.search(r"error: rank \d was ended by SIGKILL", text), text[
                -3000:
            ]
        path = folder / "checkpoint_last.pt"
        if path.exists():  # not before the first was written
            main = read_main_file("CKPT", str(path))
            assert not list(faults(main))
            last = main.update
    assert seen.keys() == losses.keys()
    same_logical(folder / "checkpoint_last.pt", wanted_folder / "checkpoint_last.pt")
