"""`docs/coming-from.md`: everything it names exists, and every feature of the systems has a row."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from fairseq import options
from fairseq.dataclass.initialize import hydra_init
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import TASK_REGISTRY
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import evomoe_plugin  # noqa: F401  registers the models, whose options are asked for
from evomoe_plugin.cli import VERBS
from evomoe_plugin.config.checks import validate
from evomoe_plugin.gates import gate_names
from evomoe_plugin.models.language_model import MoELanguageModel
from evomoe_plugin.routing import stats as st

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "hydra_configs"
PAGE = (ROOT / "docs/coming-from.md").read_text()
NOT_YET = "**not yet**"

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*version_base")

# What the documents of each system name: options, arguments, fields and files; then features.
THEIRS = {
    "DCMoE (Uni-MoE 2.0)": (
        """
        --initialize --moe_copy --fp32_gate --ep_size --mlp_dynamic_expert_num
        --mlp_fixed_expert_num --mlp_dynamic_null_expert_num --dynamic_mlp_size_factor
        --fixed_mlp_size_factor --mlp_dynamic_top_p --mlp_dynamic_top_k --token_drop --drop_policy
        --min_capacity --capacity_factor --l_aux_weight --aux_balance_weight
        --model_name_or_path --processor_path --data_path --image_root --output_dir --deepspeed
        --attn_implementation --bf16 --num_train_epochs --per_device_train_batch_size
        --per_device_eval_batch_size --gradient_accumulation_steps --learning_rate --weight_decay
        --warmup_ratio --lr_scheduler_type --logging_steps --save_strategy --save_steps
        --save_total_limit --model_max_length --gradient_checkpointing --dataloader_num_workers
        --evaluation_strategy --report_to --run_name ./data script/training.sh
        train_unimoev2_qwen2vl.py single_gpu_without_ep.py multi_gpu_with_ep.py --master_addr
        --master_port
    """,
        "Dynamic-Capacity Routing, Shared Experts, Routed Experts, Null Experts, conda create",
    ),
    "DynMoE": (
        """
        hidden_size expert num_experts ep_size use_residual k min_capacity noisy_gate_policy
        max_expert_num if_begin_record_routing if_end_record_routing DynMoE-DeepSpeed DynMoE-Tutel
        EMoE/Language EMoE/Vision.md MoE-LLaVA/ Deepspeed/ EMoE/tutel/
    """,
        "Top-Any Gating, Adaptive Training Process, Model Zoo, Environment Setup",
    ),
    "Dense2MoE": (
        """
        num_experts expert_top_k moe_start_layer moe_layer_freq gate_type aux_loss_type
        aux_loss_weight
        --num_gpus --master_port --deepspeed --stage --finetuning_type --do_train --template
        --cutoff_len --model_name_or_path --dataset_dir --dataset --learning_rate --overwrite_cache
        --num_train_epochs --ddp_find_unused_parameters --plot_loss --overwrite_output_dir
        --output_dir --Dense2MoE --MoE_config_path --per_device_train_batch_size
        MoLlamaForCausalLM MoLlamaConfig from_pretrained reinit_mlp
        deepspeed.zero.GatheredParameters PMoE
    """,
        "gate loss in the forward pass, Deepspeed MoE, Residual Mixture of Experts",
    ),
    "Plain PyTorch MoE": (
        """
        moe_intral.py moe_stand.py Expert gen_data router gate expert_capacity dist.all_reduce
        DistributedDataParallel DistributedSampler dist.init_process_group NCCL
        torch.multiprocessing.spawn MASTER_ADDR MASTER_PORT torch_npu model.eval()
    """,
        "Top-k Selection, Weighted Aggregation, Capacity Factor, Importance Loss, "
        "Load Balance Loss, Expert Usage, Device Allocation, Inter-Device Communication",
    ),
    "EvoMoE": (
        """
        train.py DATA_PATH --distributed-world-size --distributed-rank --distributed-init-method
        OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_RANK --task --arch --share-decoder-input-output-embed
        --tokens-per-sample --batch-size --update-freq --lr --lr-scheduler --warmup-updates
        --optimizer --adam-betas --adam-eps --clip-norm --weight-decay --dropout --criterion
        --write-checkpoints-asynchronously --save-dir --save-interval-updates --num-workers
        --ddp-backend --checkpoint-activations --max-update --total-num-update
        --validate-interval-updates --log-format --log-interval --symlink --seed
        moe_freq moe_expert_count moe_gating_use_fp32 moe_expert_ffn_dim moe_top1_expert
        moe_train_capacity_token_fraction moe_eval_capacity_token_fraction use_moe_pad_mask
        moe_topk_expert topk use_gumbel_softmax use_gumbel_gates gumbel_decay_scheduler
        gumbel_decay_factor max_temperature min_temperature switch_to_hard_gumbel_softmax
        save_trace moe_gate_loss_wt moe_gate_loss_combine_method moe_gate_loss_transform
        encoder_moe_freq decoder_moe_freq alternate_ffn_embed_dim moe_masked_lm
        cross_entropy_gumbel masked_lm_gumbel moe_label_smoothed_cross_entropy roberta_large_moe
        roberta_xl transformer_iwslt_de_en_moe
    """,
        "apex, FairScale, Hydra, PyArrow, Switch, BASE, Hash, StableMoE",
    ),
    "The moe branch of fairseq": (
        """
        --moe-freq --moe-expert-count --moe-gating-use-fp32 --moe-second-expert-policy
        --moe-normalize-gate-prob-before-dropping --moe-expert-ffn-dim --moe-top1-expert
        --moe-eval-capacity-token-fraction --moe-normalize-expert-grad --use-moe-pad-mask
        --record-a2a-perf-stats --dummy-a2a --moe-batch-prioritized-routing --use-stable-embedding
        --alternate-decoder-ffn-embed-dim --moe-gate-loss-wt --moe-gate-loss-combine-method
        --moe-gate-loss-transform --is-moe
    """,
        "Tutel, the auxiliary loss",
    ),
}


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The rows of all tables, three cells each."""
    cells = [re.split(r" ?\| ?", line)[1:-1] for line in text.splitlines() if line[:1] == "|"]
    assert all(len(row) == 3 for row in cells), [row for row in cells if len(row) != 3]
    return [row for row in cells if row[0] != "theirs" and set(row[0]) != {"-"}]


