"""State that is neither weights nor the optimizer's resumes too."""

import itertools
import shutil
import types

import pytest
import torch

from evomoe_plugin.trainer import speed_log
from tests.end_to_end.runs import assert_same_weights
from tests.tiny_runs import Result

MOE = """--arch transformer_lm_gpttiny_moe --moe-expert-count 4 --moe-gate top_k
--moe-bias-update-rate 0.01 --criterion moe_cross_entropy""".split()
EMA = ("--store-ema", "--ema-decay", "0.5")
SHARDS = ("--ddp-backend", "fully_sharded", "--use-sharded-state", "--save-interval-updates", "1")


def restore(result, name="checkpoint_1_3.pt"):
    return "--restore-file", result.folder / name


def test_the_moving_average_is_of_weights_and_leaves_counters_alone(runs):
    run = runs.train(
        "run", *MOE, *EMA, "--ema-start-update", "2", "--save-interval-updates", "1", updates=3
    )
    states = [run.checkpoint(f"checkpoint_1_{update}.pt") for update in (1, 2, 3)]
    average = states[-1]["extra_state"]["ema"]
    first, second, third = (state["model"] for state in states)
    assert average.keys() == third.keys()
    for name, value in average.items():
        if not value.is_floating_point():
            assert torch.equal(value, third[name]), name
        elif not name.endswith(("gate.bias_C", "version")):  # set after the average is taken
            wanted = 0.25 * first[name] + 0.25 * second[name] + 0.5 * third[name]
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize(
    "more", [("--ema-update-freq", "2"), ("--fp16", "--ema-fp32")], ids=["every second", "fp16"]
)
def test_the_moving_average_resumes_bit_equal(runs, more):
    options = (*MOE, *EMA, *more, "--save-interval-updates", "3")
    whole = runs.train("whole", *options)
    resumed = runs.train("resumed", *options, *restore(whole))
    assert resumed.losses() == whole.losses(3)
    one, other = (result.checkpoint()["extra_state"] for result in (whole, resumed))
    for part in ("ema", "ema_fp32_params"):
        assert one.get(part, {}).keys() == other.get(part, {}).keys()
        assert all(
            torch.equal(value, other[part][name]) for name, value in one.get(part, {}).items()
        )


def files(run):
    return {path.name: path.read_bytes() for path in run.folder.glob("*.pt")}


@pytest.fixture(scope="module")
def once(module_runs):
    """Runs, each made once: a maker of a copy of one in a folder of its own."""
    made = {}

    def copied(folder, *given, **more):
        key = (given, *more.items())
        if key not in made:
            made[key] = module_runs.train(str(len(made)), *given, **more)
        run = made[key]
        shutil.copytree(run.folder, folder)
        return Result(run.status, run.log, folder)

    return copied


@pytest.mark.parametrize(
    "more", [("--max-update", "5"), ("--max-update", "3"), ("--stop-time-hours", "1e-9")]
)
def test_a_run_that_has_ended_trains_no_further(runs, once, more, caplog):
    run = once(runs.folder / "run", updates=5)
    before = files(run)
    again = runs.train("run", "--max-update", 9, *more)
    assert again.status == 0 and again.losses() == {} and files(again) == before
    assert f"the checkpoint, of update 5 and 0.00 hours, has reached {more[0]}" in caplog.text


def test_patience_counts_over_a_resume(runs, caplog):
    """No validation improves on the first: the run ends after three."""
    options = (
        "--patience 2 --validate-interval-updates 1 --save-interval-updates 1 --lr 1e-9".split()
    )
    whole = runs.train("whole", *options, updates=20, validate=True)
    assert sorted(whole.losses()) == [1, 2, 3]
    resumed = runs.train(
        "resumed", *options, *restore(whole, "checkpoint_1_2.pt"), updates=20, validate=True
    )
    assert sorted(resumed.losses()) == [3]
    again = runs.train("resumed", *options, updates=20, validate=True)
    assert again.losses() == {} and "has reached --patience 2" in caplog.text
    other = runs.train("other", *options, updates=2, validate=True)  # in the same process
    assert other.checkpoint()["extra_state"]["early_stopping"]["worse"] == 1


@pytest.mark.parametrize("more", [(), ("--memory-efficient-fp16",)])
def test_the_loss_scaler_goes_on_counting(runs, more):
    """It overflows in updates 1 and 2, and grows 3 updates after that, not 3 after the resume."""
    scale = ("--fp16", "--fp16-init-scale", "1048576", "--fp16-scale-window", "5", *more)
    whole = runs.train("whole", *MOE, *scale, "--save-interval-updates", "3", updates=9)
    resumed = runs.train("resumed", *MOE, *scale, *restore(whole), updates=9)

    def scales(run, after=3):
        lines = [line for line in run.log if int(line.get("num_updates", 0)) > after]
        return [line["loss_scale"] for line in lines]

    assert len(set(scales(whole))) > 1
    assert scales(resumed) == scales(whole) and resumed.losses() == whole.losses(3)


