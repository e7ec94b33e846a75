"""Checkpoints that a user names: data only, or one line."""

import argparse
import math
import os
import pickle
import types
from pathlib import Path

import pytest
import torch

from evomoe_plugin.checkpoint.load import nan_or_inf
from evomoe_plugin.checkpoint.reading import read_checkpoint
from evomoe_plugin.checkpoint.resume import file_to_read
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.trainer.layouts import Replicated
from tests.evolve.dense_models import SIZES, save_dense


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("dense") / "dense.pt")


class Program:
    """A pickle that would write a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_checkpoint_is_read(dense):
    state = read_checkpoint("DENSE", str(dense))
    assert state["cfg"].model.decoder_embed_dim == SIZES["width"]
    assert state["model"]["decoder.embed_tokens.weight"].shape[1] == SIZES["width"]


def test_an_old_one_with_arguments_in_place_of_a_configuration_is_read(dense, tmp_path):
    state = torch.load(dense, weights_only=False)
    model = state["cfg"]["model"]
    old = {name: value for name, value in model.items() if name != "_name"}
    state["args"] = argparse.Namespace(
        **old,
        arch="transformer_lm",
        task="language_modeling",
        data="data-bin",
        criterion="cross_entropy",
        optimizer="adam",
        lr_scheduler="fixed",
        lr=[0.1],
    )
    state["cfg"] = None
    torch.save(state, tmp_path / "old.pt")
    assert read_checkpoint("DENSE", str(tmp_path / "old.pt"))["cfg"].model.decoder_layers == 4


@pytest.mark.parametrize("where", ["cfg", "model", "extra_state", "whole"])
def test_nothing_in_a_file_is_run(dense, tmp_path, where):
    trace = tmp_path / "trace"
    state = torch.load(dense, weights_only=False)
    if where == "whole":
        state = Program(trace)
    else:
        state[where]["program"] = Program(trace)
    for legacy in (False, True):
        path = tmp_path / f"bad{legacy}.pt"
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(OptionError, match="system, which is not data .*refused"):
            read_checkpoint("DENSE", str(path))
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Program(trace)))
    with pytest.raises(OptionError):
        read_checkpoint("DENSE", str(tmp_path / "plain.pt"))
    assert not trace.exists()


@pytest.mark.parametrize("keep", [0, 10, 1000, 0.5, -1])
def test_a_file_that_is_cut_short(dense, tmp_path, keep):
    whole = dense.read_bytes()
    end = int(len(whole) * keep) if isinstance(keep, float) else keep
    (tmp_path / "cut.pt").write_bytes(whole[:end])
    with pytest.raises(OptionError, match=r"^DENSE .*cut\.pt: cannot be read") as caught:
        read_checkpoint("DENSE", str(tmp_path / "cut.pt"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": torch.zeros(2)}, "it has no 'model'"),
        (torch.zeros(2), "it has no 'model'"),
        ({"model": {"w": torch.zeros(2)}}, "no checkpoint of fairseq"),
        (
            {
                "model": {"w": torch.zeros(2)},
                "cfg": None,
                "extra_state": {},
                "optimizer_history": [
                    {"optimizer_name": "a", "lr_scheduler_state": {}, "num_updates": 0}
                ],
            },
            "no checkpoint of",
        ),
        (
            {
                "model": {"w": 3},
                "cfg": {"model": {"_name": "x"}},
                "extra_state": {"train_iterator": {}},
                "optimizer_history": [
                    {"optimizer_name": "a", "lr_scheduler_state": {}, "num_updates": 0}
                ],
            },
            "'w' of its 'model' is no tensor",
        ),
    ],
)
def test_a_file_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(OptionError, match=message) as caught:
        read_checkpoint("DENSE", str(tmp_path / "other.pt"))
    assert "\n" not in str(caught.value)


def test_text_and_nothing(tmp_path):
    (tmp_path / "text.pt").write_text("once upon a time")
    with pytest.raises(OptionError, match="cannot be read"):
        read_checkpoint("DENSE", str(tmp_path / "text.pt"))
    for missing, fault in (
        (tmp_path / "gone.pt", "there is no such file"),
        (tmp_path, "is no file"),
    ):
        with pytest.raises(OptionError, match=fault):
            read_checkpoint("DENSE", str(missing))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_found_in_every_dtype(dtype, value):
    tensors = {
        "whole": torch.tensor([[0.0, torch.finfo(dtype).max, -1.0]], dtype=dtype),
        "empty": torch.empty(0, dtype=dtype),
        "bits": torch.tensor([2**63 - 1]),
        "broken": torch.tensor([[1.0, value, 2.0, value]], dtype=dtype),
    }
    assert list(nan_or_inf(tensors)) == ["broken has 2 NaN/Inf values"]


def trainer_of(restore_file="checkpoint_last.pt"):
    return types.SimpleNamespace(
        layout=Replicated(),
        cfg=types.SimpleNamespace(checkpoint=types.SimpleNamespace(restore_file=restore_file)),
    )


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("missing.pt")])
def test_a_run_does_not_begin_anew_where_its_checkpoint_is_no_file(tmp_path, make):
    path = tmp_path / "checkpoint_last.pt"
    make(path)
    with pytest.raises(OptionError, match="is no file, or a link to one that is missing"):
        file_to_read(trainer_of(), str(path))