def commands() -> list[list[str]]:
    """The commands of all blocks, as a shell would divide them."""
    blocks = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.strip()]


ROWS = {title: rows(text) for title, text in sections().items()}
COMMANDS = {
    name: [words[1:] for words in commands() if words[0] == name]
    for name in {words[0] for words in commands()}
}


def flags(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


@functools.cache
def known_flags() -> frozenset[str]:
    """Of fairseq's commands with the plugin, and of our own."""
    training = "--arch causal_lm_moe --criterion moe_cross_entropy --optimizer adam".split()
    tasks = [("--task", "language_modeling"), ("--task", "language_modeling_sft")]
    runs = [
        (options.get_training_parser(), *training, "--lr-scheduler", schedule, *task)
        for schedule, task in zip(("polynomial_decay", "cosine"), tasks, strict=True)
    ]
    translation = "--task translation --arch transformer_moe".split()
    runs.append((options.get_training_parser(), *translation))
    runs += [
        (make(), "--path", "x", *tasks[0])
        for make in (options.get_eval_lm_parser, options.get_generation_parser)
    ]
    known = set()
    for parser, *words in runs:
        options.parse_args_and_arch(parser, ["data", *words], parse_known=True)
        known |= flags(parser)
    for verb in VERBS:
        parser = argparse.ArgumentParser()
        import_module(f"evomoe_plugin.cli.{verb.replace('-', '_')}").add_arguments(parser)
        known |= flags(parser)
    return frozenset(known)


def test_every_system_has_a_section_with_a_command():
    assert list(ROWS) == list(THEIRS)
    for title, text in sections().items():
        block = re.search(r"^```\n(.*?)^```", text, flags=re.M | re.S)
        assert block and "--moe-gate " in block[1], title
        assert "hydra_configs/small/" in text and "hydra_configs/paper/" in text, title


@pytest.mark.parametrize("system", THEIRS)
def test_all_that_a_system_names_has_a_row(system):
    named = {name.strip("`") for theirs, *_ in ROWS[system] for name in theirs.split(", ")}
    options_and_files, features = THEIRS[system]
    wanted = {*options_and_files.split(), *features.split(", ")}
    assert wanted - named == set()


def test_no_row_comes_twice():
    for system, table in ROWS.items():
        names = [name for theirs, *_ in table for name in theirs.split(", ")]
        assert {name for name in names if names.count(name) > 1} == set(), system


def test_our_flags_exist():
    named = {
        flag
        for table in ROWS.values()
        for _, *cells in table
        for flag in re.findall(r"(?<![\w-])--[\w-]+", " ".join(cells))
    }
    assert len(named) > 100
    assert named - known_flags() == set()


def test_nothing_is_put_off():
    """What has no counterpart is out of scope, for a reason that the row states."""
    assert "not yet" not in PAGE


def test_every_row_is_filled():
    for system, table in ROWS.items():
        for theirs, ours, _ in table:
            assert theirs.strip() and ours.strip(), (system, theirs)


def test_gates_that_are_named_exist():
    named = set(re.findall(r"--moe-gate (\w+)", PAGE))
    assert {"top_p", "top_any", "top_k", "switch", "gshard", "dense_to_sparse", "dense"} <= named
    assert named <= set(gate_names())


def test_configs_that_are_named_exist():
    named = set(re.findall(r"hydra_configs/[\w/]+\.yaml", PAGE))
    assert len(named) >= 12
    assert {path for path in named if not (ROOT / path).is_file()} == set()


def test_numbers_of_the_log_exist():
    """Every log key that the page names exists."""
    load_LE = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
    one_L = torch.ones(1, dtype=torch.float64)
    logged = st.summarize(
        {
            st.TOKENS: 4 * one_L,
            st.PAIRS: 4 * one_L,
            st.LOAD_E: load_LE,
            st.EXPERTS: 8 * one_L,
            st.ENTROPY: one_L,
            st.DROPPED: one_L,
            st.NULL_PAIRS: one_L,
            st.NULL_MASS: one_L,
        }
    )
    named = {
        name
        for _, ours, _ in sum(ROWS.values(), [])
        if "in the log" in ours
        for name in re.findall(r"`(\w+)`", ours)
    }
    assert len(named) >= 6
    assert named - logged.keys() == set()


def test_methods_of_the_model_exist():
    named = re.findall(r"`(\w+)\(\)` of the model", PAGE)
    assert named == ["begin_record_routing", "end_record_routing"]
    assert all(callable(getattr(MoELanguageModel, name)) for name in named)


@pytest.mark.parametrize(
    "words", COMMANDS["fairseq-train"], ids=lambda words: words[words.index("--moe-gate") + 1]
)
def test_training_commands_are_valid(words):
    words = [str(ROOT / word) if word == "evomoe_plugin" else word for word in words]
    args = options.parse_args_and_arch(options.get_training_parser(), words)
    cfg = convert_namespace_to_omegaconf(args)
    model = OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True))
    validate(model)
    assert cfg.criterion._name == "moe_cross_entropy"


