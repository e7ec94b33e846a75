"""Runs whose options contradict each other, refused before any rank is started."""

import copy

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf, open_dict

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.config.run_checks import check_run
from evomoe_plugin.launch.environment import process_count


@pytest.fixture(scope="module")
def divided():
    """Options of four processes that divide the experts by two; the data is not there."""
    args = options.parse_args_and_arch(
        options.get_training_parser(),
        [
            "no-data",
            "--user-dir",
            "evomoe_plugin",
            "--task",
            "language_modeling",
            "--arch",
            "transformer_lm_gpttiny_moe",
            "--optimizer",
            "adam",
            "--lr",
            "0.1",
            "--max-update",
            "10",
            "--batch-size",
            "4",
            "--criterion",
            "moe_cross_entropy",
            "--ddp-backend",
            "legacy_ddp",
            "--distributed-world-size",
            "4",
            "--moe-expert-parallel-size",
            "2",
        ],
    )
    return convert_namespace_to_omegaconf(args)


BAD = [
    (
        {"distributed_training.distributed_world_size": 3},
        "--moe-expert-parallel-size 2: does not divide the 3 ranks",
    ),
    (
        {"distributed_training.ddp_backend": "pytorch_ddp"},
        "--ddp-backend pytorch_ddp with --moe-expert-parallel-size: give fsdp2, "
        "fully_sharded or legacy_ddp",
    ),
    (
        {"distributed_training.zero_sharding": "os"},
        "--zero-sharding os with --moe-expert-parallel-size: give --ddp-backend fully_sharded",
    ),
    (
        {
            "distributed_training.ddp_backend": "fully_sharded",
            "distributed_training.use_sharded_state": True,
        },
        "--use-sharded-state with --moe-expert-parallel-size: leave it out: --moe-ep-checkpoint",
    ),
    ({"ema.store_ema": True}, "--store-ema with --moe-expert-parallel-size: it does not include"),
    (
        {"distributed_training.ddp_backend": "fully_sharded", "ema.store_ema": True},
        "--store-ema with --ddp-backend fully_sharded: it averages whole models",
    ),
    (
        {"optimizer._name": "adafactor"},
        "--optimizer adafactor with --moe-expert-parallel-size: its steps depend on means",
    ),
    ({"optimizer._name": "composite"}, "--optimizer composite with --moe-expert-parallel-size: "),
    (
        {"optimizer._name": "adagrad", "distributed_training.ddp_backend": "fully_sharded"},
        "--optimizer adagrad with --ddp-backend fully_sharded: adam, fused_adamw, adamax, adadelta",
    ),
    (
        {"dataset.batch_size": None},
        "--batch-size (not given): give it, in samples, or --max-tokens",
    ),
    ({"dataset.batch_size": 0}, "--batch-size 0: give it, in samples, or --max-tokens"),
    (
        {"dataset.batch_size_valid": -1},
        "--batch-size-valid -1: give it, in samples, or --max-tokens-valid",
    ),
    (
        {"dataset.max_valid_steps": 0},
        "--max-valid-steps 0: give 1 or more, or --disable-validation",
    ),
    (
        {"dataset.disable_validation": True, "checkpoint.patience": 1},
        "--patience 1 with --disable-validation: it follows what validation gives",
    ),
    (
        {"dataset.disable_validation": True, "checkpoint.keep_best_checkpoints": 2},
        "--keep-best-checkpoints 2 with --disable-validation: it follows",
    ),
    (
        {"dataset.disable_validation": True, "lr_scheduler._name": "reduce_lr_on_plateau"},
        "--lr-scheduler reduce_lr_on_plateau with --disable-validation: it follows",
    ),
]


def refused(cfg) -> str:
    with pytest.raises(OptionError) as raised:
        check_run(cfg, process_count(cfg.distributed_training))
    return str(raised.value)


@pytest.mark.parametrize("given, message", BAD, ids=[message[:30] for _, message in BAD])
def test_refused_in_one_line(divided, given, message):
    cfg = copy.deepcopy(divided)
    with open_dict(cfg):
        for name, value in given.items():
            OmegaConf.update(cfg, name, value)
    assert refused(cfg).startswith(message)


FSDP2 = [
    ("common.memory_efficient_bf16", True, "it keeps weights in fp32: give --bf16"),
    ("common.memory_efficient_fp16", True, "it keeps weights in fp32: give --fp16"),
    ("ema.store_ema", True, "it averages whole models"),
    ("distributed_training.zero_sharding", "os", "leave it out: fsdp2 includes it"),
    ("distributed_training.cpu_offload", True, "give fully_sharded"),
    ("distributed_training.not_fsdp_flatten_parameters", True, "leave it out"),
    ("distributed_training.heartbeat_timeout", 9, "leave it out"),
    ("distributed_training.use_sharded_state", True, "needs --ddp-backend fully_sharded"),
    ("optimizer._name", "adafactor", "adam, fused_adamw"),
    ("optimizer._name", "composite", "checkpoints support one"),
]


@pytest.mark.parametrize("name, value, remedy", FSDP2)
def test_fsdp2_refuses_in_one_line(divided, name, value, remedy):
    cfg = copy.deepcopy(divided)
    cfg.model.moe_expert_parallel_size = 1
    cfg.distributed_training.ddp_backend = "fsdp2"
    with open_dict(cfg):
        OmegaConf.update(cfg, name, value)
    group, _, option = name.partition(".")
    option = "optimizer" if group == "optimizer" else option
    message = refused(cfg)
    assert message.startswith(f"--{option.replace('_', '-')} ")
    assert f"with --ddp-backend fsdp2: {remedy}" in message and "\n" not in message


def test_amp_is_refused(divided, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    cfg = copy.deepcopy(divided)
    cfg.common.amp = True
    assert refused(cfg).startswith("--amp with --moe-expert-parallel-size: overflow is checked")


def test_adagrad_is_none_of_them(divided):
    cfg = copy.deepcopy(divided)
    cfg.optimizer._name = "adagrad"
    assert "no such folder" in refused(cfg)  # which is what is looked at next


@pytest.mark.parametrize(
    "environment, refused_for",
    [
        ({"WORLD_SIZE": "5", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "the 5 ranks"),
        ({"SLURM_NTASKS": "7"}, "the 7 ranks"),
        ({"SLURM_NTASKS": "8"}, "no such folder"),  # which is what is looked at next
    ],
    ids=["torchrun", "slurm", "slurm with as many as needed"],
)
def test_processes_are_counted_whoever_starts_them(divided, monkeypatch, environment, refused_for):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refused_for in refused(copy.deepcopy(divided))


def test_a_configuration_without_a_model(divided):
    cfg = copy.deepcopy(divided)
    OmegaConf.update(cfg, "model", "???", merge=False)
    with pytest.raises(OptionError, match="--model .not given.: give an architecture"):
        check_run(cfg, 1)
