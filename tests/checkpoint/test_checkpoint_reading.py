"""What a checkpoint may hold, and what is said of files that are none."""

from __future__ import annotations

import argparse
import os
import random
import zipfile

import numpy as np
import omegaconf
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager

from evomoe_plugin.checkpoint.checkpoint_file import read_main_file
from evomoe_plugin.checkpoint.load import _local_path, load_file
from evomoe_plugin.checkpoint.reading import read_checkpoint
from evomoe_plugin.config.errors import OptionError


def state(**more):
    return {
        "model": {"w": torch.ones(2)},
        "args": None,
        "cfg": {"model": {"_name": "transformer_lm"}},
        "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 1}
        ],
        "extra_state": {"train_iterator": {"epoch": 1}},
        **more,
    }


def load(path, content):
    torch.save(content, path)
    return checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_what_fairseq_stores_is_loaded(tmp_path):
    cfg = omegaconf.OmegaConf.create({"a": [1, {"b": "c"}]})
    loaded = load(
        tmp_path / "c.pt",
        state(
            task_state={
                "cfg": cfg,
                "score": np.float64(1.5),
                "count": np.int64(2),
                "array": np.ones(3),
                "args": argparse.Namespace(x=1),
            },
        ),
    )
    assert loaded["task_state"]["score"] == 1.5
    assert loaded["task_state"]["cfg"] == cfg
    assert loaded["task_state"]["args"].x == 1
    assert loaded["task_state"]["array"].tolist() == [1, 1, 1]


def test_a_config_with_a_namespace_is_loaded(tmp_path):
    """As models without a dataclass leave it."""
    loaded = load(tmp_path / "c.pt", state(cfg={"model": argparse.Namespace(arch="old")}))
    assert loaded["cfg"].model.arch == "old"


def test_every_rank_gets_all_experts(tmp_path):
    """Without sharded experts the options that belong to them are refused."""
    given = {
        "moe_expert_parallel_size": 2,
        "moe_ep_chunks": 2,
        "moe_ep_wire_dtype": "bf16",
        "moe_ep_checkpoint": "sharded",
        "moe_freq": 1,
    }
    model = load(tmp_path / "c.pt", state(cfg={"model": given}))["cfg"].model
    assert model == {
        "moe_expert_parallel_size": 1,
        "moe_ep_chunks": 1,
        "moe_ep_wire_dtype": "same",
        "moe_ep_checkpoint": "auto",
        "moe_freq": 1,
    }


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/evomoe_should_not_exist",)


def test_a_program_is_refused_by_name(tmp_path):
    with pytest.raises(OptionError, match=r"c\.pt: holds posix\.system, .*refused"):
        load(tmp_path / "c.pt", state(task_state=Malicious()))
    assert not os.path.exists("/tmp/evomoe_should_not_exist")


@pytest.mark.parametrize("size", [0, 100, -30])
def test_a_file_cut_short_is_named(tmp_path, size):
    path = tmp_path / "c.pt"
    torch.save(state(), path)
    os.truncate(path, size % (path.stat().st_size + 1) if size < 0 else size)
    with pytest.raises(OptionError, match=r"c\.pt: cannot be read, it is cut short"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def pickled_as(path, content):
    """A file of torch whose pickle is these bytes, or what a function makes of the right ones."""
    torch.save(state(), path)
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    (name,) = (name for name in files if name.endswith("data.pkl"))
    files[name] = content(files[name]) if callable(content) else content
    with zipfile.ZipFile(path, "w") as archive:
        for name, parts in files.items():
            archive.writestr(name, parts)
    return path


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"\x80\x02a.", IndexError),
        (b"\x80\x02}]Ns.", TypeError),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", TypeError),
        (b"\x80\x02cargparse\nNamespace\n)RK\x01b.", TypeError),
    ],
)
def test_damage_that_leads_the_unpickler_astray(tmp_path, content, cause):
    with pytest.raises(OptionError, match=r"c\.pt: cannot be read, it is cut short") as caught:
        with open(pickled_as(tmp_path / "c.pt", content), "rb") as file:
            load_file(file)
    assert isinstance(caught.value.__cause__, cause)
    assert "\n" not in str(caught.value)


