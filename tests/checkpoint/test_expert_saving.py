"""The protocol by which processes write their experts beside one main file."""

import multiprocessing
import os
import traceback
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from evomoe_plugin.checkpoint import atomic_files, expert_files, expert_loading, expert_saving
from evomoe_plugin.checkpoint.expert_saving import ExpertSave
from evomoe_plugin.checkpoint.expert_shards import Entry, ExpertShards, manifest_of
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.dispatch.process_groups import ExpertGroups

SIZE = 2
WEIGHT = "decoder.layers.1.moe.experts.fc1_weight"


def experts_of(rank, update):
    rows = torch.full((3, 4), float(10 * update + rank))
    return {f"model/{WEIGHT}": rows, f"optimizer/{WEIGHT}/exp_avg": -rows}


def save(rank, folder, update, is_due=True):
    """As `checkpoint_writing` does on each process."""
    groups = ExpertGroups(SIZE, rank, dist.group.WORLD, None)
    entry = {WEIGHT: Entry(5, {"step": update})}
    save = ExpertSave(groups, update, experts_of(rank, update), entry)
    path = os.path.join(folder, "checkpoint_last.pt")
    if rank == 0 and is_due:
        state = {"model": {}}
        with save.beside(state, path):
            atomic_files.save(state, path)
    save.finish()


def assert_saved(folder, update):
    path = os.path.join(folder, "checkpoint_last.pt")
    manifest = manifest_of(torch.load(path, weights_only=True), path)
    assert manifest.update == update
    shards = ExpertShards(path, manifest)
    assert torch.equal(shards.rows(f"model/{WEIGHT}"),
                       torch.cat([experts_of(r, update)[f"model/{WEIGHT}"] for r in range(SIZE)]))
    assert manifest.optimizer[WEIGHT] == Entry(5, {"step": update})
    assert expert_files.tags(path) == [manifest.tag]


def process(rank, folder, body, reports):
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank,
                                world_size=SIZE)
        body(rank, folder)
        reports.put(None)
    except BaseException:
        reports.put(traceback.format_exc())


def run(tmp_path, body):
    """Run `body(rank, folder)` in two processes, which share what is imported here."""
    context = multiprocessing.get_context("fork")
    reports = context.SimpleQueue()
    ranks = [context.Process(target=process, args=(r, str(tmp_path), body, reports))
             for r in range(SIZE)]
    for rank in ranks:
        rank.start()
    told = [reports.get() for _ in ranks]
    for rank in ranks:
        rank.join()
    assert told == [None] * SIZE, "\n".join(filter(None, told))


def one_after_the_other(rank, folder):
    save(rank, folder, 1)
    save(rank, folder, 2, is_due=False)
    dist.barrier()
    assert_saved(folder, 1)
    dist.barrier()
    save(rank, folder, 3)
    dist.barrier()
    assert_saved(folder, 3)


def one_cannot_write(rank, folder):
    save(rank, folder, 1)
    upstream = expert_saving.write_shard
    if rank == 1:
        def full(*_):
            raise RunFailed("cannot write: no space left")
        expert_saving.write_shard = full
    with pytest.raises(RunFailed, match="no space left"):  # on both
        save(rank, folder, 2)
    dist.barrier()
    assert_saved(folder, 1)
    expert_saving.write_shard = upstream


def the_others_are_not_seen(rank, folder):
    save(rank, folder, 1)
    expert_saving.PATIENCE = 0.2
    own = folder if rank == 0 else os.path.join(folder, "another machine's disk")
    upstream = expert_saving.write_shard
    expert_saving.write_shard = lambda path, *args: upstream(
        os.path.join(own, os.path.basename(path)), *args)
    if rank == 0:
        with pytest.raises(RunFailed, match="is not seen here: give a --save-dir that all mach"):
            save(rank, folder, 2)
        assert_saved(folder, 1)
    else:
        save(rank, folder, 2)


def one_does_not_see_the_checkpoint(rank, folder):
    trainer = SimpleNamespace(
        cfg=SimpleNamespace(checkpoint=SimpleNamespace(load_checkpoint_on_all_dp_ranks=False)),
        _optim_history=[])
    expert_loading.divided = lambda _trainer: True
    path = os.path.join(folder, f"checkpoint_of_{rank}.pt")
    with expert_loading.loading(trainer, path):  # a run that begins
        pass
    dist.barrier()
    if rank == 0:
        open(path, "w").close()
    with (pytest.raises(OptionError, match="process 1 does not see what process 0 does"),
          expert_loading.loading(trainer, path)):
        raise AssertionError("nothing must be read")
    if rank == 1:
        open(path, "w").close()
    dist.barrier()
    with (pytest.raises(OptionError, match="that all machines share"),
          expert_loading.loading(trainer, path)):
        assert trainer.cfg.checkpoint.load_checkpoint_on_all_dp_ranks
        trainer._optim_history = [{"num_updates": 5 + rank}]  # of different updates


@pytest.mark.distributed
@pytest.mark.parametrize("body", [one_after_the_other, one_cannot_write, the_others_are_not_seen,
                                  one_does_not_see_the_checkpoint],
                         ids=lambda body: body.__name__)
def test_two_processes(tmp_path, body):
    run(tmp_path, body)


@pytest.mark.parametrize("name, pointwise", [("adagrad", False), ("mine", True)])
def test_an_optimizer_of_single_weights_may_be_divided(monkeypatch, name, pointwise):
    monkeypatch.setattr(expert_saving, "divided", lambda _trainer: True)
    expert_saving._build_optimizer(lambda _trainer: None, trainer_with(name, pointwise))


def test_any_other_is_refused(monkeypatch):
    monkeypatch.setattr(expert_saving, "divided", lambda _trainer: True)
    with pytest.raises(OptionError, match="--optimizer mine with --moe-expert-parallel-size"):
        expert_saving._build_optimizer(lambda _trainer: None, trainer_with("mine", False))


def trainer_with(name, pointwise):
    """A trainer whose optimizer, `--optimizer NAME`, says so or not."""
    return SimpleNamespace(optimizer=SimpleNamespace(supports_flat_params=pointwise),
                           cfg=SimpleNamespace(optimizer=SimpleNamespace(_name=name)))
