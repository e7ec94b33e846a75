"""Every file of `hydra_configs/paper` and `small` composes, builds what it names, and trains."""

from __future__ import annotations

import copy
import functools
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from fairseq import optim, options
from fairseq.data import Dictionary
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.initialize import add_defaults, hydra_init
from fairseq.optim import lr_scheduler
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq_cli import preprocess
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import evomoe_plugin  # noqa: F401  registers what the files name
from evomoe_plugin.config.run_checks import check_run
from evomoe_plugin.gates.context import GateContext
from evomoe_plugin.gates.dense_to_sparse_options import annealing_updates
from evomoe_plugin.models.accounting import count_parameters

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "hydra_configs"
PLUGIN = ROOT / "evomoe_plugin" / "launch" / "hydra_plugins" / "evomoe_searchpath"

# Those of other decoders and of other tasks: tests/test_hydra_causal_lm.py, test_hydra_tasks.py.
CAUSAL_LM = ("llama", "phi", "qwen")
ENCODERS = ("roberta", "wmt", "iwslt", "glue")
PAPER = sorted(f"paper/{path.stem}" for path in (CONFIGS / "paper").glob("gpt_*.yaml"))
SMALL = sorted(
    f"small/{path.stem}"
    for path in (CONFIGS / "small").glob("*.yaml")
    if not path.stem.startswith(CAUSAL_LM + ENCODERS)
)
RUNS = PAPER + SMALL

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*version_base")

# What is on record about the runs (see base.yaml for the sources), and what ours add to it.
SHARED = {
    "common.seed": 1234,
    "optimizer._name": "adam",
    "optimizer.adam_betas": [0.9, 0.98],
    "optimizer.adam_eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.activation_fn": "gelu",
    "model.share_decoder_input_output_embed": True,
    "model.moe_gating_use_fp32": "True",
    "criterion._name": "moe_cross_entropy",
}
ON_GPUS = {
    "model.checkpoint_activations": True,
    "distributed_training.ddp_backend": "fully_sharded",
    "checkpoint.write_checkpoints_asynchronously": True,
    "checkpoint.symlink": True,
    "common.log_format": "json",
    "common.log_interval": 100,
}
SIZES = {  # layers, width, hidden width, heads
    "gpt_medium": (24, 1024, 4096, 16),
    "gpt_small": (12, 768, 3072, 12),
    "gpt_tiny": (4, 128, 512, 4),
}
COSINE = {
    "lr_scheduler._name": "cosine",
    "lr_scheduler.warmup_init_lr": 1e-7,
    "optimization.clip_norm": 1.0,
}
POLYNOMIAL = {"lr_scheduler._name": "polynomial_decay", "optimization.clip_norm": 5.0}
DTS = {
    "model.moe_gate": "dense_to_sparse",
    "model.moe_temperature_schedule": "linear",
    "model.moe_gate_threshold": 0.001,
    "model.moe_gate_noise": "gumbel",
    "model.moe_combine_weights": "gate",
    "criterion.moe_gate_loss_wt": 0.0,
}
SWITCH = {
    "model.moe_gate": "switch",
    "model.moe_capacity_factor": 2.0,
    "criterion.moe_gate_loss_wt": 0.01,
}
LEXICAL = {
    "model.moe_lexical": "normal:3",
    "model.moe_expert_size_factor": 4,
    "model.moe_weight_scale": "unit",
    "model.moe_weight_total": 4,
    "model.moe_aux": "none",
}
VARIANTS = {
    "dts": DTS,
    "dts_softmax": {**DTS, "model.moe_combine_weights": "softmax"},
    "dts_balanced": {**DTS, "criterion.moe_gate_loss_wt": 0.01},
    "evomoe": {**DTS, "model.moe_spawn_method": "mask", "model.moe_spawn_rate": 0.3},
    "dense_moe": {"model.moe_gate": "dense", "criterion.moe_gate_loss_wt": 0.0},
    "switch": SWITCH,
    "switch_no_aux": {
        **SWITCH,
        "model.moe_capacity_factor": None,
        "criterion.moe_gate_loss_wt": 0.0,
    },
    "gshard": {"model.moe_gate": "gshard", "criterion.moe_gate_loss_wt": 0.01},
    "base_layers": {"model.moe_gate": "base"},
    "hash": {"model.moe_gate": "hash", "model.moe_hash": "balanced"},
    "stablemoe": {"model.moe_gate": "stable", "model.moe_stable_dim": 50},
    "dselect_k": {"model.moe_gate": "dselect_k"},
    "remoe": {"model.moe_gate": "relu", "model.moe_l1_factor": 1.2},
    "deepseek_style": {
        "model.moe_gate": "top_k",
        "model.moe_scorer": "sigmoid",
        "model.moe_shared_experts": 1,
        "model.moe_top_k_weights": "renormalized",
        "model.moe_expert_size_factor": 4,
    },
    "plain_moe": {
        "model.moe_gate": "top_k",
        "model.moe_top_k": 2,
        "model.moe_capacity_factor": 1.2,
    },
    "dynmoe": {"model.moe_gate": "top_any", "criterion.moe_gate_loss_wt": 0.01},
    "dcmoe": {
        "model.moe_gate": "top_p",
        "model.moe_top_p": 0.7,
        "model.moe_shared_experts": 2,
        "model.moe_null_experts": 1,
        "model.moe_shared_combine": "softmax",
        "criterion.moe_gate_loss_wt": 0.025,
    },
    "lexical": {"model.moe_gate": "top_k", "model.moe_top_k": 4, **LEXICAL},
    "lexical_annealed": {
        "model.moe_gate": "dense_to_sparse",
        "model.moe_hard_top_k": 4,
        **LEXICAL,
    },
    "dense2moe": {
        "model.moe_gate": "top_k",
        "model.moe_top_k": 2,
        "model.moe_aux": "mi=1",
        "criterion.moe_gate_loss_wt": 0.01,
    },
}
# (at the first update, at the last) of 8 experts; a pair of bounds where it is not one number
EXPERTS_PER_TOKEN = {
    "dense_moe": (8, 8),
    "switch": (1, 1),
    "gshard": (2, 2),
    "base_layers": (1, 1),
    "hash": (1, 1),
    "stablemoe": (1, 1),
    "dselect_k": ((1, 8), (1, 8)),
    "remoe": ((2, 6), (2, 6)),
    "deepseek_style": (4, 4),
    "plain_moe": (2, 2),
    "dynmoe": ((1, 4), (1, 4)),
    "dcmoe": ((1, 4), (1, 4)),
    "dense2moe": (2, 2),
    "lexical": (4, 4),
    "lexical_annealed": ((4, 20), 4),
    "dts": ((7, 8), 1),
    "dts_balanced": ((7, 8), 1),
    "dts_softmax": ((7, 8), 1),
    "evomoe": ((7, 8), 1),
}


