"""Ranks compare their code and options before they train."""

import json

import pytest
import torch.distributed as dist
from omegaconf import OmegaConf

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.launch import same_everywhere
from evomoe_plugin.launch.same_everywhere import check_same_everywhere

CFG = {
    "common": {"seed": 1, "log_file": "a"},
    "optimization": {"lr": [0.1]},
    "distributed_training": {"distributed_rank": 0},
}


def options(**changed):
    cfg = OmegaConf.create(CFG)
    for name, value in changed.items():
        OmegaConf.update(cfg, name.replace("__", "."), value)
    return cfg


@pytest.fixture
def compare(monkeypatch):
    """Check the options of rank 0 against those of a rank 1, each with code of its own."""

    def check(first, second, code=None):
        sent = {0: [], 1: []}

        def gather(found, own):
            sent[rank].append(own)
            if rank == 1 and len(sent[0]) >= len(sent[1]):
                found[:] = [sent[0][len(sent[1]) - 1], own]
            elif rank == 1:
                found[:] = [json.dumps({"code": own_code, "options": first_options}), own]
            else:
                found[:] = [own, own]

        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "all_gather_object", gather)
        own_code = same_everywhere._code()
        first_options = dict(same_everywhere._options(OmegaConf.to_container(first)))
        rank = 0
        check_same_everywhere(first)
        monkeypatch.setattr(same_everywhere, "_code", lambda: code or own_code)
        rank = 1
        check_same_everywhere(second)

    return check


def test_folders_ranks_and_logs_may_differ(compare):
    compare(options(), options(common__log_file="b", distributed_training__distributed_rank=1))


def test_another_option_is_named_on_all_ranks(compare):
    with pytest.raises(
        OptionError, match=r"^--lr \[0.2\] on rank 1: it is \[0.1\] on rank 0: give"
    ):
        compare(options(), options(optimization__lr=[0.2]))


def test_another_version_is_named(compare):
    code = {**same_everywhere._code(), "torch": "0.0.1"}
    with pytest.raises(RunFailed, match=r"^rank 1 has other code than rank 0: .*torch 0\.0\.1, "):
        compare(options(), options(), code)
