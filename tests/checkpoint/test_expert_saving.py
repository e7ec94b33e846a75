"""The protocol by which processes write their experts beside one main file."""

import multiprocessing
import os
import traceback

import pytest
import torch
import torch.distributed as dist

from evomoe_plugin.checkpoint import checkpoint_files, expert_files, expert_saving
from evomoe_plugin.checkpoint.expert_saving import ExpertSave
from evomoe_plugin.checkpoint.expert_shards import Entry, ExpertShards, manifest_of
from evomoe_plugin.checkpoint.sharded_experts import check_all_ranks_see
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.dispatch.process_groups import ExpertGroups

SIZE = 2
WEIGHT = "decoder.layers.1.moe.experts.fc1_weight"


def experts_of(rank, update):
    rows = torch.full((3, 4), float(10 * update + rank))
    return {f"model/{WEIGHT}": rows, f"optimizer/{WEIGHT}/exp_avg": -rows}


def save(rank, folder, update, is_due=True):
    """As `checkpoint.save` does on each process."""
    groups = ExpertGroups(SIZE, rank, dist.group.WORLD, None)
    entry = {WEIGHT: Entry(5, {"step": update})}
    save = ExpertSave(groups, update, experts_of(rank, update), entry)
    path = os.path.join(folder, "checkpoint_last.pt")
    if rank == 0 and is_due:
        state = {"model": {}}
        with save.beside(state, path):
            checkpoint_files.save(state, path)
    save.finish()


def assert_saved(folder, update):
    path = os.path.join(folder, "checkpoint_last.pt")
    manifest = manifest_of(torch.load(path, weights_only=True), path)
    assert manifest.update == update
    shards = ExpertShards(path, manifest)
    assert torch.equal(
        shards.rows(f"model/{WEIGHT}"),
        torch.cat([experts_of(r, update)[f"model/{WEIGHT}"] for r in range(SIZE)]),
    )
    assert manifest.optimizer[WEIGHT] == Entry(5, {"step": update})
    assert expert_files.tags(path) == [manifest.tag]


def process(rank, folder, body, reports):
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=SIZE
        )
        body(rank, folder)
        reports.put(None)
    except BaseException:
        reports.put(traceback.format_exc())


def run(tmp_path, body):
    """Run `body(rank, folder)` in two processes, which share what is imported here."""
    context = multiprocessing.get_context("fork")
    reports = context.SimpleQueue()
    ranks = [
        context.Process(target=process, args=(r, str(tmp_path), body, reports)) for r in range(SIZE)
    ]
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
        os.path.join(own, os.path.basename(path)), *args
    )
    if rank == 0:
        with pytest.raises(RunFailed, match="is not visible here: give a --save-dir that all mach"):
            save(rank, folder, 2)
        assert_saved(folder, 1)
    else:
        save(rank, folder, 2)


def one_does_not_see_the_checkpoint(rank, folder):
    path = os.path.join(folder, f"checkpoint_of_{rank}.pt")
    check_all_ranks_see(folder, os.path.isfile(path))  # a run that begins
    dist.barrier()
    if rank == 0:
        open(path, "w").close()
    with pytest.raises(OptionError, match="rank 1 does not see what rank 0 does"):
        check_all_ranks_see(folder, os.path.isfile(path))
    with pytest.raises(OptionError, match="that all machines share"):
        check_all_ranks_see(folder, 5 + rank)  # the updates of what was read


@pytest.mark.distributed
@pytest.mark.parametrize(
    "body",
    [
        one_after_the_other,
        one_cannot_write,
        the_others_are_not_seen,
        one_does_not_see_the_checkpoint,
    ],
    ids=lambda body: body.__name__,
)
def test_two_processes(tmp_path, body):
    run(tmp_path, body)
