"""Design invariant 7 for expert parallelism: however experts are divided, the same model."""

import itertools

import pytest

from tests.end_to_end.runs import assert_same_weights, load

# Dropout masks depend on the split of the batch; everything else of ours does not.
SAME = (
    "--dropout",
    "0",
    "--attention-dropout",
    "0",
    "--batch-size",
    "2",
    "--disable-validation",
    "--max-update",
    "21",
)
SHARDED = ("--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0")
FSDP2 = ("--ddp-backend", "fsdp2", "--min-params-to-wrap", "0")
LEGACY = ("--ddp-backend", "legacy_ddp")


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
    "fsdp 2": layout(2),
    "fsdp2 2": layout(2, 1, FSDP2),
    "ep 2": layout(2, 2),
    "ep 2, fsdp2": layout(2, 2, FSDP2),
    "ep 2, ddp": layout(2, 2, LEGACY),
    "ep 4": layout(4, 4),
    "ep 2 x fsdp 2": layout(4, 2),
    "ep 2 x fsdp2 2": layout(4, 2, FSDP2),
    "ep 2 x ddp 2": layout(4, 2, LEGACY),
}
GATES = {
    # The temperature anneals until update 12; from update 16 on routing is hard top-1.
    "dense_to_sparse": (
        "--moe-temperature-updates",
        "12",
        "--moe-temperature-end",
        "0.1",
        "--moe-hard-updates",
        "16",
    ),
    "top_k": (
        "--moe-gate",
        "top_k",
        "--moe-top-k",
        "2",
        "--moe-bias-update-rate",
        "0.01",
        "--moe-lexical",
        "hash:3",
        "--moe-gate-centre",
        "0.9",
        "--moe-weight-scale",
        "mean",
    ),
    "top_p": (
        "--moe-gate",
        "top_p",
        "--moe-top-p",
        "0.6",
        "--moe-null-experts",
        "2",
        "--moe-shared-experts",
        "1",
    ),
    "top_any": ("--moe-gate", "top_any"),
}
LOGGED = (
    "loss",
    "inner_loss",
    "gnorm",
    "experts_per_token",
    "load_max",
    "dead_experts",
    "gate_entropy",
    "mflops_per_token",
)


def assert_same(one, other, tolerance=2e-3):
    """Of two runs (folder, run): the same course, gradient norms and final weights."""
    records = [run.logged("train_inner") for _, run in (one, other)]
    for a, b in zip(*records, strict=True):
        for key in LOGGED:
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), (
                a["num_updates"],
                key,
            )
    assert_same_weights(*(folder / "checkpoint_last.pt" for folder, _ in (one, other)), atol=1e-4)


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory):
    """A maker of runs in one process."""
    runs = {}

    def make(*given):
        if given not in runs:
            folder = tmp_path_factory.mktemp("one")
            runs[given] = folder, train(folder, *SAME, *layout(1), *given)
        return runs[given]

    return make


def check(one_process, train, tmp_path, way, *given, divided=()):
    """Of a run of many processes, with the options `divided` too, and one of one process."""
    run = train(tmp_path, *SAME, *LAYOUTS[way], *given, *divided)
    assert_same(one_process(*given), (tmp_path, run))
    return run


def test_divided_over_two_processes(one_process, train, tmp_path):
    run = check(
        one_process,
        train,
        tmp_path,
        "ep 2",
        *GATES["dense_to_sparse"],
        "--checkpoint-activations",
        divided=("--moe-ep-chunks", "2"),
    )
    records = run.logged("train_inner")
    assert len(records) == 21
    assert records[0]["experts_per_token"] > 3 and records[-1]["experts_per_token"] == 1
    assert records[0]["temperature"] > records[8]["temperature"] > records[-1]["temperature"]
    for record in records:
        # About half of the pairs belong to the other process; all do where one has all.
        assert 0 < record["ep_sent"] < record["experts_per_token"]
        assert 1 <= record["ep_load_max"] <= 2 and 1 <= record["ep_received_max"] <= 2
        assert record["ep_wait_ms"] > 0


def covering(ways, cases, each):
    """Pairs that have each way with `each` of the cases, and each case about as often."""
    cases = itertools.cycle(cases)
    return [(way, next(cases)) for way in ways for _ in range(each)]


@pytest.mark.slow
@pytest.mark.parametrize("way, gate", covering(LAYOUTS, GATES, each=3))
def test_every_layout_gives_the_same_model(one_process, train, tmp_path, way, gate):
    check(one_process, train, tmp_path, way, *GATES[gate])