def size_and_variant(run: str) -> tuple[str, str]:
    folder, name = run.split("/")
    if folder == "small":
        return "gpt_tiny", name.removeprefix("evomoe_")
    size = "gpt_medium" if name.startswith("gpt_medium_") else "gpt_small"
    return size, name.removeprefix(size + "_")


def recorded(run: str) -> dict:
    """Field -> value that the run must have."""
    size, variant = size_and_variant(run)
    fields = (
        "decoder_layers",
        "decoder_embed_dim",
        "decoder_ffn_embed_dim",
        "decoder_attention_heads",
    )
    polynomial = size == "gpt_small" or variant == "dts_balanced"
    own_count = variant in ("dcmoe", "dense2moe", "dynmoe", "deepseek_style")
    slices = 4 if "lexical" in variant else 1
    experts = str(slices * (8 if size == "gpt_tiny" else 16))
    count = {} if own_count else {"model.moe_expert_count": experts}
    return {
        **SHARED,
        **count,
        **({} if size == "gpt_tiny" else ON_GPUS),
        "model.moe_freq": 1 if (size, variant) == ("gpt_tiny", "dense2moe") else 2,
        "criterion.moe_gate_loss_combine_method": "average" if variant == "dcmoe" else "sum",
        "model._name": f"transformer_lm_{size.replace('_', '')}_moe",
        **{f"model.{field}": value for field, value in zip(fields, SIZES[size], strict=True)},
        **(POLYNOMIAL if polynomial else COSINE),
        **VARIANTS[variant],
    }


def composed(run: str, *overrides: str):
    """The configuration as `fairseq-hydra-train` composes it, before fairseq has a look."""
    hydra_init(run)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):  # what fairseq gets by default
        return compose(run, list(overrides))