def test_damage_anywhere_in_the_pickle_ends_in_one_line(tmp_path):
    draw, refused = random.Random(1), 0

    def damage(pickled):
        damaged = bytearray(pickled)
        for _ in range(draw.randint(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        return bytes(damaged)

    for _ in range(100):
        with open(pickled_as(tmp_path / "c.pt", damage), "rb") as file:
            try:
                load_file(file)
            except OptionError as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 50


def test_a_foreign_file_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"c\.pt: is a file of torch, but no checkpoint"):
        load(tmp_path / "c.pt", {"weight": torch.ones(2)})
    path = tmp_path / "text.pt"
    path.write_text("hello, this is no checkpoint at all\n" * 9)
    with pytest.raises(OptionError, match=r"text\.pt: cannot be read"):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_ranks_may_remove_a_stale_copy_of_a_remote_file_at_once(tmp_path, monkeypatch):
    copy = tmp_path / "copy.pt"
    monkeypatch.setattr(PathManager, "path_requires_pathmanager", lambda path: True)
    monkeypatch.setattr(PathManager, "get_local_path", lambda path: str(copy))

    def remove(path):
        raise FileNotFoundError(path)

    copy.touch()
    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", remove)
        assert _local_path("remote://last.pt", load_on_all_ranks=False) == str(copy)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize(
    "read",
    [
        checkpoint_utils.load_checkpoint_to_cpu,
        checkpoint_utils.load_ema_from_checkpoint,
        lambda path: read_checkpoint("DENSE", path),
        lambda path: read_main_file("CKPT", path),
    ],
)
def test_every_reader_refuses_a_flipped_bit_of_a_tensor(tmp_path, read):
    path = tmp_path / "c.pt"
    tensor = torch.arange(1000.0)
    torch.save(state(model={"w": tensor}, extra_state={"ema": {"w": tensor}}), path)
    read(str(path))
    flip(path, 8 * path.read_bytes().index(tensor.numpy().tobytes()) + 4321)
    with pytest.raises(OptionError, match=r"c\.pt: has been altered: .* part \S+data/0 is wrong"):
        read(str(path))


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    """In the directory too, where other bits tell torch than zipfile how to read a record."""
    path, draw, refused = tmp_path / "c.pt", random.Random(1), 0
    torch.save(state(model={"w": torch.arange(7.0), "n": torch.arange(3)}), path)
    good = path.read_bytes()
    with open(path, "rb") as file:
        wanted = repr(load_file(file))
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    used = [at for at, byte in enumerate(good[:start]) if byte != ord("Z")]  # no padding
    bits = [8 * draw.choice(used) + draw.randrange(8) for _ in range(200)]
    for bit in [*bits, *range(8 * start, 8 * len(good), 3)]:
        path.write_bytes(good)
        flip(path, bit)
        try:
            with open(path, "rb") as file:
                assert repr(load_file(file)) == wanted, bit
        except OptionError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200


def test_a_compressed_part_is_refused_before_it_is_inflated(tmp_path):
    path, bomb = tmp_path / "c.pt", tmp_path / "bomb.pt"
    torch.save(state(), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bomb, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        target.writestr("c/data/9", bytes(2**26), zipfile.ZIP_DEFLATED)
    with pytest.raises(OptionError, match=r"bomb\.pt: has been altered: .* c/data/9 is compressed"):
        read_main_file("CKPT", str(bomb))


def test_what_is_no_moving_average_is_named(tmp_path):
    path = tmp_path / "c.pt"
    torch.save(state(), path)
    with pytest.raises(OptionError, match=r"^--ema-seed-model .*has no moving average"):
        checkpoint_utils.load_ema_from_checkpoint(str(path))
    path.write_text("text")
    with pytest.raises(OptionError, match=r"^--ema-seed-model .*cannot be read"):
        checkpoint_utils.load_ema_from_checkpoint(str(path))
    with pytest.raises(OptionError, match=r"^--ema-seed-model .*no such file"):
        checkpoint_utils.load_ema_from_checkpoint(str(tmp_path / "none.pt"))
