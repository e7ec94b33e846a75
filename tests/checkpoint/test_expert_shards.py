"""Experts in files of their own: the same checkpoint in any form, or a fault that is named."""

import os
import shutil

import pytest
import torch
from fairseq import checkpoint_utils
from safetensors.torch import load_file

from evomoe_plugin.checkpoint.atomic_files import sha256
from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
from evomoe_plugin.checkpoint.expert_shards import (
    ExpertShards,
    file_name,
    manifest_of,
    with_experts,
    write_shard,
)
from evomoe_plugin.checkpoint.optimizer_names import optimizer_names
from evomoe_plugin.checkpoint.reshard import consolidate, reshard
from evomoe_plugin.checkpoint.verify import faults
from evomoe_plugin.cli import main as evomoe
from evomoe_plugin.config.errors import OptionError, RunFailed
from tests.checkpoint.expert_states import (
    UPDATE,
    assert_same_state,
    parameters,
    save,
    whole_state,
)


def divide(source, out, size):
    reshard(read_main_file("CKPT", str(source)), str(out), size)
    return folder_of(out)


def folder_of(out):
    """The one folder of experts beside a checkpoint."""
    (folder,) = out.with_suffix(".experts").iterdir()
    return folder


@pytest.fixture
def whole(tmp_path):
    save(tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


@pytest.fixture
def divided(whole, tmp_path):
    """A checkpoint with its experts in two files."""
    divide(whole, tmp_path / "divided.pt", 2)
    return tmp_path / "divided.pt"


def test_tensors_of_any_kind_are_written(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool)
    tensors = {str(dtype): (torch.rand(3, 4) * 9).to(dtype) for dtype in dtypes}
    tensors |= {
        "none": torch.empty(0, 5),
        "number": torch.tensor(3.0),
        "columns": torch.rand(4, 6)[:, ::2],
    }
    written = write_shard(str(tmp_path / "some.pt"), "tag", 0, 1, tensors)
    path = tmp_path / "some.experts/tag" / written.name
    assert (written.bytes, written.sha256) == (path.stat().st_size, sha256(path))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    """Of a file system with room for one megabyte, as the process sees it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(RunFailed, match="cannot write .*some.experts/tag"):
            write_shard(str(tmp_path / "some.pt"), "tag", 0, 1, {"model/a": torch.zeros(2**19)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list((tmp_path / "some.experts/tag").iterdir()) == []


@pytest.mark.parametrize("sizes", [(1,), (2,), (4,), (2, 4), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("with_optimizer", [True, False], ids=["optimizer", "weights alone"])
def test_every_form_is_the_same_checkpoint(tmp_path, sizes, with_optimizer):
    wanted = save(tmp_path / "0.pt", with_optimizer=with_optimizer)
    for i, size in enumerate(sizes):
        folder = divide(tmp_path / f"{i}.pt", tmp_path / f"{i + 1}.pt", size)
        assert len(list(folder.iterdir())) == size
        assert_same_state(tmp_path / f"{i + 1}.pt", wanted)
    last = tmp_path / f"{len(sizes)}.pt"
    alone = torch.load(last, weights_only=True)
    assert not any(".experts." in name for name in alone["model"])
    consolidate(read_main_file("CKPT", str(last)), str(tmp_path / "one.pt"))
    assert_same_state(tmp_path / "one.pt", wanted)
    assert not (tmp_path / "one.experts").exists()
    assert not list(faults(read_main_file("CKPT", str(last))))


def test_experts_stand_between_the_gate_and_the_shared_ones():
    names = list(whole_state()["model"])
    experts = {name: None for name in names if ".experts." in name}
    rest = {name: 1 for name in names if name not in experts}
    assert list(with_experts(rest, experts)) == names
    with pytest.raises(OptionError, match="has no layer decoder.layers.7.moe"):
        with_experts(rest, {"decoder.layers.7.moe.experts.fc1_weight": None})


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_process_reads_the_rows_it_holds_and_no_other_file(divided, size):
    main = read_main_file("CKPT", str(divided))
    key = "model/decoder.layers.3.moe.experts.fc2_weight"
    wanted = whole_state()["model"][key.removeprefix("model/")]
    for rank in range(size):
        own = slice(rank * 8 // size, (rank + 1) * 8 // size)
        assert torch.equal(ExpertShards(str(divided), main.manifest).rows(key, own), wanted[own])
    damage(folder_of(divided) / file_name(1, 2))
    shards = ExpertShards(str(divided), main.manifest)
    assert torch.equal(shards.rows(key, slice(0, 4)), wanted[:4])
    assert torch.equal(shards.rows(key, slice(1, 3)), wanted[1:3])
    with pytest.raises(OptionError, match="00001-of-00002.safetensors has been altered"):
        shards.rows(key, slice(3, 5))


def damage(path, at=-20):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def missing(folder, _tmp_path):
    (folder / file_name(1, 2)).unlink()
    return "shard 1 of 2 is missing"


def all_missing(folder, _tmp_path):
    shutil.rmtree(folder)
    return "shard 0 of 2 is missing"


def extra(folder, _tmp_path):
    shutil.copy(folder / file_name(1, 2), folder / "more.safetensors")
    return "more.safetensors is no part of it"


def of_another_number(folder, tmp_path):
    """As left by a run of four processes."""
    other = divide(tmp_path / "whole.pt", tmp_path / "four.pt", 4)
    shutil.copy(other / file_name(2, 4), folder)
    return "00002-of-00004.safetensors is no part of it"


def altered(folder, _tmp_path):
    damage(folder / file_name(0, 2))
    return "00000-of-00002.safetensors has been altered"


def altered_header(folder, _tmp_path):
    damage(folder / file_name(1, 2), at=30)
    return "00001-of-00002.safetensors has been altered"


def cut_short(folder, _tmp_path):
    path = folder / file_name(1, 2)
    path.write_bytes(path.read_bytes()[:-7])
    return "it is cut short"


def of_another_update(folder, tmp_path):
    save(tmp_path / "later.pt", seed=1, update=UPDATE + 10)
    other = divide(tmp_path / "later.pt", tmp_path / "later2.pt", 2)
    shutil.copy(other / file_name(1, 2), folder)
    return "00001-of-00002.safetensors has"


def exchanged(folder, _tmp_path):
    first, second = folder / file_name(0, 2), folder / file_name(1, 2)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)
    return "00000-of-00002.safetensors has been altered"


@pytest.mark.parametrize(
    "fault",
    [
        missing,
        all_missing,
        extra,
        of_another_number,
        altered,
        altered_header,
        cut_short,
        of_another_update,
        exchanged,
    ],
    ids=lambda fault: fault.__name__,
)
def test_a_fault_is_named_and_refused(divided, tmp_path, capsys, fault):
    wanted = fault(folder_of(divided), tmp_path)
    with pytest.raises(OptionError, match=wanted) as raised:
        checkpoint_utils.load_checkpoint_to_cpu(str(divided))
    assert str(divided) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert evomoe(["checkpoint", "verify", str(divided)]) == 1
    assert wanted in capsys.readouterr().out
    assert evomoe(["checkpoint", "consolidate", str(divided), str(tmp_path / "out.pt")]) == 2
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    "change, wanted",
    [
        (lambda m: m.update(version=2), "later version"),
        (lambda m: m["files"][0].update(name="../elsewhere"), "is invalid"),
        (lambda m: m.update(tag=".."), "is invalid"),
        (lambda m: m.pop("files"), "is invalid"),
        (lambda m: m["tensors"].update(x={"shape": [3], "dtype": "float32"}), "is invalid"),
        (lambda m: m["tensors"].update(x={"shape": [4], "dtype": "load"}), "is invalid"),
    ],
    ids=["version", "path", "tag", "no files", "indivisible", "dtype"],
)
def test_a_list_of_experts_that_cannot_be_is_refused(divided, change, wanted):
    state = torch.load(divided, weights_only=True)
    change(state["moe_experts"])
    with pytest.raises(OptionError, match=wanted):
        manifest_of(state, str(divided))


def test_numbers_and_layers_are_verified(tmp_path, capsys):
    for name, change, wanted in [
        (
            "nan",
            lambda s: (
                s["model"]["decoder.layers.1.moe.experts.fc1_bias"]
                .view(-1)[3:4]
                .fill_(float("nan"))
            ),
            "fc1_bias has 1 NaN/Inf values",
        ),
        (
            "inf",
            lambda s: (
                s["last_optimizer_state"]["state"][0]["exp_avg"].view(-1)[:2].fill_(float("inf"))
            ),
            "parameter 0: exp_avg has 2 NaN/Inf values",
        ),
        (
            "layer",
            lambda s: [s["model"].pop(n) for n in list(s["model"]) if "layers.3.moe.experts" in n],
            "has no experts of layer 3",
        ),
        (
            "count",
            lambda s: s["cfg"]["model"].update(moe_expert_count="4"),
            "has 8 experts in layer 3, its options say 4",
        ),
    ]:
        state = whole_state()
        change(state)
        path = tmp_path / f"{name}.pt"
        torch.save(state, path)
        assert evomoe(["checkpoint", "verify", str(path)]) == 1
        assert wanted in capsys.readouterr().out
        if name in ("nan", "inf"):
            divide(path, tmp_path / f"{name}2.pt", 2)
            assert evomoe(["checkpoint", "verify", str(tmp_path / f"{name}2.pt")]) == 1
            assert "NaN/Inf" in capsys.readouterr().out


def test_an_altered_main_file_is_found(whole, capsys):
    position = whole.read_bytes().index(
        whole_state()["model"]["decoder.embed_tokens.weight"].numpy().tobytes()
    )
    damage(whole, at=position)
    assert evomoe(["checkpoint", "verify", str(whole)]) == 1
    assert "altered" in capsys.readouterr().out


def test_verbs(divided, tmp_path, capsys):
    assert evomoe(["checkpoint", "inspect", str(divided)]) == 0
    told = capsys.readouterr().out
    for wanted in ("experts in 2 files", "4 in layer 1, 8 in layer 3", "adam, 18 parameters"):
        assert wanted in told
    assert evomoe(["checkpoint", "verify", str(divided)]) == 0
    assert "no faults" in capsys.readouterr().out
    out = str(tmp_path / "out.pt")
    assert evomoe(["checkpoint", "reshard", str(divided), out, "--size", "4"]) == 0
    assert_same_state(out, whole_state())
    before = sorted(p for p in tmp_path.rglob("*"))
    assert evomoe(["checkpoint", "consolidate", str(divided), out]) == 2
    assert "exists already" in capsys.readouterr().err
    assert evomoe(["checkpoint", "reshard", str(divided), out, "--size", "3", "--overwrite"]) == 2
    assert "--size 3: does not divide the 4 experts" in capsys.readouterr().err
    assert evomoe(["checkpoint", "reshard", str(divided), out, "--size", "0", "--overwrite"]) == 2
    assert evomoe(["checkpoint", "inspect", str(tmp_path / "no.pt")]) == 2
    assert before == sorted(p for p in tmp_path.rglob("*"))
    # Onto itself, too.
    assert evomoe(["checkpoint", "reshard", out, out, "--size", "1", "--overwrite"]) == 0
    assert [p.name for p in folder_of(tmp_path / "out.pt").iterdir()] == [file_name(0, 1)]
    assert_same_state(out, whole_state())
    assert evomoe(["checkpoint", "consolidate", out, out, "--overwrite"]) == 0
    assert not (tmp_path / "out.experts").exists()
    assert_same_state(out, whole_state())


def test_entries_are_told_by_their_shapes_or_not_at_all(tmp_path):
    state = whole_state()
    assert optimizer_names("some.pt", state) == parameters(state)
    # Two of one shape side by side, of which one was frozen: it could be either.
    state["model"]["decoder.other_norm.weight"] = torch.rand(5)
    with pytest.raises(OptionError, match="does not name the parameters"):
        optimizer_names("some.pt", state)
    torch.save(state, tmp_path / "some.pt")
    with pytest.raises(OptionError, match="does not name the parameters"):
        divide(tmp_path / "some.pt", tmp_path / "out.pt", 2)
    assert os.listdir(tmp_path) == ["some.pt"]
