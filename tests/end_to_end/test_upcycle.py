"""A dense model becomes an MoE model: the verb, the start of a run, and frozen parameters."""

import re

import pytest
import torch

from evomoe_plugin.cli import main
from tests.end_to_end.runs import assert_same_weights, evaluate, load

DENSE = (
    "--decoder-layers",
    "2",
    "--decoder-embed-dim",
    "32",
    "--decoder-ffn-embed-dim",
    "64",
    "--decoder-attention-heads",
    "2",
    "--decoder-input-dim",
    "32",
    "--decoder-output-dim",
    "32",
    "--activation-fn",
    "gelu",
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
    "--share-decoder-input-output-embed",
    "--decoder-normalize-before",
)
GATE = ("--moe-gate", "top_k", "--moe-top-k-weights", "renormalized", "--moe-expert-count", "4")
SAME = ("--dropout", "0", "--attention-dropout", "0")
TWO = (
    "--ddp-backend",
    "fully_sharded",
    "--distributed-world-size",
    "2",
    "--min-params-to-wrap",
    "0",
)
FROZEN = ("--moe-train-only", "experts,gate")


@pytest.fixture(scope="module")
def dense(run_command, data_bin, tmp_path_factory):
    """A stock model, trained by stock fairseq without the plugin's criterion."""
    folder = tmp_path_factory.mktemp("dense")
    run_command(
        "train",
        data_bin,
        "--user-dir",
        "evomoe_plugin",
        "--task",
        "language_modeling",
        "--arch",
        "transformer_lm",
        *DENSE,
        "--tokens-per-sample",
        "32",
        "--batch-size",
        "4",
        "--optimizer",
        "adam",
        "--lr",
        "0.003",
        "--max-update",
        "12",
        "--num-workers",
        "0",
        "--no-epoch-checkpoints",
        "--save-dir",
        folder,
        "--seed",
        "7",
    )
    return folder / "checkpoint_last.pt"


def loss(data_bin, path):
    return evaluate(data_bin, path, "--batch-size", "8")["loss"].item()


def test_the_verb_makes_a_checkpoint_that_fairseq_takes(dense, data_bin, train, tmp_path, capsys):
    path = tmp_path / "moe.pt"
    assert main(["upcycle", str(dense), str(path), *GATE, "--data", str(data_bin)]) == 0
    out = capsys.readouterr().out
    assert "logits equal to the dense model's" in out
    before, after, change = map(
        float, re.search(r"dense ([\d.]+), MoE ([\d.]+) \(([-+][\d.]+) %\)", out).groups()
    )
    assert before == pytest.approx(after, rel=1e-5) and abs(change) < 0.005
    assert loss(data_bin, path) == pytest.approx(loss(data_bin, dense), abs=1e-5)

    restored = train(tmp_path / "restored", *GATE, *SAME, "--restore-file", path)
    tuned = train(tmp_path / "tuned", *GATE, *SAME, "--finetune-from-model", path)
    for run in (restored, tuned):
        records = run.logged("train_inner")
        assert [r["num_updates"] for r in records] == list(range(1, 13))
        assert records[0]["inner_loss"] == pytest.approx(loss(data_bin, dense), abs=0.5)
    assert restored.logged("train_inner")[0]["loss"] == tuned.logged("train_inner")[0]["loss"]


