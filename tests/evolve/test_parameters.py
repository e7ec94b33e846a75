"""Editing parameters in every layout: masters, copies, pieces, moments."""

import os
import types

import pytest
import torch
import torch.multiprocessing
from torch import nn

from evomoe_plugin.compat.ranks import free_port
from evomoe_plugin.evolve.parameters import edit_parameters
from tests.evolve.conftest import step, trainer_of

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


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 5, bias=False)))
    net[0].extra = nn.Parameter(torch.randn(2, 3, 2))
    return net


def edit_row(value):
    """Row SLOT of a parameter is set, and its moments reset."""
    assert value.dtype == torch.float32
    value[SLOT] = VALUE
    mask = torch.zeros(len(value), *[1] * (value.dim() - 1), dtype=torch.bool)
    mask[SLOT] = True
    return mask


EDITS = {"0.extra": edit_row, "1.0.weight": edit_row}


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
                zip(named.items(), flat.data.split(sizes), strict=True))
        }
    return {
        name: (master.data, {k: state[master][k] for k in ("exp_avg", "exp_avg_sq")})
        for name, master in zip(named, masters, strict=True)
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exactly_the_edited_elements_change(layout):
    trainer = trainer_of(make_net(), **LAYOUTS[layout])
    step(trainer)
    before = {name: (value.clone(), {k: v.clone() for k, v in state.items()})
              for name, (value, state) in held(trainer).items()}
    edit_parameters(trainer, EDITS)
    for name, (value, state) in held(trainer).items():
        edited = torch.zeros(value.shape, dtype=torch.bool)
        if name in EDITS:
            edited[SLOT] = True
        wanted = torch.tensor(VALUE).to(value.dtype)
        assert (value[edited] == wanted).all()
        assert torch.equal(value[~edited], before[name][0][~edited])
        for key, moment in state.items():
            assert not moment[edited].any()
            assert moment[~edited].all()
            assert torch.equal(moment[~edited], before[name][1][key][~edited])
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
    assert not torch.allclose(dict(trainer.get_model().named_parameters())["0.extra"][0],
                              torch.tensor(VALUE).half())


def test_an_unknown_name_is_an_error():
    with pytest.raises(KeyError, match="2.weight"):
        edit_parameters(trainer_of(make_net()), {**EDITS, "2.weight": edit_row})


def sharded_rank(rank, port, folder):
    """Nested FSDP on two ranks: what they hold together after two steps around an edit."""
    import evomoe_plugin  # noqa: F401
    from fairscale.nn.data_parallel import FullyShardedDataParallel as FSDP
    from fairseq.optim.adam import FairseqAdam

    from tests.evolve.conftest import trainer_config

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    for mixed in (False, True):
        net = make_net()
        net[1] = FSDP(net[1], mixed_precision=mixed)
        net = FSDP(net, mixed_precision=mixed)
        optimizer = FairseqAdam(trainer_config().optimizer, list(net.parameters()))
        trainer = types.SimpleNamespace(model=net, optimizer=optimizer, is_fsdp=True,
                                        get_model=lambda net=net: net)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))[rank::2]
        parts = {}
        for name in ("before", "after"):
            optimizer.zero_grad()
            (net(x).float().square().mean()
             + sum(p.float().square().sum() for p in [net.module[0].extra]) * 0).backward()
            optimizer.step()
            if name == "before":
                edit_parameters(trainer, EDITS)
                parts["moments"] = [
                    (m.local_metadata_dict()["param_metadata"][0]["params"],
                     {k: v.clone() for k, v in optimizer.optimizer.state[p].items()
                      if torch.is_tensor(v)})
                    for m in (net, net.module[1]) for p in m.params]
            parts[name] = {k: v.clone() for k, v in net.state_dict().items()}
        torch.save(parts, f"{folder}/{mixed}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_fully_sharded_on_two_ranks(tmp_path):
    torch.multiprocessing.spawn(sharded_rank, (free_port(), str(tmp_path)), nprocs=2)
