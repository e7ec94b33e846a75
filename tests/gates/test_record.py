import pytest
import torch

from evomoe_plugin.gates.record import RoutingRecord

D, E = 3, 2
X = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, float("nan")]])
MASK = torch.tensor([[True, False], [False, False], [True, True], [False, False]])
REAL = torch.tensor([True, True, True, False])


def test_sums_by_hand():
    record = RoutingRecord(E, D, interval=2, window=2)
    for update in (1, 2):
        record.add(record.measure(X, MASK, REAL, 0), update)
    assert record.routed_E.tolist() == [4, 2]
    assert record.unrouted == 2
    assert record.unrouted_sum_D.tolist() == [8, 10, 12]


def test_the_last_updates_of_each_interval_are_recorded():
    record = RoutingRecord(E, D, interval=5, window=2)
    # The 4th, 5th, 9th and 10th update are those after 3, 4, 8 and 9 completed ones.
    assert [n for n in range(11) if record.is_recording(n)] == [3, 4, 8, 9]
    assert [n for n in range(1, 11) if record.is_complete(n)] == [5, 10]
    idle = record.measure(X, MASK, REAL, 2)
    assert [len(value) for value in idle.values()] == [E, 1, D]
    assert not any(value.any() for value in idle.values())


def test_without_an_interval_nothing_is_recorded_but_between_begin_and_end():
    record = RoutingRecord(E, D, interval=0, window=0)
    assert not record.is_wanted
    assert not record.measure(X, MASK, REAL, 0)
    with pytest.raises(RuntimeError, match="begin_record_routing"):
        record.end()
    record.begin()
    first = record.measure(X, MASK, REAL, 7)
    assert not record.is_complete(8)
    record.end()
    second = record.measure(X, MASK, REAL, 7)  # a later micro-batch of the same update
    record.add({name: first[name] + second[name] for name in first}, 8)
    assert record.routed_E.tolist() == [2, 1]
    assert record.is_complete(8)
    record.clear()
    assert not record.is_wanted
    assert not record.routed_E.any()


def test_beginning_again_forgets():
    record = RoutingRecord(E, D, interval=0, window=0)
    record.begin()
    record.add(record.measure(X, MASK, REAL, 0), 1)
    record.begin()
    assert not record.routed_E.any()
    assert not record.unrouted_sum_D.any()


def test_half_precision_and_a_checkpoint_lose_nothing():
    record = RoutingRecord(E, D, interval=0, window=0)
    record.begin()
    third = torch.tensor([[1 / 3, 1e5, -1e-9]], dtype=torch.float64)
    record.add(record.measure(third, torch.zeros(1, E, dtype=torch.bool), None, 0), 1)
    other = RoutingRecord(E, D, interval=0, window=0).half()
    other.load_state_dict(record.half().state_dict())
    assert torch.equal(other.unrouted_sum_D, third[0])
    assert other.is_recording(0)


def test_a_window_begins_empty_in_a_run_that_is_begun_anew():
    """Weights may come with the half-full record of the run they are from."""
    record = RoutingRecord(E, D, interval=5, window=2)
    record.add(record.measure(X, MASK, REAL, 3), 4)
    assert record.routed_E.any()
    anew = RoutingRecord(E, D, interval=5, window=2)
    anew.load_state_dict(record.state_dict())
    anew.add(anew.measure(X, MASK, REAL, 3), 4)
    assert anew.routed_E.tolist() == [2, 1]
    anew.add(anew.measure(X, MASK, REAL, 4), 5)
    assert anew.routed_E.tolist() == [4, 2]
