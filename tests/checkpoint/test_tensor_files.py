"""Files of safetensors, written by the format's description, and files that are none."""

import json

import pytest
import torch

from evomoe_plugin.checkpoint.tensor_files import read_safetensors
from evomoe_plugin.config.errors import OptionError

TENSORS = {
    "a": torch.randn(3, 4),
    "b": torch.arange(5),
    "c": torch.randn(2, 1, 2).half(),
    "d": torch.randn(7).bfloat16(),
    "e": torch.tensor([True, False]),
    "f": torch.tensor(2.5),
    "g": torch.zeros(0, 3),
}
NAMES = {
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "BOOL",
}


def written(path, tensors, header=None, cut=None):
    """A file by the format's description."""
    entries, data = {}, b""
    for name, value in tensors.items():
        raw = (
            value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            if (value.numel())
            else b""
        )
        entries[name] = {
            "dtype": NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    entries.update(header or {})
    text = json.dumps(entries).encode()
    path.write_bytes((len(text).to_bytes(8, "little") + text + data)[:cut])
    return str(path)


def test_every_kind_of_tensor(tmp_path):
    path = written(tmp_path / "x.safetensors", TENSORS, {"__metadata__": {"format": "pt"}})
    read = read_safetensors("DIR", path)
    assert read.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value), name


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 40]}},
        {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [999952, 1000000]}},
        {"a": {"dtype": "F32", "shape": [-3, -4], "data_offsets": [0, 48]}},
        {"a": {"dtype": "F7", "shape": [3, 4], "data_offsets": [0, 48]}},
        {"a": {"dtype": "F32", "shape": "34", "data_offsets": [0, 48]}},
        {"a": {"dtype": "F32", "shape": [3, 4]}},
        {"a": 3},
    ],
)
def test_entries_that_do_not_fit(tmp_path, header):
    path = written(tmp_path / "x.safetensors", TENSORS, header)
    with pytest.raises(OptionError, match="is no file of safetensors, or cut short"):
        read_safetensors("DIR", path)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_files_that_are_cut_short(tmp_path, cut):
    path = written(tmp_path / "x.safetensors", {"a": TENSORS["a"]}, cut=cut)
    with pytest.raises(OptionError, match="cut short"):
        read_safetensors("DIR", path)


def test_other_files(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(OptionError, match="is no file of safetensors"):
        read_safetensors("DIR", str(tmp_path / "x.safetensors"))
    with pytest.raises(OptionError, match="there is no such file"):
        read_safetensors("DIR", str(tmp_path / "gone"))
