"""The fused optimizer against fairseq's own `adam`."""

import copy

import pytest
import torch
from fairseq.optim import FP16Optimizer, MemoryEfficientFP16Optimizer, build_optimizer
from fairseq.optim.adam import Adam, FairseqAdam
from omegaconf import OmegaConf

from evomoe_plugin.optim import FusedAdamW
from evomoe_plugin.optim.fused_adam import FusedAdam

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}
# Rounding of 30 updates: theirs and ours multiply in another order.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 3e-6, torch.bfloat16: 0.0}


def weights(dtype):
    """Of every order in memory: plain, transposed, with gaps; and one that is a single number."""
    torch.manual_seed(0)
    return [
        torch.randn(5, 7, dtype=dtype),
        torch.randn(6, 4, dtype=dtype).t(),
        torch.randn(8, 10, dtype=dtype)[:, ::2],
        torch.randn(1, dtype=dtype),
    ]


def parameters(dtype):
    return [
        torch.nn.Parameter(w.clone(memory_format=torch.preserve_format) if w.is_contiguous() else w)
        for w in weights(dtype)
    ]


def gradients(update, like):
    torch.manual_seed(100 + update)
    return [torch.randn(p.shape, dtype=p.dtype) * 10.0**-i for i, p in enumerate(like)]


def give(params, grads):
    for p, grad in zip(params, grads, strict=True):
        p.grad = None if grad is None else grad.clone()


@pytest.mark.parametrize("eps", [1e-8, 1e-2])  # the large one shows where it is added
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_steps_equal_fairseqs(dtype, eps):
    ours, theirs = parameters(dtype), parameters(dtype)
    fused = FusedAdam(ours, eps=eps, **SETTINGS)
    adam = Adam(theirs, eps=eps, **SETTINGS)
    for update in range(30):
        grads = gradients(update, ours)
        if update == 5:
            grads[0] = None  # its count falls behind
        give(ours, grads)
        give(theirs, grads)
        fused.step()
        adam.step()
    for p, q in zip(ours, theirs, strict=True):
        assert (p - q).abs().max() <= TOLERANCE[dtype]
        one, other = fused.state[p], adam.state[q]
        assert one.keys() == other.keys() and one["step"] == other["step"]
        for name in ("exp_avg", "exp_avg_sq"):
            assert one[name].dtype == other[name].dtype
            assert torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-8)
    assert [fused.state[p]["step"] for p in ours] == [29, 30, 30, 30]


@pytest.mark.parametrize("first, then", [(Adam, FusedAdam), (FusedAdam, Adam)])
def test_either_goes_on_from_the_state_of_the_other(first, then):
    whole, parted = parameters(torch.float32), parameters(torch.float32)
    unbroken, before = first(whole, **SETTINGS), first(parted, **SETTINGS)
    for update in range(10):
        if update == 5:
            after = then(parted, **SETTINGS)
            after.load_state_dict(copy.deepcopy(before.state_dict()))
        grads = gradients(update, whole)
        give(whole, grads)
        give(parted, grads)
        unbroken.step()
        (before if update < 5 else after).step()
    for p, q in zip(whole, parted, strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="give --optimizer adam"):
        FusedAdam(table.parameters()).step()


# As fairseq's trainer drives it


def config(name, **common):
    return OmegaConf.create(
        {
            "optimizer": {
                "_name": name,
                "adam_betas": "(0.9, 0.98)",
                "adam_eps": 1e-8,
                "weight_decay": 0.1,
                "lr": [1e-2],
                **(
                    {"use_old_adam": False, "fp16_adam_stats": False, "tpu": False}
                    if name == "adam"
                    else {}
                ),
            },
            "common": {
                "fp16_init_scale": 4,
                "fp16_scale_tolerance": 0.0,
                "min_loss_scale": 1e-4,
                "threshold_loss_scale": None,
                "model_parallel_size": 1,
                **common,
            },
            "optimization": {"update_freq": [1]},
            "distributed_training": {"distributed_world_size": 1},
        }
    )


def plain(cfg, params):
    return build_optimizer(cfg.optimizer, params)


def wrapped(cls, **common):
    return lambda cfg, params: cls.build_optimizer(OmegaConf.merge(cfg, {"common": common}), params)