@functools.cache
def resolved(run: str, *overrides: str):
    """The same as training gets it: fairseq's steps between composing and training."""
    cfg = composed(run, "checkpoint.save_dir=unused", *overrides)
    add_defaults(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    OmegaConf.set_struct(cfg, True)
    return cfg


def task_with(cfg, words: int) -> LanguageModelingTask:
    dictionary = Dictionary()
    for i in range(words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    return LanguageModelingTask(cfg.task, dictionary, dictionary)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A tiny data set, binarised by fairseq."""
    folder = tmp_path_factory.mktemp("hydra-data")
    dice = random.Random(0)
    arguments = ["--only-source", "--destdir", str(folder / "bin"), "--workers", "1"]
    for split, lines in (("train", 300), ("valid", 30)):
        words = [[f"w{dice.randrange(60)}" for _ in range(20)] for _ in range(lines)]
        (folder / split).write_text("".join(" ".join(line) + "\n" for line in words))
        arguments += [f"--{split}pref", str(folder / split)]
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
    return folder / "bin"


@pytest.fixture
def hydra_train(data, tmp_path):
    """Runs `fairseq-hydra-train` with the clone and its Hydra plugin on the path; its output."""
    plugins = tmp_path / "plugins"
    shutil.copytree(PLUGIN, plugins / "hydra_plugins" / PLUGIN.name)

    def run(*arguments: object, cwd: Path) -> str:
        script = Path(sysconfig.get_path("scripts")) / "fairseq-hydra-train"
        ended = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            cwd=cwd,
            text=True,
            timeout=300,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{plugins}",
                "OMP_NUM_THREADS": "1",
                "PYTHONWARNINGS": "ignore",
            },
        )
        assert ended.returncode == 0, ended.stdout[-4000:]
        return ended.stdout

    return run


def short(data: Path, updates: int) -> list[str]:
    """Overrides for a run of some seconds."""
    return [
        f"task.data={data}",
        f"optimization.max_update={updates}",
        "task.tokens_per_sample=32",
        "dataset.batch_size=8",
        "model.decoder_embed_dim=32",
        "model.decoder_ffn_embed_dim=64",
        "lr_scheduler.warmup_updates=2",
        "common.log_interval=1",
        "common.log_format=json",
    ]


def updates_in(folder: Path) -> int:
    """Updates that the last checkpoint in the folder of a run has behind it."""
    path = folder / "checkpoints" / "checkpoint_last.pt"
    state = torch.load(path, weights_only=False)
    assert state["cfg"]["checkpoint"]["save_dir"] == str(folder / "checkpoints")
    return state["optimizer_history"][-1]["num_updates"]


def test_every_recorded_run_has_a_file():
    variants = ["dense_moe", "dts", "dts_balanced", "dts_softmax", "switch"]
    sizes = ("gpt_medium", "gpt_small")
    assert {f"paper/{s}_{v}" for s in sizes for v in variants} <= set(PAPER)
    assert set(VARIANTS) - {"switch_no_aux"} == {size_and_variant(run)[1] for run in SMALL}
    assert set(VARIANTS) == {size_and_variant(run)[1] for run in PAPER}


@pytest.mark.parametrize("run", RUNS)
def test_values_are_those_on_record(run):
    cfg = resolved(run)
    wanted = recorded(run)
    assert {field: OmegaConf.select(cfg, field) for field in wanted} == wanted


# Of each size one: the paper's runs are the small ones but for size, as another test holds.
@pytest.mark.parametrize(
    "run", [*SMALL, "paper/gpt_small_evomoe", "paper/gpt_medium_dts", "paper/gpt_medium_dense2moe"]
)
def test_fairseq_builds_what_a_run_names(run):
    cfg = resolved(run)
    task = task_with(cfg, words=1000)
    with torch.device("meta"):
        model = task.build_model(cfg.model)
    assert (
        type(model).__name__
        == {
            "gpt_medium": "GPTMediumMoE",
            "gpt_small": "GPTSmallMoE",
            "gpt_tiny": "GPTTinyMoE",
        }[size_and_variant(run)[0]]
    )
    layers = {"paper/gpt_medium_dense2moe": 4}.get(run, cfg.model.decoder_layers // 2)
    assert len(model.decoder.moe_layers) == layers
    assert {layer.num_experts for layer in model.decoder.moe_layers} == {
        max(int(cfg.model.moe_expert_count), cfg.model.moe_max_experts)
    }
    criterion = task.build_criterion(cfg.criterion)
    assert criterion.gate_loss_weight == cfg.criterion.moe_gate_loss_wt
    assert criterion.combine_method == cfg.criterion.moe_gate_loss_combine_method


@pytest.mark.parametrize("run", RUNS)
def test_learning_rate_rises_and_falls(run):
    cfg = resolved(run)
    optimizer = optim.build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.zeros(1))])
    assert optimizer.optimizer_config["betas"] == [0.9, 0.98]
    assert optimizer.optimizer_config["weight_decay"] == 0.1
    schedule = lr_scheduler.build_lr_scheduler(cfg.lr_scheduler, optimizer)
    peak, last = cfg.optimization.lr[0], cfg.optimization.max_update
    start = 1e-7 if cfg.lr_scheduler._name == "cosine" else 0.0
    warm = cfg.lr_scheduler.warmup_updates
    assert 0 < warm <= last / 10
    rates = [schedule.step_update(n) for n in (0, warm, (warm + last) // 2, last - 1)]
    assert rates == pytest.approx([start, peak, peak / 2, 0], rel=1e-3, abs=peak / 200)


@pytest.mark.parametrize("run", RUNS)
def test_no_run_is_refused(run, data):
    cfg = copy.deepcopy(resolved(run))
    cfg.task.data = str(data)
    check_run(cfg, cfg.distributed_training.distributed_world_size)


@pytest.mark.parametrize(
    ("run", "parameters"),
    [
        ("paper/gpt_medium_dts", 1.8e9),  # the third party's table; the paper's dense base is 335 M
        ("paper/gpt_small_dts", 0.5e9),
    ],
)
def test_size_is_that_of_the_paper(run, parameters):
    count = count_parameters(resolved(run).model, vocabulary=50264)
    assert count.total == pytest.approx(parameters, rel=0.1)
    assert count.active_top1 < count.total / 3


@pytest.mark.parametrize("run", SMALL)
def test_experts_per_token_are_those_of_the_method(run):
    cfg = resolved(run)
    model = task_with(cfg, words=100).build_model(cfg.model)
    variant = size_and_variant(run)[1]
    x_TD = torch.randn(64, 128)
    keys_T = torch.arange(64)

    def experts_per_token(num_updates: int) -> float:
        gate = model.decoder.moe_layers[0].gate
        plan = gate(x_TD, GateContext(num_updates, token_keys_T=keys_T, token_ids_T=keys_T))
        return plan.num_pairs / 64

    for updates, wanted in zip(
        (0, cfg.optimization.max_update), EXPERTS_PER_TOKEN[variant], strict=True
    ):
        low, high = wanted if isinstance(wanted, tuple) else (wanted, wanted)
        assert low <= experts_per_token(updates) <= high
    if variant.startswith("dts"):
        assert 1 < experts_per_token(80) < experts_per_token(0)


# What a small run scales down beside the sizes of every small run.
SCALED = {
    "dense2moe": {"moe_start_layer", "moe_freq"},
    "dynmoe": {"moe_max_experts", "moe_adapt_record_interval", "moe_adapt_window"},
    "deepseek_style": {"moe_bias_update_rate"},
    "remoe": {"moe_l1_start"},
    "evomoe": {"moe_spawn_updates"},
}


@pytest.mark.parametrize("run", SMALL)
def test_a_small_run_is_its_paper_run_but_for_size(run):
    variant = size_and_variant(run)[1]
    larger = next(name for name in PAPER if size_and_variant(name)[1] == variant)
    small, paper = resolved(run), resolved(larger)
    size = {"moe_expert_count", "max_update"} | SCALED.get(variant, set())
    for group in ("model", "criterion", "optimizer", "lr_scheduler"):
        if group == "lr_scheduler" and small[group]._name != paper[group]._name:
            continue  # GPT small has its own
        for field, value in paper[group].items():
            if group != "model" or (field.startswith("moe_") and field not in size):
                scaled = field in ("warmup_updates", "lr", "max_update", "total_num_update")
                assert scaled or small[group][field] == value, field


@pytest.mark.parametrize("run", [run for run in RUNS if run.endswith("evomoe")])
def test_both_phases_are_in_one_run(run):
    cfg = resolved(run)
    assert cfg.model.moe_spawn_updates == cfg.optimization.max_update // 10
    # A share of the nine tenths that are left.
    assert annealing_updates(cfg.model) == round(0.27 * cfg.optimization.max_update)


def test_every_field_of_fairseq_is_there():
    cfg = resolved("small/evomoe_dts")
    for group, field in FairseqConfig.__dataclass_fields__.items():
        if isinstance(field.default, type):
            assert set(cfg[group]) == set(field.default.__dataclass_fields__), group
        elif group != "_name":
            assert group in cfg


@pytest.mark.parametrize("run", ["small/evomoe_dts", "paper/gpt_small_switch"])
def test_fields_and_groups_are_overridden_without_a_plus(run):
    given = {
        "common.empty_cache_freq": 7,
        "task.add_bos_token": True,
        "model.decoder_layerdrop": 0.25,
        "model.moe_temperature_end": 0.2,
        "criterion.sentence_avg": True,
        "optimizer.adam_eps": 1e-6,
        "optimization.update_freq": [2],
        "bmuf.block_lr": 2.0,
        "dataset.max_tokens": 99,
        "checkpoint.patience": 3,
        "ema.ema_decay": 0.5,
        "distributed_training.distributed_port": 1,
        "generation.beam": 2,
        "eval_lm.softmax_batch": 8,
        "common_eval.quiet": True,
        "interactive.buffer_size": 5,
        "lr_scheduler.warmup_updates": 17,
    }
    choices = ["gate=dense_moe", "model=transformer_lm_gptxl_moe", "bpe=gpt2"]
    cfg = resolved(run, *choices, *(f"{f}={v}".replace(" ", "") for f, v in given.items()))
    assert {field: OmegaConf.select(cfg, field) for field in given} == given
    assert cfg.model.decoder_layers == 48
    assert cfg.model.moe_gate == "dense"
    assert cfg.bpe._name == "gpt2"


def test_the_old_name_of_an_option_is_accepted(data):
    cfg = resolved("small/evomoe_dts", "model.moe_products_dtype=bf16", f"task.data={data}")
    check_run(cfg, 1)
    assert cfg.model.moe_matmul_dtype == "bf16"


def test_training_from_the_clone(hydra_train, data, tmp_path):
    output = hydra_train(
        "--config-dir",
        "hydra_configs",
        "--config-name",
        "small/evomoe_dts",
        *short(data, updates=6),
        "model.moe_temperature_end=0.2",
        f"hydra.run.dir={tmp_path}/run",
        cwd=ROOT,
    )
    assert updates_in(tmp_path / "run") == 6
    model = torch.load(tmp_path / "run/checkpoints/checkpoint_best.pt", weights_only=False)
    assert model["cfg"]["model"]["moe_temperature_end"] == 0.2
    assert '"experts_per_token": "8' in output
    assert '"experts_per_token": "1"' in output
    assert '"temperature": "0.2"' in output


@pytest.mark.slow
def test_one_command_runs_both_phases(hydra_train, data, tmp_path):
    output = hydra_train(
        "--config-dir",
        "hydra_configs",
        "--config-name",
        "small/evomoe",
        *short(data, updates=12),
        "model.moe_spawn_updates=2",
        f"hydra.run.dir={tmp_path}/run",
        cwd=ROOT,
    )
    assert updates_in(tmp_path / "run") == 12
    experts = [float(n) for n in re.findall(r'"experts_per_token": "([\d.]+)"', output)]
    assert experts[:2] == [1, 1] and experts[2] > 7 and experts[-1] == 1
    assert output.count("spawned 8 experts in each of 2 MoE layers") == 1


@pytest.mark.slow
def test_a_sweep_from_any_folder_without_config_dir(hydra_train, data, tmp_path):
    hydra_train(
        "--config-name",
        "small/evomoe_dts_balanced",
        "-m",
        *short(data, updates=4),
        "model.moe_temperature_end=0.2,0.5",
        cwd=tmp_path,
    )
    (sweep,) = (tmp_path / "outputs/small/evomoe_dts_balanced").iterdir()
    for job, end in (("0", 0.2), ("1", 0.5)):
        assert updates_in(sweep / job) == 4
        state = torch.load(sweep / job / "checkpoints/checkpoint_last.pt", weights_only=False)
        assert state["cfg"]["model"]["moe_temperature_end"] == end


@pytest.mark.slow
def test_the_same_command_in_an_old_folder_resumes(hydra_train, data, tmp_path):
    def train(*more: str) -> Path:
        hydra_train(
            "--config-dir",
            CONFIGS,
            "--config-name",
            "small/switch",
            *short(data, updates=4),
            *more,
            cwd=tmp_path,
        )
        return max((tmp_path / "outputs/small/switch").iterdir())

    first = train("optimization.stop_time_hours=1e-9")
    assert updates_in(first) == 1
    assert train(f"hydra.run.dir={first.relative_to(tmp_path)}") == first
    assert updates_in(first) == 4
    assert train() != first