def test_what_changes_is_measured(dense, data_bin, tmp_path, capsys):
    path = tmp_path / "moe.pt"
    assert (
        main(
            [
                "upcycle",
                str(dense),
                str(path),
                "--moe-gate",
                "switch",
                "--moe-expert-count",
                "4",
                "--data",
                str(data_bin),
                "--tokens-per-sample",
                "32",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "logits differ from the dense model's (max difference" in out
    before, after = map(float, re.search(r"dense ([\d.]+), MoE ([\d.]+)", out).groups())
    assert before == pytest.approx(2 ** loss(data_bin, dense), rel=1e-4)
    assert after == pytest.approx(2 ** loss(data_bin, path), rel=1e-4)
    assert abs(after / before - 1) > 1e-4


@pytest.fixture(scope="module")
def begun(dense, train, tmp_path_factory):
    """A run that began with the dense model, stopped after its third update."""
    folder = tmp_path_factory.mktemp("begun")
    run = train(
        folder,
        *GATE,
        *SAME,
        "--moe-init-from-dense",
        dense,
        "--max-update",
        "12",
        "--update-freq",
        "2",
        "--save-interval-updates",
        "3",
    )
    return folder, run


def test_a_run_begins_with_the_dense_model(dense, begun, train, tmp_path, data_bin):
    folder, run = begun
    assert "logits equal to the dense model's" in run.output
    path = tmp_path / "moe.pt"
    assert main(["upcycle", str(dense), str(path), *GATE, "--seed", "7"]) == 0
    ours, theirs = load(path)["model"], load(folder / "checkpoint_1_3.pt")["model"]
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():  # three updates away
        if value.is_floating_point() and ".gate." not in name:
            assert (value - theirs[name]).abs().max() < 0.02, name
    assert run.logged("train_inner")[0]["inner_loss"] == pytest.approx(
        loss(data_bin, dense), abs=0.5
    )


@pytest.mark.slow
def test_a_resume_does_not_need_the_dense_model(begun, dense, train, tmp_path):
    folder, run = begun
    saved = tmp_path / "run"
    saved.mkdir()
    (saved / "checkpoint_last.pt").write_bytes((folder / "checkpoint_1_3.pt").read_bytes())
    resumed = train(
        saved, *GATE, *SAME, "--moe-init-from-dense", tmp_path / "gone.pt", "--update-freq", "2"
    )
    wanted = run.logged("train_inner")[3:]
    for a, b in zip(resumed.logged("train_inner"), wanted, strict=True):
        assert (a["loss"], a["gnorm"]) == (b["loss"], b["gnorm"])
    assert_same_weights(saved / "checkpoint_last.pt", folder / "checkpoint_last.pt")


@pytest.mark.parametrize(
    "backend", [pytest.param("fully_sharded", marks=pytest.mark.slow), "fsdp2"]
)
def test_two_ranks_begin_with_the_dense_model(begun, dense, train, tmp_path, backend):
    given = (*GATE, *SAME, *TWO, "--ddp-backend", backend)
    sharded = train(tmp_path, *given, "--moe-init-from-dense", dense)
    assert "logits not compared with the dense model's" in sharded.output
    for a, b in zip(sharded.logged("train_inner"), begun[1].logged("train_inner"), strict=True):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=2e-3)
        assert a["gnorm"] == pytest.approx(b["gnorm"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ("--moe-init-method", "mask"),
        ("--fp16", "--fp16-init-scale", "4"),
    ],
    ids=["mask", "fp16"],
)
def test_fully_sharded_begins_as_one_process_does(dense, train, tmp_path, given):
    given = (*GATE, *SAME, *given, "--moe-init-from-dense", dense, "--max-update", "3")
    one = train(tmp_path / "one", *given, "--update-freq", "2")
    two = train(tmp_path / "two", *given, *TWO)
    assert len(one.logged("train_inner")) == 3
    for a, b in zip(two.logged("train_inner"), one.logged("train_inner"), strict=True):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=5e-3)
    weights = [
        load(tmp_path / which / "checkpoint_last.pt")["model"][
            "decoder.layers.1.moe.experts.fc1_weight"
        ]
        for which in ("one", "two")
    ]
    masked = [(weight.float().abs() < 0.02).float().mean().item() for weight in weights]
    assert masked[0] == pytest.approx(masked[1], abs=0.01)
    assert torch.allclose(*(weight.float() for weight in weights), atol=2e-3)


@pytest.fixture(scope="module")
def frozen(dense, train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen")
    return folder, train(
        folder,
        *GATE,
        *SAME,
        *FROZEN,
        "--moe-init-from-dense",
        dense,
        "--update-freq",
        "2",
        "--save-interval-updates",
        "6",
    )


def assert_only_experts_and_gates_moved(path, dense):
    state, before = load(path), load(dense)["model"]
    trained = {
        name: value
        for name, value in state["model"].items()
        if ".moe." in name and value.dtype == torch.float32  # biases of gates are fp64
    }
    for name, value in state["model"].items():
        if ".moe." not in name:
            assert torch.equal(value, before[name]), name
    experts = state["model"]["decoder.layers.1.moe.experts.fc1_weight"]
    assert all((expert != before["decoder.layers.1.fc1.weight"]).any() for expert in experts)
    entries = state["last_optimizer_state"]["state"]
    assert sorted(e["exp_avg"].shape for e in entries.values()) == sorted(
        value.shape for value in trained.values()
    )


def test_frozen_parameters_stay_and_have_no_state(frozen, dense):
    assert_only_experts_and_gates_moved(frozen[0] / "checkpoint_last.pt", dense)


@pytest.mark.slow
def test_frozen_parameters_fully_sharded(frozen, dense, train, tmp_path):
    given = (*GATE, *SAME, *FROZEN, *TWO, "--moe-init-from-dense", dense)
    train(tmp_path / "two", *given, "--max-update", "6")
    resumed = train(tmp_path / "two", *given)
    for a, b in zip(
        resumed.logged("train_inner"), frozen[1].logged("train_inner")[6:], strict=True
    ):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=2e-3)
        assert a["gnorm"] == pytest.approx(b["gnorm"], abs=2e-3)
    path = tmp_path / "two" / "checkpoint_last.pt"
    assert_only_experts_and_gates_moved(path, dense)
    assert_same_weights(path, frozen[0] / "checkpoint_last.pt", atol=1e-4)
    other = train(
        tmp_path / "two",
        *given,
        "--moe-train-only",
        "attention,norms",
        "--max-update",
        "14",
        check=False,
    )
    assert other.status == 2
    assert re.search(
        "^error: --moe-train-only attention,norms: the optimizer's state in .* is of "
        "other parameters: give --moe-train-only experts,gate, or",
        other.output,
        re.M,
    )


@pytest.mark.slow
def test_frozen_parameters_with_another_number_of_processes(frozen, train, tmp_path):
    (tmp_path / "checkpoint_last.pt").write_bytes((frozen[0] / "checkpoint_1_6.pt").read_bytes())
    resumed = train(tmp_path, *GATE, *SAME, *FROZEN, *TWO)
    for a, b in zip(
        resumed.logged("train_inner"), frozen[1].logged("train_inner")[6:], strict=True
    ):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=2e-3)


