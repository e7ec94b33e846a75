"""Which file a run resumes from, and whose it is."""

import os
import types

import pytest

from evomoe_plugin.checkpoint.fsdp_shards import check_rank, consolidated
from evomoe_plugin.checkpoint.resume import check_begins
from evomoe_plugin.config.errors import OptionError


def checkpoint(folder, **given):
    resets = ("reset_optimizer", "reset_meters", "reset_dataloader", "reset_lr_scheduler")
    options = {"save_dir": str(folder), "restore_file": "checkpoint_last.pt"}
    return types.SimpleNamespace(**dict.fromkeys(resets, False) | options | given)


def begin(folder, *names, **given):
    for second, name in enumerate(names):
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (second, second))
    check_begins(checkpoint(folder, **given), str(folder / "checkpoint_last.pt"))


def test_a_run_does_not_begin_over_another(tmp_path):
    message = (
        r"^--save-dir .* has no checkpoint_last.pt, but 2 other checkpoints, as checkpoint_1_9.pt: "
        r"to go on from it, give --restore-file .*/checkpoint_1_9.pt; for a new run, give another"
    )
    with pytest.raises(OptionError, match=message):
        begin(tmp_path, "checkpoint1.pt", "checkpoint_1_9.pt")


def test_nor_over_one_with_a_file_a_rank(tmp_path):
    names = [f"checkpoint_1_{n}-shard{rank}.pt" for n in (8, 9) for rank in (0, 1)]
    with pytest.raises(OptionError, match=r"2 other checkpoints, as checkpoint_1_9.pt"):
        begin(tmp_path, *names)


def test_a_run_that_was_killed_in_its_first_save_begins_anew(tmp_path, caplog):
    begin(tmp_path, "checkpoint_1_8.pt")
    assert "checkpoint_last.pt is missing, beside checkpoint_1_8.pt: a new run be" in caplog.text


@pytest.mark.parametrize(
    ("names", "given"),
    [
        ((), {}),
        (("checkpoint_best.pt", "notes.txt", "checkpoint_1_8.pt.tmp"), {}),
        (("checkpoint1.pt", "checkpoint2.pt"), {"reset_optimizer": True}),
        (("checkpoint1.pt", "checkpoint2.pt"), {"restore_file": "other.pt"}),
        (("checkpoint1.pt", "checkpoint2.pt"), {"save_dir": "nowhere"}),
    ],
)
def test_new_runs(tmp_path, names, given, caplog):
    begin(tmp_path, *names, **given)
    assert not caplog.text


def shard(rank):
    return {
        "cfg": {"distributed_training": {"distributed_world_size": 2, "distributed_rank": rank}},
        "optimizer_history": [{"num_updates": 3}],
    }


def test_swapped_shards_are_told_by_the_rank_that_they_hold(tmp_path):
    check_rank(shard(1), "run/checkpoint_last-shard1.pt")
    check_rank(shard(1), "run/checkpoint_last.pt")  # no name of a shard says whose it should be
    with pytest.raises(OptionError, match=r"^--checkpoint c-shard0.pt: is shard 1 under another's"):
        check_rank(shard(1), "c-shard0.pt")
    for rank in (0, 1):
        (tmp_path / f"c-shard{rank}.pt").write_bytes(b"")
    swapped = {str(tmp_path / f"c-shard{rank}.pt"): shard(1 - rank) for rank in (0, 1)}
    with pytest.raises(OptionError, match=r"c-shard0.pt: is shard 1 under another's name"):
        consolidated(str(tmp_path / "c-shard0.pt"), swapped.__getitem__)
