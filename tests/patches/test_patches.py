"""The list of patches, and the small ones that need no run."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.dataclass.configs import CheckpointConfig, CommonConfig
from fairseq.distributed import utils as distributed_utils
from fairseq.optim.fp16_optimizer import _FP16OptimizerMixin
from fairseq.tasks import FairseqTask
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from evomoe_plugin import patches
from evomoe_plugin.config.dataclass_fields import add_field, store_schemas
from evomoe_plugin.patches.patch import wrap
from tests.conftest import ROOT


def test_every_patch_says_what_why_and_until_when():
    assert len({patch.name for patch in patches.PATCHES}) == len(patches.PATCHES)
    for patch in patches.PATCHES:
        assert patch.broken and patch.upstream and patch.remove_when
        assert patch.needed() is None or isinstance(patch.needed(), str)


def test_the_report_names_each_patch_once():
    assert [status.name for status in patches.report()] == [p.name for p in patches.PATCHES]
    assert all(status.reason for status in patches.report())


def test_applying_again_changes_nothing():
    def patched():
        return [
            checkpoint_utils.load_checkpoint_to_cpu,
            distributed_utils.all_gather_list,
            FairseqTask.get_batch_iterator,
            _FP16OptimizerMixin.build_fp32_params,
        ]

    before = patched()
    patches.apply_all()
    for patch in patches.PATCHES:
        if patch.needed():
            patch.apply()
    assert all(a is b for a, b in zip(before, patched(), strict=True))


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
    def criterion(_model, sample):
        return sample["loss"], 1, {"loss": sample["loss"]}

    task, model = FairseqTask(None), torch.nn.Identity()
    assert task.valid_step({}, model, criterion) == (0.0, 0, {})
    assert task.valid_step({"loss": 3.0}, model, criterion) == (3.0, 1, {"loss": 3.0})


def test_lists_are_gathered_without_a_gpu_and_whatever_their_size():
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
    store_schemas([CommonConfig])
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


def test_no_command_asks_for_tensorboardx():
    """A task that nobody chose does, when fairseq imports all of them."""
    code = """
import logging, sys
logging.basicConfig(level="INFO", stream=sys.stdout)
from evomoe_plugin.quiet_imports import ignore_warnings
ignore_warnings()
import fairseq.tasks.text_to_speech
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "tensorboardX" not in done.stdout
