"""Truncation by hand; what a tokenizer and a dictionary must have to do with each other."""

import numpy as np
import pytest

from evomoe_plugin.data.sft_examples import Example, truncate


def example(responses):
    """Tokens 10, 11, … with these response numbers."""
    tokens = np.arange(10, 10 + len(responses), dtype=np.int32)
    return Example(tokens, np.array(responses, dtype=np.int32), start=7)


CASES = {
    # responses of the example, limit, (tokens, responses) that are left
    "fits": ([0, 0, 1, 1], 4, ([10, 11, 12, 13], [0, 0, 1, 1])),
    "prompt from the left": ([0, 0, 0, 1, 1], 3, ([12, 13, 14], [0, 1, 1])),
    "then response from the right": ([0, 0, 1, 1, 1], 3, ([11, 12, 13], [0, 1, 1])),
    "without a prompt": ([1, 1, 1], 2, ([10, 11], [1, 1])),
    "one token of the response": ([0, 0, 0, 1, 1], 2, ([12, 13], [0, 1])),
    "nothing of the response": ([0, 1, 1], 1, None),
    "no earlier response is lost": ([0, 0, 1, 1, 0, 2], 5, ([11, 12, 13, 14, 15], [0, 1, 1, 0, 2])),
    "half of an earlier response": ([0, 1, 1, 0, 2, 2], 4, ([12, 13, 14, 15], [0, 0, 2, 2])),
    "the whole of an earlier response": ([0, 1, 1, 0, 2, 2], 3, ([13, 14, 15], [0, 2, 2])),
    "the beginning of a middle response": ([1, 0, 2, 2, 0, 3], 3, ([13, 14, 15], [0, 0, 3])),
    "a response right before the last": ([1, 1, 2, 2], 3, ([11, 12, 13], [0, 2, 2])),
}


@pytest.mark.parametrize("responses, limit, wanted", CASES.values(), ids=CASES)
def test_truncation_by_hand(responses, limit, wanted):
    left = truncate(example(responses), limit)
    if wanted is None:
        assert left is None
    else:
        assert (left.tokens.tolist(), left.responses.tolist()) == wanted
        assert left.start == 7


def test_truncation_does_not_change_what_it_was_given():
    whole = example([0, 1, 1, 0, 2, 2])
    truncate(whole, 4)
    assert whole.responses.tolist() == [0, 1, 1, 0, 2, 2]
