"""What `edit_parameters` and the adaptive process see of a trainer, around real optimizers."""

import types

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from fairseq.optim.fp16_optimizer import FP16Optimizer, MemoryEfficientFP16Optimizer
from omegaconf import OmegaConf

from evomoe_plugin.evolve.init_methods import spawn_tensor
from evomoe_plugin.trainer.layouts import Replicated
from tests.models.conftest import make_config, make_model, task  # noqa: F401


def trainer_config(**common):
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common = OmegaConf.merge(cfg.common, common)
    cfg.optimizer = {**vars(FairseqAdamConfig(adam_betas=(0.9, 0.98), lr=[0.01])), "_name": "adam"}
    return cfg


def trainer_of(model, num_updates=1, **common):
    """A trainer of `model`, which is cast as fairseq's would; its optimizer has no state yet."""
    cfg = trainer_config(**common)
    if cfg.common.bf16:
        model.bfloat16()
    elif cfg.common.fp16:
        model.half()
    parameters = [p for p in model.parameters() if p.requires_grad]
    if cfg.common.memory_efficient_fp16:
        optimizer = MemoryEfficientFP16Optimizer.build_optimizer(cfg, parameters)
    elif cfg.common.fp16 or cfg.common.bf16:
        optimizer = FP16Optimizer.build_optimizer(cfg, parameters)
    else:
        optimizer = FairseqAdam(cfg.optimizer, parameters)
    return types.SimpleNamespace(
        cfg=cfg,
        optimizer=optimizer,
        layout=Replicated(),
        get_model=lambda: model,
        model=model,
        get_criterion=torch.nn.Module,
        get_num_updates=lambda: num_updates,
    )


def step(trainer, seed=0):
    """An update with gradients that depend on nothing but the seed and the shapes."""
    generator = torch.Generator().manual_seed(seed)
    for p in trainer.get_model().parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    trainer.optimizer._needs_sync = True
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


@pytest.fixture
def make_trainer():
    return trainer_of


def spawn_expert(source, method, **given):
    """A new expert's tensors from one expert's, by name."""
    return {name: spawn_tensor(name, tensor, method, **given)[0] for name, tensor in source.items()}
