"""JSON values from blocks of text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomoe_plugin.data import rows
from evomoe_plugin.data.rows import BadRow, json_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def blocks(text, size):
    return [text[i : i + size] for i in range(0, len(text), size)]


@given(
    values=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=4),
    size=st.integers(1, 50),
    indent=st.sampled_from([None, 1]),
)
def test_arrays_and_sequences(values, size, indent):
    array = json.dumps(values, indent=indent)
    assert list(json_values(blocks(f" {array}\n", size))) == values
    sequence = "\n".join(json.dumps(value, indent=indent) for value in values)
    assert list(json_values(blocks(sequence, size))) == values


BAD = {
    "[": "the array has no end",
    "[{}": "the array has no end",
    "[{},": "the array has no end",
    "[{},]": "Expecting value",
    "[{} {}]": "'{' where , or ] must be",
    "[{}] x": "text follows the array",
    "[] []x": "Expecting value",
    "{": "Expecting property name enclosed in double quotes",
    "{} x": "Expecting value",
}


@pytest.mark.parametrize("size", [1, 100])
@pytest.mark.parametrize("text", BAD)
def test_what_is_no_json(text, size):
    with pytest.raises(BadRow, match="is not JSON: ") as error:
        list(json_values(blocks(text, size)))
    assert BAD[text] in str(error.value)


def test_what_is_read_for_a_damaged_value_is_bounded(monkeypatch):
    monkeypatch.setattr(rows, "MAX_ROW_CHARS", 1000)
    read = []

    def text():
        yield '{"a": x '
        for _ in range(10_000):
            read.append(1)
            yield " " * 100

    with pytest.raises(BadRow, match="is not JSON: Expecting value"):
        list(json_values(text()))
    assert len(read) < 100