KINDS = {
    "fp32": (torch.float32, plain),
    "fp16 flat": (torch.float16, wrapped(FP16Optimizer)),
    "fp16": (torch.float16, wrapped(FP16Optimizer, fp16_no_flatten_grads=True)),
    "bf16": (torch.bfloat16, wrapped(FP16Optimizer, bf16=True)),
    "memory-efficient fp16": (torch.float16, wrapped(MemoryEfficientFP16Optimizer)),
    "memory-efficient bf16": (torch.bfloat16, wrapped(MemoryEfficientFP16Optimizer, bf16=True)),
}


@pytest.mark.parametrize("max_norm", [0.0, 0.3])
@pytest.mark.parametrize("kind", list(KINDS))
def test_clipped_updates_equal_fairseqs(kind, max_norm):
    dtype, build = KINDS[kind]

    def run(name):
        torch.manual_seed(0)
        params = [
            torch.nn.Parameter(torch.randn(5, 7, dtype=dtype)),
            torch.nn.Parameter(torch.randn(9, dtype=dtype)),
        ]
        optimizer = build(config(name), params)
        norms = []
        for update in range(6):
            optimizer.zero_grad()
            x = torch.randn(5, 7, generator=torch.Generator().manual_seed(update)).to(dtype)
            optimizer.backward(((params[0] * x).sum() + (params[1] ** 2).sum()) * 3)
            optimizer.multiply_grads(torch.tensor(1 / 3) if update % 2 else 1 / 3)
            norms.append(float(optimizer.clip_grad_norm(max_norm)))
            optimizer.step()
        return params, norms, optimizer

    ours, our_norms, optimizer = run("fused_adamw")
    theirs, their_norms, _ = run("adam")
    assert isinstance(optimizer.optimizer, FusedAdam)
    assert our_norms == pytest.approx(their_norms, rel=2e-3 if "efficient" in kind else 1e-6)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p.float(), q.float(), atol=2e-6 if kind == "fp32" else 8e-3)


def test_the_norm_of_other_ranks_counts():
    params = [torch.nn.Parameter(torch.ones(4))]
    optimizer = FusedAdamW(config("fused_adamw").optimizer, params)
    params[0].grad = torch.full((4,), 3.0)
    optimizer.multiply_grads(0.5)
    seen = []
    norm = optimizer.clip_grad_norm(1.5, aggregate_norm_fn=lambda own: seen.append(own) or 2 * own)
    assert (seen[0], norm) == (6.0, 6.0)  # of the gradients as they are; then halved
    assert float(optimizer.optimizer.grad_factor) == pytest.approx(0.5 * 1.5 / 6)


def test_gradients_of_a_step_that_is_left_out_leave_nothing_behind():
    params = [torch.nn.Parameter(torch.ones(4))]
    optimizer = FusedAdamW(config("fused_adamw").optimizer, params)
    params[0].grad = torch.full((4,), float("inf"))
    optimizer.multiply_grads(0.5)
    optimizer.clip_grad_norm(1.0)
    optimizer.zero_grad()
    params[0].grad = torch.full((4,), 2.0)
    optimizer.step()
    assert torch.equal(
        optimizer.optimizer.state[params[0]]["exp_avg"], torch.full((4,), 2.0) * (1 - 0.9)
    )


def test_where_another_optimizer_takes_its_place_gradients_are_multiplied_at_once():
    params = [torch.nn.Parameter(torch.ones(4))]
    optimizer = FusedAdamW(config("fused_adamw").optimizer, params)
    optimizer.optimizer = torch.optim.SGD(params, lr=1.0)  # as fairscale's OSS does
    params[0].grad = torch.full((4,), 3.0)
    optimizer.multiply_grads(0.5)
    assert torch.equal(params[0].grad, torch.full((4,), 1.5))
    assert optimizer.clip_grad_norm(1.0) == 3.0
    assert params[0].grad.norm() == pytest.approx(1.0)


def test_frozen_parameters_have_no_state():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    trained = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(config("fused_adamw").optimizer, [frozen, trained])
    trained.grad = torch.ones(2)
    optimizer.step()
    assert list(optimizer.optimizer.state) == [trained] and torch.equal(frozen, torch.ones(2))


def test_flags_are_those_of_adam():
    given = {"adam_betas", "adam_eps", "weight_decay", "lr"}
    from fairseq.optim import OPTIMIZER_DATACLASS_REGISTRY as registered

    ours, theirs = registered["fused_adamw"](), registered["adam"]()
    assert set(ours.__dataclass_fields__) - {"_name"} == given
    for name in given:
        assert getattr(ours, name) == getattr(theirs, name)
    assert issubclass(FusedAdamW, FairseqAdam)
