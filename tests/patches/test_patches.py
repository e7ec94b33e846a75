"""The list of mends, and the small ones that need no run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fairseq.dataclass.configs import CheckpointConfig, CommonConfig
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from evomoe_plugin import patches
from evomoe_plugin.config.dataclass_fields import add_field
from evomoe_plugin.patches.patch import wrap


def test_every_mend_says_what_why_and_until_when():
    assert len({mend.name for mend in patches.PATCHES}) == len(patches.PATCHES)
    for mend in patches.PATCHES:
        assert mend.broken and mend.upstream and mend.remove_when
        assert mend.needed() is None or isinstance(mend.needed(), str)


def test_the_report_names_each_mend_once():
    assert [status.name for status in patches.report()] == [mend.name for mend in patches.PATCHES]
    assert all(status.reason for status in patches.report())


def test_applying_again_changes_nothing():
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    before = [Trainer.load_checkpoint, Trainer.set_num_updates, checkpoint_utils.save_checkpoint]
    patches.apply_all()
    for mend in patches.PATCHES:
        if mend.needed():
            mend.apply()
    after = [Trainer.load_checkpoint, Trainer.set_num_updates, checkpoint_utils.save_checkpoint]
    assert all(a is b for a, b in zip(before, after, strict=True))


def test_wrapping_twice_composes():
    class Owner:
        def word(self):
            return "a"

    wrap(Owner, "word", lambda inner, self: inner(self) + "b")
    wrap(Owner, "word", lambda inner, self: inner(self) + "c")
    assert Owner().word() == "abc"


def test_numpy_has_what_fairseq_asks_for():
    assert np.zeros(1, dtype=np.compat.long).dtype == np.dtype(int)


def test_a_process_that_has_no_batch_left_validates_nothing():
    from fairseq.tasks import FairseqTask

    def criterion(_model, sample):
        return sample["loss"], 1, {"loss": sample["loss"]}

    task, model = FairseqTask(None), torch.nn.Identity()
    assert task.valid_step({}, model, criterion) == (0.0, 0, {})
    assert task.valid_step({"loss": 3.0}, model, criterion) == (3.0, 1, {"loss": 3.0})


def test_lists_are_gathered_without_a_gpu_and_whatever_their_size():
    from fairseq.distributed import utils as distributed_utils

    data = {"loss": torch.arange(10_000), "name": "a"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (found,) = distributed_utils.all_gather_list(data, group=dist.group.WORLD, max_size=10)
    finally:
        dist.destroy_process_group()
    assert torch.equal(found["loss"], data["loss"]) and found["name"] == "a"


def test_an_added_field_is_an_option_and_a_hydra_field():
    add_field(CommonConfig, "test_only_field", int, default=3, help="for this test")
    add_field(CommonConfig, "test_only_field", int, default=4, help="ignored")
    try:
        assert CommonConfig()._get_default("test_only_field") == 3
        kept = ConfigStore.instance().load("config.yaml").node
        assert kept.common.test_only_field == 3
        with pytest.raises(Exception, match="could not be converted to Integer"):
            kept.common.test_only_field = "many"
        assert ConfigStore.instance().load("common.yaml").node.test_only_field == 3
    finally:
        del CommonConfig.__dataclass_fields__["test_only_field"], CommonConfig.test_only_field
        del CommonConfig.__annotations__["test_only_field"]


def test_symlink_is_a_field():
    assert OmegaConf.structured(CheckpointConfig).symlink is False
