import math

import pytest
import torch

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.choice import Choice


def layer_stats(mask_TE, probs_TE, token_mask_T=None):
    if token_mask_T is not None:
        mask_TE = mask_TE & token_mask_T.unsqueeze(1)
    choice = Choice(mask_TE, probs_TE, probs_TE, probs_TE.log())
    return st.routing_stats(choice, token_mask_T, mask_TE.size(1))


def test_summary_by_hand():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    probs = torch.full((3, 4), 0.25)
    summed = {k: v.unsqueeze(0) for k, v in layer_stats(mask, probs).items()}
    numbers = st.summarize(summed)
    assert numbers["experts_per_token"] == pytest.approx(4 / 3)
    assert numbers["dead_experts"] == 0.5
    assert numbers["load_max"] == 3  # loads 3, 1, 0, 0: mean 1
    assert numbers["gate_entropy"] == pytest.approx(math.log(4))
    assert "temperature" not in numbers


def test_sums_over_parts_equal_the_whole():
    mask, probs = torch.rand(20, 5) < 0.4, torch.rand(20, 5).softmax(1)
    real = torch.rand(20) < 0.8
    whole = layer_stats(mask, probs, real)
    halves = [layer_stats(mask[i], probs[i], real[i]) for i in (slice(0, 7), slice(7, 20))]
    for name, value in whole.items():
        assert torch.allclose(value, halves[0][name] + halves[1][name]), name


def test_what_travels_between_processes():
    """Two layers, of 4 and of 2 experts, divided over 2 processes."""
    nan, two = float("nan"), torch.tensor([2.0, 2.0]).double()
    stats = {
        st.TOKENS: 4 * two,
        st.PAIRS: torch.tensor([10.0, 8.0]),
        st.EXPERTS: torch.tensor([32.0, 16.0]),
        st.ENTROPY: two,
        st.LOAD_E: torch.tensor([[1.0, 4, 5, 0], [2, 6, nan, nan]]),
        st.SENT_R: torch.tensor([[4.0, 0], [1, 3]]),
        st.RECEIVED_R: torch.tensor([[0.0, 4], [3, 1]]),
    }
    numbers = st.summarize(stats)
    assert numbers["ep_sent"] == 0.5  # 4 of 8 tokens' pairs in each layer
    assert numbers["ep_sent_max"] == pytest.approx((2 + 1.5) / 2)
    assert numbers["ep_received_max"] == pytest.approx((2 + 1.5) / 2)
    assert numbers["ep_load_max"] == pytest.approx((1 + 6 / 4) / 2)  # loads 5, 5 and 2, 6


def test_layers_with_fewer_experts_do_not_count_as_dead():
    nan = float("nan")
    stats = {
        st.TOKENS: torch.tensor([4.0, 4.0]),
        st.PAIRS: torch.tensor([4.0, 8.0]),
        st.LOAD_E: torch.tensor([[4.0, 0.0, nan, nan], [2.0, 2.0, 2.0, 2.0]]),
        st.EXPERTS: torch.tensor([8.0, 16.0]),
        st.ENTROPY: torch.zeros(2),
        st.NONFINITE: torch.zeros(2),
    }
    numbers = st.summarize(stats)
    assert numbers["dead_experts"] == pytest.approx(1 / 6)
    assert numbers["load_max"] == pytest.approx((2 + 1) / 2)


def test_nonfinite_logits_are_counted_once_a_token_and_not_in_padding():
    logits = torch.zeros(4, 3)
    logits[1] = float("nan")
    logits[2, 0] = float("inf")
    logits[3, 0] = float("nan")
    mask = torch.tensor([True, True, True, False])
    probs = torch.full((4, 3), 1 / 3)
    stats = st.routing_stats(Choice(probs > 1, probs, probs, logits), mask, 3)
    assert stats[st.NONFINITE].item() == 2


def test_null_picks_are_no_pairs_and_no_load():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    probs = torch.full((2, 3), 1 / 3)
    stats = st.routing_stats(Choice(mask, probs, probs), None, num_experts=2)
    assert stats[st.PAIRS] == 1
    assert stats[st.LOAD_E].tolist() == [1, 0]
    assert stats[st.NULL_PAIRS] == 2
    assert stats[st.REQUESTED_C].tolist() == [1, 0, 2]
    stats[st.NULL_MASS] = torch.tensor(0.5)  # over both tokens
    summary = st.summarize({name: value.unsqueeze(0) for name, value in stats.items()})
    assert summary["null_rate"] == 1
    assert summary["null_mass"] == 0.25
    assert summary["dead_experts"] == 0.5


def test_overflow_is_told_for_each_layer():
    mask, probs = torch.ones(4, 2, dtype=torch.bool), torch.full((4, 2), 0.5)
    one = layer_stats(mask, probs)
    stats = {name: torch.stack([value, value]) for name, value in one.items()}
    stats[st.DROPPED] = torch.tensor([8.0, 0.0])  # of 16 asked for, and of 8
    summary = st.summarize(stats)
    assert (summary["overflow_0"], summary["overflow_1"]) == (0.5, 0)
    assert summary["overflow"] == 0.25


def test_layers_that_layer_drop_left_out_say_nothing():
    mask, probs = torch.eye(4, dtype=torch.bool), torch.full((4, 4), 0.25)
    one = layer_stats(mask, probs)
    stats = {name: torch.stack([value, torch.zeros_like(value)]) for name, value in one.items()}
    stats[st.DROPPED] = torch.zeros(2)
    numbers = st.summarize(stats)
    assert numbers["experts_per_token"] == 1
    assert numbers["load_max"] == 1
    assert numbers["dead_experts"] == 0
    assert "active_experts" not in numbers
    assert "overflow_1" not in numbers


def test_squared_variation_of_the_load():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    probs = torch.full((3, 4), 0.25)
    numbers = st.summarize({k: v.unsqueeze(0) for k, v in layer_stats(mask, probs).items()})
    assert numbers["load_cv2"] == pytest.approx((2**2 + 0 + 1 + 1) / 4)  # loads 3, 1, 0, 0


def test_entropy_is_that_of_torch_where_experts_have_no_chance():
    logits_TC = torch.randn(9, 6)
    logits_TC[2, 1:] = logits_TC[5, :4] = float("-inf")
    probs_TC = torch.softmax(logits_TC, 1)
    choice = Choice(mask_TC=probs_TC > 0.2, weights_TC=probs_TC, probs_TC=probs_TC)
    stats = st.routing_stats(choice, None, 6)
    wanted = torch.special.entr(probs_TC.double()).sum()
    torch.testing.assert_close(stats[st.ENTROPY], wanted, rtol=1e-6, atol=0)
    assert stats[st.NONFINITE] == 0