LAYERS = {
    "spawn": (
        "--moe-spawn-updates",
        "5",
        "--moe-spawn-trainable-masked",
        "false",
        "--moe-lexical",
        "normal:2",
        "--moe-weight-scale",
        "unit",
    ),
    "what steadies routing": (
        "--moe-gate",
        "switch",
        "--moe-lexical",
        "normal:2",
        "--moe-weight-scale",
        "unit",
        "--moe-gate-centre",
        "0.9",
    ),
    "capacity": ("--moe-gate", "top_k", "--moe-top-k", "2", "--moe-capacity-factor", "1.0"),
    "experts alone": ("--moe-train-only", "experts"),
    "experts frozen": ("--moe-train-only", "attention,norms"),
    "gated and shared": (
        "--moe-expert-gated",
        "--activation-fn",
        "swish",
        "--moe-shared-experts",
        "1",
        "--moe-shared-combine",
        "mix",
    ),
    "its gradients clipped in the step": ("--optimizer", "fused_adamw"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, has",
    [
        *covering(["fsdp2 2"], LAYERS, each=len(LAYERS)),
        *covering(["ep 2", "ep 2, fsdp2", "ep 2, ddp", "ep 2 x fsdp 2"], LAYERS, each=4),
    ],
)
def test_whatever_the_layer_has(one_process, train, tmp_path, way, has):
    check(one_process, train, tmp_path, way, *LAYERS[has])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ep 2", "ep 2, ddp"])
def test_experts_are_removed_and_added_alike(one_process, train, tmp_path, way):
    given = (
        "--moe-gate",
        "top_any",
        "--moe-expert-count",
        "3",
        "--moe-max-experts",
        "6",
        "--moe-adapt-record-interval",
        "4",
        "--moe-adapt-window",
        "3",
        "--moe-top-any-learned-scale",
    )
    run = check(one_process, train, tmp_path, way, *given)
    assert "moe, update" in run.output


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, precision", [("ep 2", "fp16"), ("ep 2, fsdp2", "bf16"), ("ep 2, ddp", "bf16")]
)
def test_half_precision_stays_close(one_process, train, tmp_path, way, precision):
    run = train(
        tmp_path,
        *SAME,
        *LAYOUTS[way],
        *GATES["dense_to_sparse"],
        f"--{precision}",
        "--moe-ep-wire-dtype",
        precision,
    )
    wanted = one_process(*GATES["dense_to_sparse"])[1].logged("train_inner")
    for a, b in zip(run.logged("train_inner"), wanted, strict=True):
        assert a["inner_loss"] == pytest.approx(b["inner_loss"], abs=0.05)
        assert a["gnorm"] == pytest.approx(b["gnorm"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ep 2", "ep 2, ddp"])
def test_a_run_begins_with_a_dense_model(one_process, train, tmp_path, run_command, data_bin, way):
    run_command(
        "train",
        data_bin,
        "--task",
        "language_modeling",
        "--arch",
        "transformer_lm",
        "--decoder-layers",
        "2",
        "--decoder-embed-dim",
        "32",
        "--decoder-ffn-embed-dim",
        "64",
        "--decoder-attention-heads",
        "2",
        "--share-decoder-input-output-embed",
        "--decoder-input-dim",
        "32",
        "--decoder-output-dim",
        "32",
        "--activation-fn",
        "gelu",
        "--decoder-normalize-before",
        "--tokens-per-sample",
        "32",
        "--batch-size",
        "4",
        "--optimizer",
        "adam",
        "--lr",
        "0.003",
        "--max-update",
        "3",
        "--save-dir",
        tmp_path / "dense",
        "--disable-validation",
        "--user-dir",
        "evomoe_plugin",
    )
    given = (
        "--moe-init-from-dense",
        tmp_path / "dense/checkpoint_last.pt",
        "--moe-init-method",
        "mask",
        "--max-update",
        "3",
    )
    check(one_process, train, tmp_path / "moe", way, *given)
    state = load(tmp_path / "moe/checkpoint_last.pt")["model"]
    assert state["decoder.layers.1.moe.experts.fc1_weight"].size(0) == 4


@pytest.mark.slow
def test_processes_that_another_launcher_started(one_process, train, tmp_path):
    given = GATES["dense_to_sparse"]
    options = LAYOUTS["ep 2"][2:]  # torchrun says how many there are
    run = train(
        tmp_path, *SAME, *options, *given, torchrun=("--nproc-per-node", "2", "--standalone")
    )
    assert_same(one_process(*given), (tmp_path, run))