def assert_same_losses(one, other):
    for a, b in zip(one.logged("train_inner"), other.logged("train_inner"), strict=True):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=2e-3)
        assert a["gnorm"] == pytest.approx(b["gnorm"], abs=2e-3)


SHARED = ("--moe-shared-experts", "1", "--moe-shared-combine", "softmax")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_only", "given"),
    [
        ("experts", ()),
        ("attention,norms", ()),
        ("shared,ffn", SHARED),
        ("experts,gate,shared", SHARED),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_part_alone_fully_sharded(dense, train, tmp_path, train_only, given):
    given = (
        *GATE,
        *SAME,
        *given,
        "--moe-init-from-dense",
        dense,
        "--moe-train-only",
        train_only,
        "--max-update",
        "4",
    )
    one = train(tmp_path / "one", *given, "--update-freq", "2")
    two = train(tmp_path / "two", *given, *TWO, "--checkpoint-activations")
    assert_same_losses(two, one)
    assert_same_weights(
        tmp_path / "one/checkpoint_last.pt", tmp_path / "two/checkpoint_last.pt", atol=2e-4
    )


@pytest.mark.slow
def test_what_cannot_be_sharded_apart_is_trained_by_pytorch_ddp(dense, train, tmp_path):
    given = (
        *GATE,
        *SAME,
        "--moe-init-from-dense",
        dense,
        "--moe-train-only",
        "gate",
        "--max-update",
        "4",
    )
    refused = train(tmp_path / "two", *given, *TWO, check=False)
    assert refused.status == 2
    (error,) = [line for line in refused.output.splitlines() if line.startswith("error:")]
    assert "--moe-train-only gate: --ddp-backend fully_sharded cannot shard the gate" in error
    assert error.endswith("or use another --ddp-backend")
    assert not (tmp_path / "two/checkpoint_last.pt").exists()
    one = train(tmp_path / "one", *given, "--update-freq", "2")
    two = train(
        tmp_path / "two", *given, "--distributed-world-size", "2", "--ddp-backend", "pytorch_ddp"
    )
    assert_same_losses(two, one)


def test_frozen_with_the_whole_resumes_not(frozen, train, tmp_path):
    """Another choice of parameters has another optimizer state: refused, not guessed."""
    (tmp_path / "checkpoint_last.pt").write_bytes((frozen[0] / "checkpoint_1_6.pt").read_bytes())
    run = train(tmp_path, *GATE, *SAME, "--moe-train-only", "experts", check=False)
    assert run.status == 2
    assert "--reset-optimizer" in run.output.splitlines()[-1]