def test_a_decay_resumes_in_its_middle_and_the_time_left_begins_anew(runs, monkeypatch):
    hours = itertools.count()  # an update takes one
    clock = types.SimpleNamespace(perf_counter=lambda: 3600 * next(hours))
    monkeypatch.setattr(speed_log, "time", clock)
    options = "--lr-scheduler wsd --warmup-updates 1 --wsd-decay-updates 5".split()
    whole = runs.train("whole", *options, "--save-interval-updates", 4, updates=8)
    resumed = runs.train("resumed", *options, *restore(whole, "checkpoint_1_4.pt"), updates=8)

    def logged(run, name):
        return [line.get(name) for line in run.log if int(line.get("num_updates", 0)) > 4]

    rates = logged(whole, "lr")
    assert logged(resumed, "lr") == rates and sorted(map(float, rates))[::-1] == [
        *map(float, rates)
    ]
    assert float(rates[0]) < 0.005  # the decay had begun
    assert resumed.losses() == whole.losses(4) and len(whole.losses(4)) == 4
    assert_same_weights(*(run.folder / "checkpoint_last.pt" for run in (whole, resumed)))
    # Of a mean over all updates of the schedule it would be less than an hour an update.
    assert logged(resumed, "hours_left") == [None, "2", "1", "0"]


@pytest.mark.parametrize(
    "option, value, batches",
    [
        ("--batch-size", 2, 88),
        ("--batch-size", 4, 44),
        ("--max-tokens", 64, 88),
        ("--tokens-per-sample", 16, 88),
    ],
)
def test_another_batch_resumes_at_the_same_share_of_the_epoch(
    runs, once, option, value, batches, caplog
):
    run = once(runs.folder / "run", *EMA, updates=30)
    state = run.checkpoint()["extra_state"]
    place = state["train_iterator"]
    assert place["batches"] == 44 and place["iterations_in_epoch"] == 30
    again = runs.train("run", *EMA, option, value, updates=31)
    assert again.status == 0 and len(again.losses()) == 1
    checkpoint = again.checkpoint()
    place = checkpoint["extra_state"]["train_iterator"]
    assert place["batches"] == batches
    assert place["iterations_in_epoch"] == 30 * batches // 44 + 1
    assert ("is the same share of it" in caplog.text) is (batches != 44)
    name = "decoder.layers.0.fc1.weight"
    average = (state["ema"][name] + checkpoint["model"][name]) / 2
    torch.testing.assert_close(checkpoint["extra_state"]["ema"][name], average)


def test_a_place_that_earlier_checkpoints_cannot_scale_is_refused(runs, once, capsys):
    run = once(runs.folder / "run", *EMA, updates=30)
    state = run.checkpoint()
    del state["extra_state"]["train_iterator"]["batches"]
    torch.save(state, run.folder / "checkpoint_last.pt")
    again = runs.train("run", *EMA, "--batch-size", 64, updates=31)
    assert again.status == 2
    assert (
        "error: --reset-dataloader is missing: the checkpoint is 30 batches"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("metric, status", [("pppl", 2), ("ppl", 0)])
def test_a_misspelt_metric_is_refused_before_the_first_step(runs, metric, status, capsys):
    run = runs.train("run", "--best-checkpoint-metric", metric, updates=2, validate=True)
    assert run.status == status and len(run.losses()) == (0 if status else 2)
    if status:
        err = capsys.readouterr().err
        assert "error: --best-checkpoint-metric pppl: validation logs loss, ppl" in err


@pytest.fixture(scope="module")
def shards(module_runs):
    """Shards of two ranks after each of four updates."""
    run = module_runs.train("shards", *SHARDS, world=2, updates=4)
    assert run.status == 0
    return run.folder


def save(shards, folder, **updates_of):
    """Checkpoints of two ranks by name, with their shards of these updates; None: there is none."""
    folder.mkdir()
    for name, updates in updates_of.items():
        for rank, update in enumerate(updates):
            if update is not None:
                of_rank = f"-shard{rank}.pt"
                shutil.copy(shards / f"checkpoint_1_{update}{of_rank}", folder / f"{name}{of_rank}")


@pytest.mark.parametrize("rank", [0, 1])
def test_one_missing_shard_ends_every_rank(runs, shards, rank, capsys):
    save(shards, runs.folder / "run", checkpoint_last=(None, 2) if rank == 0 else (2, None))
    again = runs.train("run", *SHARDS, world=2, updates=3)
    assert again.status == 2
    assert f"checkpoint_last.pt: shard {rank} of 2 is missing" in capsys.readouterr().err


def test_an_interrupted_save_of_shards_goes_on_from_the_one_before(runs, shards, caplog):
    before = {"checkpoint_1_1": (1, 1), "checkpoint_1_2": (2, 2)}
    # As the ranks had them before the third of rank 1.
    save(shards, runs.folder / "torn", **before, checkpoint_1_3=(3, None), checkpoint_last=(3, 2))
    again = runs.train("torn", *SHARDS, world=2, updates=4)
    assert again.status == 0 and sorted(again.losses()) == [3, 4]
    for rank in range(2):
        name = f"checkpoint_last-shard{rank}.pt"
        assert_same_weights(again.folder / name, shards / name)


def test_an_interrupted_save_without_one_before_is_refused(runs, shards, capsys):
    save(shards, runs.folder / "two", checkpoint_last=(2, 1))
    assert runs.train("two", *SHARDS, world=2, updates=3).status == 2
    assert "its shards are of different updates (2, 1)" in capsys.readouterr().err
