"""What fairseq's commands ignored or printed wrongly."""

import re
import shutil

import pytest
import torch
from fairseq.data import data_utils

from evomoe_plugin.checkpoint.overrides import check_model_overrides
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.byte_pieces import with_bytes
from evomoe_plugin.trainer.moe_trainer import MoETrainer

MOE = ("--arch", "transformer_lm_gpttiny_moe", "--moe-expert-count", "4")


@pytest.fixture(scope="module")
def checkpoint(module_runs):
    return module_runs.train("moe", *MOE, updates=1).folder / "checkpoint_last.pt"


def evaluation(runs, checkpoint, *more):
    return (runs.data, "--path", checkpoint, "--batch-size", "4", "--num-workers", "0", *more)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (
            "eval_lm",
            ("--model-overrides", "{'moe_evl_gate': 'top1'}"),
            "did you mean moe_eval_gate",
        ),
        ("generate", ("--model-overrides", "{'moe_evl_gate': 1}"), "has no such option"),
        ("eval_lm", ("--model-overrides", "moe_eval_gate=top1"), "is no dictionary of Python"),
        ("eval_lm", ("--bf16",), "fairseq evaluates in fp32, or with --fp16"),
        ("generate", ("--distributed-world-size", "2"), "only the share of rank 0"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    module_runs, checkpoint, command, options, message, capsys
):
    assert module_runs.run(command, *evaluation(module_runs, checkpoint, *options)) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_overrides_of_options_of_any_part_are_taken(tmp_path, checkpoint):
    given = {"moe_eval_gate": "top1", "data": ".", "tokens_per_sample": 8}
    check_model_overrides(repr(given), str(checkpoint))
    check_model_overrides("{}", None)
    check_model_overrides("{'any': 1}", str(tmp_path / "missing.pt"))  # reported when it is loaded
    with pytest.raises(OptionError, match=r"^--model-overrides any: .*_last.pt has no such option"):
        check_model_overrides("{'any': 1}", f"{tmp_path}/missing.pt:{checkpoint}")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_an_empty_split_is_named(runs, tmp_path, split, capsys):
    data = tmp_path / "data"
    shutil.copytree(runs.data, data)
    (data / f"{split}.bin").write_bytes(b"")
    runs.data = data
    assert runs.train("run", updates=1, validate=True).status == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert f"{split}.bin: is empty" in line


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ("--valid-subset", "valid,vald")),
        ("validate", ("--valid-subset", "vald")),
        ("eval_lm", ("--gen-subset", "vald")),
        ("generate", ("--gen-subset", "vald", "--task", "language_modeling")),
    ],
)
def test_a_missing_split_is_named(module_runs, checkpoint, tmp_path, command, options, capsys):
    given = evaluation(module_runs, checkpoint, *options)
    if command == "train":
        given = module_runs.arguments(tmp_path, *MOE, *options, validate=True)
    message = "has no split 'vald', but test, train, valid: name one of them by --train-subset"
    if command == "generate":  # starts no ranks, and so ends in the excepthook
        with pytest.raises(OptionError, match=message):
            module_runs.run(command, *given)
    else:
        assert module_runs.run(command, *given) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_split_that_nobody_named_is_refused(runs, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(runs.data, data)
    for kind in ("bin", "idx"):
        shutil.copy(data / f"valid.{kind}", data / f"valid1.{kind}")
    runs.data = data
    assert runs.train("run", updates=1, validate=True).status == 2
    assert "Valid paths ['valid1'] will be ignored" in capsys.readouterr().err.splitlines()[-1]


def test_validation_without_a_batch_size_is_refused(module_runs, checkpoint, capsys):
    given = [v for v in evaluation(module_runs, checkpoint) if v not in ("--batch-size", "4")]
    assert module_runs.run("validate", *given) == 2
    assert "--batch-size (not given): give it" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("steps", [1, 2])
def test_as_many_batches_are_validated_as_were_asked_for(runs, monkeypatch, steps):
    seen = []

    def valid_step(trainer, sample, upstream=MoETrainer.valid_step, **more):
        seen.append(sample)
        return upstream(trainer, sample, **more)

    monkeypatch.setattr(MoETrainer, "valid_step", valid_step)
    run = runs.train("run", *MOE, "--max-valid-steps", steps, updates=1, validate=True)
    assert run.status == 0 and len(seen) == steps


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ("caf<0xC3><0xA9>", "café"),
        ("<0xF0><0x9F><0x98><0x80>!", "😀!"),
        ("<0xC3>?", "\ufffd?"),
        ("a<0x20>b <0x> <0xg1>", "a b <0x> <0xg1>"),
    ],
)
def test_pieces_of_bytes_are_text(pieces, text):
    assert with_bytes(pieces) == text


def test_bytes_are_joined_when_fairseq_joins_pieces():
    assert data_utils.post_process("▁un ▁caf <0xC3> <0xA9>", "sentencepiece") == "un café"
    assert data_utils.post_process("caf <0xC3> <0xA9>", "none") == "caf <0xC3> <0xA9>"


def test_weights_of_other_sizes_are_told_by_the_options(runs, checkpoint, capsys):
    sizes = ("--decoder-input-dim", 16, "--decoder-output-dim", 16)
    run = runs.train("other", *MOE, *sizes, "--finetune-from-model", checkpoint)
    assert run.status == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert line.startswith(f"error: --finetune-from-model {checkpoint}: does not fit the model: ")
    assert line.endswith("it was trained with: --decoder-output-dim 32, --decoder-input-dim 32")


def test_inspect_counts_the_weights_that_the_log_counts(module_runs, checkpoint, caplog, capsys):
    from evomoe_plugin.cli import main as evomoe

    module_runs.train("moe", *MOE, updates=1)  # which ends after loading, and logs sizes
    (total,) = set(re.findall(r"parameters: ([\d,]+) in total", caplog.text))
    assert evomoe(["checkpoint", "inspect", str(checkpoint)]) == 0
    assert f"{total}, of experts" in capsys.readouterr().out
    assert torch.load(checkpoint, weights_only=False)["model"]["decoder.version"].numel() == 1


@pytest.mark.parametrize("mode", ["eos", "complete_doc"])
def test_data_of_which_no_sample_is_left_is_refused(runs, mode, capsys):
    """Every line has 9 tokens or more."""
    options = ("--sample-break-mode", mode, "--tokens-per-sample", "5")
    assert runs.train("run", *MOE, *options).status == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert "are longer than 5 tokens; at most 10% of a data set may be left out" in line
