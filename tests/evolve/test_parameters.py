"""Editing parameters in every layout: masters, copies, pieces, moments."""

import types

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from fairscale.nn.data_parallel import FullyShardedDataParallel
from fairseq.optim.adam import FairseqAdam
from torch import nn

from evomoe_plugin.evolve.parameters import edit_parameters
from evomoe_plugin.trainer.layouts import FullySharded
from tests.evolve.conftest import step, trainer_config, trainer_of

LAYOUTS = {
    "fp32": {},
    "flat masters": {"fp16": True},
    "masters one by one": {"fp16": True, "fp16_no_flatten_grads": True},
    "bf16": {"bf16": True},
    "memory-efficient": {"fp16": True, "memory_efficient_fp16": True},
}
SLOT = 1
# Not a number of half precision.
VALUE = 1 + 2.0**-20


class Net(nn.Module):
    """y = inner(outer(x)) * sum(extra), the parameters in two modules."""

    def __init__(self):
        super().__init__()
        self.outer = nn.Linear(4, 3)
        self.extra = nn.Parameter(torch.rand(2, 5, 3))
        self.inner = nn.Linear(3, 5, bias=False)

    def forward(self, x):
        return self.inner(self.outer(x)) * self.extra.square().sum()


def make_net():
    torch.manual_seed(0)
    return Net()


def edit_row(value):
    """Row SLOT of a parameter is set, and its moments reset."""
    assert value.dtype == torch.float32
    value[SLOT] = VALUE
    mask = torch.zeros(len(value), *[1] * (value.dim() - 1), dtype=torch.bool)
    mask[SLOT] = True
    return mask


EDITS = {"extra": edit_row, "inner.weight": edit_row}


def first_as_the_last(moment):
    """Rows that, with FSDP, lie on two ranks; the last is reset after that."""
    moment[0] = moment[SLOT].clone()


MOMENT_EDITS = {"extra": first_as_the_last}


def moment_wanted(name, before):
    """What edits and moment edits make of it."""
    value = before.clone()
    if name in MOMENT_EDITS:
        first_as_the_last(value)
    return value.masked_fill(edited(name, value.shape), 0)


