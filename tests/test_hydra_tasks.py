"""The files of `hydra_configs` for masked language models, translation and GLUE."""

from __future__ import annotations

import copy
import shlex

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.models.roberta import model as fairseq_roberta
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

from evomoe_plugin.config.run_checks import check_run
from evomoe_plugin.data.glue import TASKS as GLUE
from evomoe_plugin.gates.dense_to_sparse_options import annealing_updates
from evomoe_plugin.models import roberta
from tests.test_hydra_configs import CONFIGS, DTS, resolved

DTS_SOFTMAX = {**DTS, "model.moe_combine_weights": "softmax"}
GATES = {
    "dts": DTS_SOFTMAX,
    "evomoe": {**DTS_SOFTMAX, "model.moe_spawn_method": "mask", "model.moe_spawn_rate": 0.3},
    "dense_moe": {"model.moe_gate": "dense", "criterion.moe_gate_loss_wt": 0.0},
    "switch": {"model.moe_gate": "switch", "criterion.moe_gate_loss_wt": 0.01},
}
# What is on record (docs/coming-from.md); the sources are in the files.
ROBERTA = {
    "task._name": "masked_lm",
    "criterion._name": "moe_masked_lm",
    "criterion.moe_gate_loss_combine_method": "sum",
    "optimizer.adam_betas": [0.9, 0.98],
    "optimizer.weight_decay": 0.01,
    "optimization.clip_norm": 0.0,
    "lr_scheduler._name": "polynomial_decay",
}
TRANSLATION = {
    "task._name": "translation",
    "criterion._name": "moe_label_smoothed_cross_entropy",
    "criterion.label_smoothing": 0.1,
    "criterion.moe_gate_loss_combine_method": "sum",
    "optimizer.adam_betas": [0.9, 0.98],
    "optimizer.weight_decay": 1e-4,
    "lr_scheduler._name": "inverse_sqrt",
}
MODELS = {  # what is on record, MoE layers of each stack, experts
    "paper/roberta_large": (ROBERTA, "roberta_large_moe", [12], 16),
    "small/roberta": (ROBERTA, "roberta_tiny_moe", [2], 8),
    "paper/wmt": (TRANSLATION, "transformer_wmt_en_de_big_moe", [3, 3], 4),
    "small/wmt": (TRANSLATION, "transformer_tiny_moe", [1, 1], 4),
    "paper/iwslt": (TRANSLATION, "transformer_iwslt_de_en_moe", [3, 3], 4),
    "small/iwslt": (TRANSLATION, "transformer_tiny_moe", [1, 1], 4),
}
# Those that the study of benchmarks/study was declared with.
STUDIED = [f"small/{model}_{gate}" for model in ("roberta", "wmt") for gate in ("dts", "evomoe")]
RUNS = {
    f"{model}_{gate}": (model, gate)
    for model in MODELS
    for gate in (["dts"] if model.endswith("iwslt") else GATES)
}
WMT = {
    "optimization.lr": [5e-4],
    "lr_scheduler.warmup_updates": 4000,
    "dataset.max_tokens": 4096,
    "model.dropout": 0.3,
}
ANNEALING = ("start", "end", "updates")


@pytest.fixture(autouse=True)
def without_bert_init(monkeypatch):
    """It copies weights to the CPU, which those on the meta device cannot be."""
    for module in (roberta, fairseq_roberta):
        monkeypatch.setattr(module, "init_bert_params", lambda module: None)


def values(run, wanted):
    cfg = resolved(run)
    return {field: OmegaConf.select(cfg, field) for field in wanted}


def task_of(cfg):
    words = Dictionary()
    for i in range(60):
        words.add_symbol(f"w{i}")
    words.add_symbol("<mask>")
    if cfg.task._name == "sentence_prediction":
        return TASK_REGISTRY[cfg.task._name](cfg.task, words, words)
    sides = (words,) if cfg.task._name == "masked_lm" else (words, words)
    return TASK_REGISTRY[cfg.task._name](cfg.task, *sides)


def test_every_file_is_of_a_run():
    files = {
        f"{folder}/{path.stem}"
        for folder in ("paper", "small")
        for path in (CONFIGS / folder).glob("*.yaml")
        if path.stem.startswith(("roberta", "wmt", "iwslt"))
    }
    assert files == RUNS.keys()
    assert {path.stem for path in (CONFIGS / "glue").glob("*.yaml")} == GLUE.keys()