def test_other_commands_are_valid():
    for words in COMMANDS["fairseq-eval-lm"]:
        options.parse_args_and_arch(
            options.get_eval_lm_parser(),
            [str(ROOT / word) if word == "evomoe_plugin" else word for word in words],
        )
    for verb, *words in COMMANDS["evomoe"]:
        parser = argparse.ArgumentParser()
        import_module(f"evomoe_plugin.cli.{verb}").add_arguments(parser)
        parser.parse_args(words)
    for words in COMMANDS["fairseq-hydra-train"]:
        assert words[:3] == ["--config-dir", "hydra_configs", "--config-name"]
        hydra_init(words[3])
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.1"):
            compose(words[3], words[4:])
    assert set(COMMANDS) == {"fairseq-train", "fairseq-eval-lm", "fairseq-hydra-train", "evomoe"}


# What is said to be missing; the day it comes, its rows must be rewritten.
@pytest.mark.parametrize(
    ("row", "comes_with"),
    [
        ("--initialize", "upcycle"),
        ("--moe_copy", "upcycle"),
        ("--Dense2MoE", "upcycle"),
        ("reinit_mlp", "upcycle"),
        ("expert_repeat", "upcycle"),
        ("expert-diversify, the first phase", "--moe-spawn-updates"),
        ("--ep_size", "--moe-expert-parallel-size"),
        ("ep_size", "--moe-expert-parallel-size"),
        ("Inter-Device Communication", "--moe-expert-parallel-size"),
        ("only_gate_training", "--moe-train-only"),
    ],
)
def test_what_is_not_there_is_not_there(row, comes_with):
    (cells,) = {
        f"{ours} {why}"
        for table in ROWS.values()
        for theirs, ours, why in table
        if theirs.replace("`", "") == row
    }
    exists = comes_with in {*VERBS, *TASK_REGISTRY, *known_flags()}
    assert (NOT_YET in cells) != exists