def edited(name, shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    if name in EDITS:
        mask[SLOT] = True
    return mask


def held(trainer):
    """name -> (what the optimizer updates, its state), each of the parameter's shape."""
    model, optimizer = trainer.get_model(), trainer.optimizer
    named = dict(model.named_parameters())
    masters = getattr(optimizer, "fp32_params", list(named.values()))
    state = optimizer.optimizer.state
    if isinstance(masters, dict):
        (flat,) = masters.values()
        sizes = [p.numel() for p in named.values()]
        parts = {key: state[flat][key].split(sizes) for key in ("exp_avg", "exp_avg_sq")}
        return {
            name: (master.view(p.shape), {k: parts[k][i].view(p.shape) for k in parts})
            for i, ((name, p), master) in enumerate(
                zip(named.items(), flat.data.split(sizes), strict=True)
            )
        }
    return {
        name: (master.data, {k: state[master][k] for k in ("exp_avg", "exp_avg_sq")})
        for name, master in zip(named, masters, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_the_edited_elements_change(layout):
    trainer = trainer_of(make_net(), **LAYOUTS[layout])
    step(trainer)
    before = {
        name: (value.clone(), {k: v.clone() for k, v in state.items()})
        for name, (value, state) in held(trainer).items()
    }
    edit_parameters(trainer, EDITS, MOMENT_EDITS)
    for name, (value, state) in held(trainer).items():
        mask = edited(name, value.shape)
        wanted = torch.tensor(VALUE).to(value.dtype)
        assert (value[mask] == wanted).all()
        assert torch.equal(value[~mask], before[name][0][~mask])
        for key, moment in state.items():
            assert not moment[mask].any()
            assert moment[~mask].all()
            assert torch.equal(moment, moment_wanted(name, before[name][1][key]))
        copy = dict(trainer.get_model().named_parameters())[name]
        assert torch.equal(copy, value.to(copy.dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_step_goes_on_from_the_edit(layout):
    """Without its moments an element moves by its new gradient alone."""
    trainer = trainer_of(make_net(), **LAYOUTS[layout])
    step(trainer)
    edit_parameters(trainer, EDITS)
    for p in trainer.get_model().parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer._needs_sync = True
    trainer.optimizer.step()
    for name, p in trainer.get_model().named_parameters():
        if name in EDITS:
            assert (p[SLOT] == torch.tensor(VALUE).to(p.dtype)).all()


def test_before_the_first_step_there_is_nothing_to_reset():
    trainer = trainer_of(make_net(), fp16=True)
    edit_parameters(trainer, EDITS)
    step(trainer)
    assert not torch.allclose(
        dict(trainer.get_model().named_parameters())["extra"][0], torch.tensor(VALUE).half()
    )


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="outer.scale"):
        edit_parameters(trainer_of(make_net()), {**EDITS, "outer.scale": edit_row})


def sharded_rank(rank, folder, flatten, mixed):
    """One of two ranks with nested FSDP; its assertions are the test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    how = {"mixed_precision": mixed, "flatten_parameters": flatten}
    net = make_net()
    shapes = {name: p.shape for name, p in net.named_parameters()}
    net.inner = FullyShardedDataParallel(net.inner, **how)
    net = FullyShardedDataParallel(net, **how)
    optimizer = FairseqAdam(trainer_config().optimizer, list(net.parameters()))
    trainer = types.SimpleNamespace(
        model=net, get_model=lambda: net, optimizer=optimizer, layout=FullySharded(False)
    )
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))

    net(x[rank::2]).float().exp().sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net(x)  # as validation does; the root module keeps what it gathered
    moments = net.gather_full_optim_state_dict(optimizer.optimizer) if flatten else None
    edit_parameters(trainer, EDITS, MOMENT_EDITS)
    y = net(x).float()
    after = {name: value.clone() for name, value in net.state_dict().items()}
    assert after.keys() == shapes.keys()
    for name, value in after.items():
        mask = edited(name, value.shape)
        assert (value[mask] == torch.tensor(VALUE)).all()
        assert torch.equal(value[~mask], before[name][~mask])

    if flatten:
        state = net.gather_full_optim_state_dict(optimizer.optimizer)
        if rank == 0:
            order = ["outer.weight", "outer.bias", "extra", "inner.weight"]
            assert {shapes[name] for name in order} == {
                entry["exp_avg"].shape for entry in state["state"].values()
            }
            for i, entry in state["state"].items():
                (name,) = (n for n in order if shapes[n] == entry["exp_avg"].shape)
                for key in ("exp_avg", "exp_avg_sq"):
                    before_edit = moments["state"][i][key]
                    assert before_edit.all()
                    assert torch.equal(entry[key], moment_wanted(name, before_edit)), name

    plain = make_net()
    for weights, near in ((before, False), (after, True)):
        plain.load_state_dict(weights)
        wanted = plain(x)
        tolerance = (2e-2 if mixed else 1e-5) * wanted.abs().max()
        assert torch.allclose(y, wanted, rtol=0, atol=tolerance.item()) == near

    if flatten:  # gathering changes nothing of an optimizer that counts its steps in tensors
        adadelta = torch.optim.Adadelta(net.parameters())
        adadelta.step()
        net.gather_full_optim_state_dict(adadelta)
        adadelta.step()
        assert {float(state["step"]) for state in adadelta.state.values()} == {2}
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("flatten, mixed", [(True, True), (True, False), (False, False)])
def test_fully_sharded_on_two_ranks(tmp_path, flatten, mixed):
    """The flat parameters are divided amid `extra`, and one has padding."""
    torch.multiprocessing.spawn(sharded_rank, (str(tmp_path), flatten, mixed), nprocs=2)