@pytest.mark.parametrize("run", RUNS)
def test_values_and_models_are_those_on_record(run):
    model, gate = RUNS[run]
    on_record, arch, layers, experts = MODELS[model]
    wanted = {**on_record, **GATES[gate], "model._name": arch}
    if run.startswith("paper/wmt"):
        wanted |= WMT
    if run in STUDIED:
        wanted["model.moe_combine_weights"] = "gate"
    assert values(run, wanted) == wanted
    cfg = copy.deepcopy(resolved(run))
    with torch.device("meta"):
        built = task_of(cfg).build_model(cfg.model)
    assert [len(stack.moe_layers) for stack in built.moe_stacks.values()] == layers
    assert {
        layer.num_experts for stack in built.moe_stacks.values() for layer in stack.moe_layers
    } == {experts}
    small = run.replace("paper/", "small/").replace("_large", "")
    if small in RUNS:  # equal but for size
        scaled = {"moe_expert_count", "moe_spawn_updates", "moe_hard_updates"}
        scaled |= {"moe_temperature_updates"}
        if small in STUDIED:
            scaled.add("moe_combine_weights")
        other = resolved(small).model
        for field, value in cfg.model.items():
            if field.startswith("moe_") and field not in scaled:
                assert other[field] == value, field


def test_annealing_and_capacities_of_translation_are_those_of_the_scripts():
    for run, annealing, hard in (("wmt_dts", 5000, 6000), ("iwslt_dts", 1000, 2000)):
        model = resolved(f"paper/{run}").model
        assert [model[f"moe_temperature_{name}"] for name in ANNEALING] == [2.0, 0.5, annealing]
        assert model.moe_hard_updates == hard
    for size, share in (("paper", 20000), ("small", 300)):  # of the same shares of the run
        cfg = resolved(f"{size}/iwslt_dts")
        assert cfg.optimization.max_update == share
        assert cfg.model.moe_temperature_updates * 20 == cfg.model.moe_hard_updates * 10 == share
        assert cfg.model.share_decoder_input_output_embed and not cfg.model.share_all_embeddings
    assert resolved("paper/wmt_switch").model.moe_capacity_factor == 1.0
    assert resolved("paper/roberta_large_switch").model.moe_capacity_factor == 2.0


@pytest.mark.parametrize("run", [run for run in RUNS if run.endswith("evomoe")])
def test_the_spawn_is_a_tenth_of_the_run(run):
    cfg = resolved(run)
    assert cfg.model.moe_spawn_updates == cfg.optimization.max_update // 10
    assert annealing_updates(cfg.model) > 0


@pytest.mark.parametrize("task", GLUE)
def test_glue_is_fine_tuned_as_its_card_says(task):
    cfg = resolved("paper/glue_dynmoe", f"glue={task}")
    flags = shlex.split(" ".join(GLUE[task].flags))
    given = dict(zip(flags, [*flags[1:], ""], strict=True))
    assert cfg.task.num_classes == int(given["--num-classes"])
    assert cfg.checkpoint.best_checkpoint_metric == given["--best-checkpoint-metric"]
    assert cfg.checkpoint.maximize_best_checkpoint_metric
    assert cfg.task.regression_target == cfg.criterion.regression_target
    for name in ("report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"):
        assert getattr(cfg.criterion, name) == (f"--{name.replace('_', '-')}" in flags)
    assert cfg.criterion.regression_target == ("--regression-target" in flags)


@pytest.mark.parametrize("run", ["paper/glue_dynmoe", "small/glue_dts"])
def test_published_settings_of_glue(run):
    wanted = {
        "task._name": "sentence_prediction",
        "criterion._name": "moe_sentence_prediction",
        "optimizer.weight_decay": 0.0,
        "optimizer.adam_betas": [0.9, 0.999],
        "optimization.max_epoch": 10,
        "dataset.batch_size": 32,
        "lr_scheduler.warmup_updates": 0,
    }
    assert values(run, wanted) == wanted
    cfg = copy.deepcopy(resolved(run))
    with torch.device("meta"):
        model = task_of(cfg).build_model(cfg.model)
    layers = model.encoder.sentence_encoder.moe_layers
    if run.startswith("paper"):
        assert [layer.num_experts for layer in layers] == [16]
        assert cfg.optimization.lr[0] in (2e-5, 3e-5, 5e-5)


@pytest.mark.parametrize("run", ["paper/glue_dynmoe", "small/glue_dts", "small/iwslt_dts"])
def test_no_run_is_refused(run, tmp_path):
    cfg = copy.deepcopy(resolved(run))
    cfg.task.data = str(tmp_path)
    (tmp_path / "input0").mkdir()
    for name in ("dict.de.txt", "train.de-en.de.idx", "input0/dict.txt", "input0/train.idx"):
        (tmp_path / name).touch()  # as far as the check looks
    check_run(cfg, 1)
