"""Experts sharded over real ranks, compared with the whole stack on one rank."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import traceback
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from evomoe_plugin.dispatch.all_to_all import Exchange
from evomoe_plugin.dispatch.parallel_ffn import ParallelExpertFFN
from evomoe_plugin.dispatch.process_groups import expert_groups
from evomoe_plugin.experts import ExpertFFN
from evomoe_plugin.routing.plan import RoutingPlan
from evomoe_plugin.trainer.sharded_gradients import ReplicaMeans
from tests.rank_server import new_context

E, D, F, T = 8, 6, 10, 5

# Rows that each rank has for each expert.
LOADS = {
    "uneven": lambda rank: [(3 * e + rank) % 5 for e in range(E)],
    "a rank without tokens": lambda rank: [2] * E if rank else [0] * E,
    "experts without tokens": lambda rank: [0, 3, 0, 0, 1, 0, 0, 2],
    "all to one rank": lambda rank: [4, 5] + [0] * (E - 2),
    "no tokens at all": lambda rank: [0] * E,
}


def on_ranks(world: int, check, *given) -> None:
    """Run `check(rank, *given)` on `world` gloo ranks; a failure on one fails here."""
    context = new_context()
    errors = context.SimpleQueue()
    port = context.Value("i", 0)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port.value = store.port
    ranks = [
        context.Process(target=_rank, args=(r, world, port.value, errors, check, given))
        for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert errors.empty(), errors.get()
    assert [rank.exitcode for rank in ranks] == [0] * world


def _rank(rank, world, port, errors, check, given) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        check(rank, *given)
    except BaseException:
        errors.put(f"rank {rank}: {traceback.format_exc()}")
        raise
    dist.destroy_process_group()


def plan_of(counts):
    """The first tokens go to each expert, as many as it gets; weights differ."""
    token_ids_N = torch.cat([torch.arange(count) for count in counts])
    expert_ids_N = torch.arange(E).repeat_interleave(torch.tensor(counts))
    weights_N = (1 + token_ids_N + 2 * expert_ids_N).double() / 10
    return RoutingPlan(token_ids_N, expert_ids_N, weights_N, torch.tensor(counts), T)


def make(kind, dtype=torch.float64, **given):
    torch.manual_seed(0)
    return kind(E, D, F, torch.nn.functional.gelu, **given).to(dtype)


def parallel(groups, transport_dtype=None, chunks=1, **given):
    return partial(
        ParallelExpertFFN,
        groups=groups,
        chunks=chunks,
        exchange=partial(Exchange, groups.exchange, transport_dtype=transport_dtype),
        **given,
    )


def check_equal(rank: int, size: int) -> None:
    groups = expert_groups(size)
    own = groups.own(E)
    assert groups.rank == rank % size
    assert expert_groups(1) is None
    assert expert_groups(size) is groups
    cases = itertools.product(LOADS.items(), (1, E // size), (False, True))
    for (name, load), chunks, gated in cases:
        whole = make(ExpertFFN, gated=gated)
        sharded = make(parallel(groups, chunks=chunks), gated=gated)
        state = whole.state_dict()
        assert all(
            torch.equal(value, state[key][own]) for key, value in sharded.state_dict().items()
        )
        plan = plan_of(load(rank))
        x = torch.randn(
            T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)
        ).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        y, overlap_out = sharded(x, plan, overlap_fn=lambda x=x: 2 * x)
        wanted = whole(x2, plan)
        assert torch.allclose(y, wanted, atol=1e-9), (name, chunks)
        assert torch.equal(overlap_out, 2 * x)
        (y.sum() + (y**2).sum()).backward()
        (wanted.sum() + (wanted**2).sum()).backward()
        assert torch.allclose(x.grad, x2.grad, atol=1e-9), (name, chunks)
        for key, parameter in whole.named_parameters():
            dist.all_reduce(parameter.grad)
            mean = getattr(sharded, key).grad
            dist.all_reduce(mean, group=groups.replicas)
            assert torch.allclose(mean, parameter.grad[own] / size, atol=1e-9), (name, key)


def check_transport_dtype(rank: int) -> None:
    groups = expert_groups(2)
    plan = plan_of(LOADS["uneven"](rank))
    x = torch.randn(T, D)
    wanted = make(ExpertFFN, torch.float32)(x, plan)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
        y = make(parallel(groups, dtype), torch.float32)(x, plan)
        assert y.dtype == torch.float32
        error = (y - wanted).abs().max()
        assert 0 < error < tolerance, (dtype, error)


def check_as_on_a_gpu(rank: int) -> None:
    """With the kernels of GPUs: the same numbers, and one wait of the host in both passes."""
    from evomoe_plugin.experts.kernels import cuda
    from evomoe_plugin.experts.kernels.cuda.fused import FusedFFN
    from evomoe_plugin.routing import kernels
    from tests.host_waits import HostWaits, pretend_a_gpu

    groups = expert_groups(2)
    plan = plan_of(LOADS["uneven"](rank))
    plan = dataclasses.replace(plan, weights_N=plan.weights_N.float())
    x = torch.randn(T, D, requires_grad=True)
    whole = make(ExpertFFN, torch.float32)
    wanted = whole(x, plan)
    wanted.square().sum().backward()
    exact, x.grad = x.grad, None
    for chunks in (1, 2):
        sharded = make(parallel(groups, chunks=chunks), torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "function_for", lambda *_: FusedFFN)
            patch.setattr(kernels, "usable", lambda _: True)
            y = sharded(x, plan)
            y.square().sum().backward()
        torch.testing.assert_close(y, wanted)
        torch.testing.assert_close(x.grad, exact)
        x.grad = None
        with pytest.MonkeyPatch.context() as patch:
            pretend_a_gpu(patch)
            with HostWaits(allowed=None) as waits:
                sharded(x, plan, overlap_fn=lambda: 2 * x)[0].sum().backward()
        assert waits.found == ["tolist at dispatch/all_to_all.py"]
        x.grad = None


def test_sharded_experts_with_the_kernels_of_gpus():
    pytest.importorskip("triton", reason="there is no Triton for this platform")
    on_ranks(2, check_as_on_a_gpu)


@pytest.mark.parametrize(
    "world, size",
    [
        (2, 2),
        pytest.param(4, 4, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_sharded_experts_equal_one_stack(world, size):
    on_ranks(world, check_equal, size)


@pytest.mark.slow
def test_rows_are_sent_in_the_transport_dtype():
    on_ranks(2, check_transport_dtype)


def test_one_rank_has_all_experts():
    assert expert_groups(1) is None
    assert expert_groups(4) is None  # no process group here


def check_means_of_replicas(rank: int) -> None:
    """Each is begun within the backward pass, is the mean of what the ranks made, and refuses to be
    added to on its way."""
    layers = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, D)).double()
    for parameter in layers.parameters():
        dist.broadcast(parameter.detach(), 0)
    layers[0].bias.requires_grad_(False)
    trained = [p for p in layers.parameters() if p.requires_grad]
    x = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    x.requires_grad_()

    (layers(x).square().sum() + layers(3 * x).sum()).backward()
    wanted = [p.grad for p in trained]
    for grad in wanted:
        dist.all_reduce(grad)

    for overlaps in (True, False):
        layers.zero_grad()
        layers(x).square().sum().backward()  # an earlier micro-batch
        means = ReplicaMeans(list(layers.parameters()), dist.group.WORLD)
        inputs = 3 * x
        begun = []
        inputs.register_hook(
            lambda _, means=means, begun=begun: begun.append(len(means._in_flight))
        )
        with means.during_backward() if overlaps else contextlib.nullcontext():
            layers(inputs).sum().backward()
        assert begun[0] >= 2 if overlaps else begun == [0]  # those of the second layer
        means.finish()
        for parameter, total in zip(trained, wanted, strict=True):
            torch.testing.assert_close(parameter.grad, total / 2)
        assert layers[0].bias.grad is None

    means = ReplicaMeans(list(layers.parameters()), dist.group.WORLD)
    with means.during_backward():
        layers(x).sum().backward()
        with pytest.raises(RuntimeError, match="several backward passes for a batch; give --ddp-b"):
            layers(x).sum().backward()
    means.finish()


def test_gradients_of_replicas_are_averaged_during_the_backward_pass():
    on_ranks(2, check_means_of_replicas)
