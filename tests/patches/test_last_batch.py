import numpy as np
import pytest
from fairseq.data import data_utils
from hypothesis import given
from hypothesis import strategies as st

import evomoe_plugin  # noqa: F401


@pytest.mark.parametrize("as_list", [True, False])
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.sampled_from([None, 1, 3, 4, 16]),
    st.sampled_from([None, 40, 100]),
    st.sampled_from([1, 8]),
)
def test_no_index_is_left_out_and_the_limits_hold(as_list, sizes, sentences, tokens, multiple):
    sizes = np.array(sizes)
    indices = np.argsort(sizes, kind="stable")
    batches = data_utils.batch_by_size(
        indices.tolist() if as_list else indices,
        num_tokens_fn=None,
        num_tokens_vec=sizes[indices],
        max_tokens=tokens,
        max_sentences=sentences,
        required_batch_size_multiple=multiple,
    )
    assert np.concatenate(batches).tolist() == indices.tolist()
    for batch in batches:
        assert len(batch) <= (sentences or len(sizes))
        assert len(batch) * sizes[batch].max() <= (tokens or 10**9)
