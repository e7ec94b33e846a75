"""Decoders of Llama's kind in fairseq's commands: layouts, exact resume, a spawn, evaluation."""

import pytest

from tests.end_to_end.runs import assert_same_weights, copy_as_last, evaluate

LLAMA = ("--arch", "transformer_lm_llama_tiny_moe", "--decoder-kv-heads", "1")
ANNEAL = ("--moe-temperature-updates", "4", "--moe-temperature-end", "0.1")
GIVEN = (*LLAMA, *ANNEAL, "--moe-spawn-updates", "3", "--moe-document-mask")
TWO = ("--distributed-world-size", "2", "--checkpoint-activations")
LAYOUTS = {
    "fully sharded": (*TWO, "--ddp-backend", "fully_sharded", "--min-params-to-wrap", "0"),
    "expert parallel": (*TWO, "--ddp-backend", "legacy_ddp", "--moe-expert-parallel-size", "2"),
}


@pytest.fixture(scope="module")
def one_process(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, train(folder, *GIVEN, "--update-freq", "2", "--save-interval-updates", "6")


def test_it_passes_through_all_phases(one_process):
    experts = [record["experts_per_token"] for record in one_process[1].logged("train_inner")]
    assert experts[:3] == [1] * 3 and experts[3] > 3 and experts[-1] == 1
    assert "spawned 4 experts in each of 1 MoE layers" in one_process[1].output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_equal_one_process(layout, one_process, train, tmp_path):
    run = train(tmp_path, *GIVEN, *LAYOUTS[layout])
    pairs = zip(one_process[1].logged("train_inner"), run.logged("train_inner"), strict=True)
    for a, b in pairs:
        for key in ("inner_loss", "gate_loss_balance", "experts_per_token", "gnorm", "load_max"):
            assert a[key] == pytest.approx(b[key], abs=2e-3, rel=2e-3), key
    assert_same_weights(
        one_process[0] / "checkpoint_last.pt", tmp_path / "checkpoint_last.pt", atol=1e-4
    )


def test_a_resumed_run_is_bit_equal(one_process, train, tmp_path):
    folder, whole = one_process
    copy_as_last(folder, 6, tmp_path)
    resumed = train(tmp_path, *GIVEN, "--update-freq", "2")
    for a, b in zip(resumed.logged("train_inner"), whole.logged("train_inner")[6:], strict=True):
        assert (a["loss"], a["gnorm"]) == (b["loss"], b["gnorm"])
    assert_same_weights(tmp_path / "checkpoint_last.pt", folder / "checkpoint_last.pt")


def test_eval_lm_equals_the_validation_of_training(one_process, data_bin):
    folder, run = one_process
    result = evaluate(data_bin, folder / "checkpoint_last.pt", "--batch-size", "4")
    wanted = run.logged("valid")[-1]["valid_inner_loss"]
    assert result["loss"].item() == pytest.approx(wanted, abs=6e-4)
