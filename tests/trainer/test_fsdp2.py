"""What `fsdp2` gathers: one of two ranks, whose collectives do nothing."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq import optim
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import LayerInfo
from evomoe_plugin.layer import build_layer
from evomoe_plugin.trainer.layouts import fsdp2

D, F, E, SPAWN = 8, 32, 4, 5


class Gathered(TorchDispatchMode):
    """The sizes and dtypes of what collectives give every rank."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and ("allgather" in str(func) or "broadcast" in str(func)):
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)]
            largest = max(tensors, key=torch.Tensor.numel)
            self.found.append((largest.numel(), largest.dtype))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def two_ranks():
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.layers[0](x)[0]


def model(moe_options, bf16=False, fp32_reduce_scatter=False):
    options = moe_options(moe_gate="top_k", moe_expert_count=E, moe_spawn_updates=SPAWN)
    info = LayerInfo(
        model_dim=D,
        num_experts=E,
        start_experts=E,
        num_null=0,
        layer_id=0,
        seed=1,
        token_counts_V=(),
    )
    made = Model(build_layer(info, options, nn.functional.gelu))
    fsdp2.shard(made, config(bf16, fp32_reduce_scatter), "cpu")
    return made


def config(bf16=False, fp32_reduce_scatter=False, min_params_to_wrap=0):
    parallel = SimpleNamespace(
        fp32_reduce_scatter=fp32_reduce_scatter, no_reshard_after_forward=False
    )
    common = SimpleNamespace(bf16=bf16, fp16=False)
    options = SimpleNamespace(min_params_to_wrap=min_params_to_wrap)
    return SimpleNamespace(common=common, distributed_training=parallel, model=options)


def test_layers_that_compute_their_activations_again_are_gathered_one_at_a_time(two_ranks):
    for wrap, apart in ((lambda layer: layer, False), (checkpoint_wrapper, True)):
        made = Model(*(wrap(nn.Linear(D, D)) for _ in range(2)))
        fsdp2.shard(made, config(min_params_to_wrap=10**6), "cpu")
        assert [isinstance(layer, FSDPModule) for layer in made.layers] == [apart, apart]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_dense_phase_gathers_expert_0_alone(two_ranks, moe_options, bf16):
    made = model(moe_options, bf16)
    x = torch.randn(6, D, dtype=torch.bfloat16 if bf16 else torch.float32)
    moe = made.layers[0]
    with Gathered() as gathered:
        made(x).float().sum().backward()
    assert max(size for size, _ in gathered.found) == F * D  # one matrix of one expert
    weight = moe.experts.fc1_weight
    assert isinstance(weight.grad, DTensor) and weight.grad.dtype is torch.float32
    rows = weight.grad.to_local()
    assert rows.shape == (E // 2, F, D) and rows[0].any() and not rows[1:].any()

    moe.set_num_updates(SPAWN)
    with Gathered() as gathered:
        made(x)
    experts = sum(p.numel() for p in moe.experts.parameters())
    assert max(size for size, _ in gathered.found) == experts
    assert {dtype for _, dtype in gathered.found} == {x.dtype}


def test_the_optimizer_updates_the_weights_that_are_gathered_next(two_ranks, moe_options):
    made = model(moe_options)
    made.layers[0].set_num_updates(SPAWN)
    parameters = list(made.parameters())
    sgd = {"_name": "sgd", "lr": [1.0], "momentum": 0.0, "weight_decay": 0.0}
    cfg = OmegaConf.create({"common": {"fp16": False}, "optimizer": sgd})
    optimizer = fsdp2.build_optimizer(cfg, parameters)
    for _ in range(2):  # the second forward pass comes after FSDP has set itself up
        before = [p.to_local().clone() for p in parameters]
        made(torch.randn(6, D)).sum().backward()
        fsdp2.pass_gradients(parameters, optimizer)
        optimizer.step()
        for p, old in zip(parameters, before, strict=True):
            torch.testing.assert_close(p.to_local(), old - p.grad.to_local())
            p.grad = None


def test_an_optimizer_with_an_order_of_its_own_is_refused(two_ranks, moe_options, monkeypatch):
    parameters = list(model(moe_options).parameters())
    sgd = {"_name": "sgd", "lr": [1.0], "momentum": 0.0, "weight_decay": 0.0}
    cfg = OmegaConf.create({"common": {"fp16": False}, "optimizer": sgd})
    build = optim.build_optimizer
    monkeypatch.setattr(optim, "build_optimizer", lambda given, rows: build(given, rows[::-1]))
    with pytest.raises(OptionError, match=r"^--optimizer sgd: changes the parameters"):
        fsdp2.build_optimizer(cfg, parameters)
