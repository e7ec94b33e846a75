"""Splits: decided by the text and the seed alone, and never empty."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomoe_plugin.data.splits import Splitter

SHARES = {"valid": 0.05, "test": 0.1}
TEXTS = [f"document {n}" for n in range(20_000)]


def test_shares_are_about_right_and_do_not_depend_on_order():
    splits = [Splitter(1, SHARES).split_of(text) for text in TEXTS]
    assert abs(splits.count("valid") / len(TEXTS) - 0.05) < 0.01
    assert abs(splits.count("test") / len(TEXTS) - 0.1) < 0.01
    splitter = Splitter(1, SHARES)
    assert [splitter.split_of(text) for text in reversed(TEXTS)] == splits[::-1]


def test_seed_changes_the_splits():
    one, two = ([Splitter(seed, SHARES).split_of(text) for text in TEXTS[:500]] for seed in (1, 2))
    assert one != two


def test_known_value():
    """The splits of published sets must not change with the code."""
    splitter = Splitter(1, {"valid": 0.3, "test": 0.4})
    assert "".join(splitter.split_of(text)[0] for text in "abcdefghijklmnop") == "tvvttvvvtvttvtvt"


@given(
    st.sets(st.text(min_size=1), min_size=3, max_size=40),
    st.floats(0.001, 0.49),
    st.floats(0.001, 0.49),
)
def test_ranks_fill_every_split(texts, valid, test):
    splitter = Splitter(1, {"valid": valid, "test": test})
    for text in texts:
        splitter.split_of(text)
    ranked = splitter.ranked()
    splits = [ranked.split_of(text) for text in sorted(texts)]
    assert set(splits) == {"train", "valid", "test"}
    assert splits.count("valid") <= max(1, valid * len(texts))
    assert splits.count("test") <= max(1, test * len(texts))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_to_rank(count):
    splitter = Splitter(1, SHARES)
    for text in TEXTS[:count]:
        splitter.split_of(text)
    assert splitter.ranked() is None


def test_too_many_to_rank():
    splitter = Splitter(1, SHARES)
    for text in TEXTS:
        splitter.split_of(text)
    assert splitter.ranked() is None
    assert len(splitter.hashes) < len(TEXTS)
