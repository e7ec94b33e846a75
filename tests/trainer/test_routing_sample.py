"""The sample of validation tokens, against loops over all tokens in the order of the data."""

from __future__ import annotations

import random

import pytest
import torch
import torch.distributed as dist
from fairseq.data import data_utils
from fairseq.logging import metrics

from evomoe_plugin.routing import stats as st
from evomoe_plugin.routing.stability import NO_EXPERT
from evomoe_plugin.trainer.routing_sample import RoutingSample
from tests.dispatch.test_expert_parallel import on_ranks
from tests.routing.loops import purity_by_loops

PAD, L, E = 1, 2, 3
SIZE = 40  # ends within the fourth row


class Rows:
    """A data set of rows of different lengths, 90 tokens in all, of which many are alike."""

    def __init__(self):
        dice = random.Random(0)
        self.rows = [[dice.randrange(4, 24) for _ in range(n)] for n in (9, 14, 3, 20, 12, 7, 25)]

    def __len__(self):
        return len(self.rows)

    def num_tokens(self, index):
        return len(self.rows[index])


ROWS = Rows()
IDS = sum(ROWS.rows, [])
# Of each token in the order of the data, at three validations.
_dice = torch.Generator().manual_seed(1)
FIRST = torch.randint(NO_EXPERT, E, (3, L, len(IDS)), generator=_dice)
WEIGHT = torch.rand(3, L, len(IDS), generator=_dice)


def batch(indices):
    """Rows of the data set, padded as fairseq does, and where their tokens are in the data."""
    source = [torch.tensor(ROWS.rows[i]) for i in indices]
    tokens = data_utils.collate_tokens(source, PAD)
    place = torch.zeros_like(tokens)
    for b, i in enumerate(indices):
        start = sum(map(len, ROWS.rows[:i]))
        place[b, : len(source[b])] = start + torch.arange(len(source[b]))
    return {"id": torch.tensor(indices), "net_input": {"src_tokens": tokens}}, place


def add(sample, number, indices):
    """The routing of a batch at a validation, if any of it is in the sample."""
    given, place = batch(indices)
    tokens = sample.tokens_of(given)
    if tokens is not None:
        routing = {
            st.FIRST_EXPERT_T: FIRST[number][:, place],
            st.COMBINE_WEIGHT_T: WEIGHT[number][:, place],
        }
        sample.add(tokens, routing)


def validate(sample, number, batches, group=None):
    """What is logged in a validation of `batches`, an empty one being of a rank that has fewer."""
    sample.begin(L, len(batches), torch.device("cpu"))
    with metrics.aggregate(new_root=True) as logged:
        for indices in batches:
            if indices:
                add(sample, number, indices)
            assert not logged.get_smoothed_values()
            sample.finish_step(group)
    return logged.get_smoothed_values()


def by_loops(number, size):
    """The same from the definitions."""
    layers = {"combine_weight": [], "purity": [], "stability": []}
    for n in range(L):
        first = FIRST[number, n, :size].tolist()
        layers["combine_weight"].append(sum(WEIGHT[number, n, :size].tolist()) / size)
        layers["purity"].append(purity_by_loops(IDS[:size], first))
        if number:
            before = FIRST[number - 1, n, :size].tolist()
            kept = sum(a == b for a, b in zip(first, before, strict=True))
            layers["stability"].append(kept / size)
    wanted = {}
    for name, values in layers.items():
        wanted |= {f"{name}_{n}": value for n, value in enumerate(values)}
        if values:
            wanted[name] = sum(values) / L
    return wanted


BATCHES = {
    "one by one": [[i] for i in range(7)],
    "some": [[5, 2, 0], [4, 6, 1], [3]],
    "all": [[6, 5, 4, 3, 2, 1, 0]],
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES)
def test_it_equals_the_loops_for_any_batches(batches):
    sample = RoutingSample(ROWS, SIZE, PAD)
    for number in range(3):
        logged = validate(sample, number, batches)
        assert logged == pytest.approx(by_loops(number, SIZE), abs=6e-5)


def test_a_smaller_data_set_is_the_sample():
    sample = RoutingSample(ROWS, 4096, PAD)
    for number in range(2):
        logged = validate(sample, number, BATCHES["some"])
        assert logged == pytest.approx(by_loops(number, len(IDS)), abs=6e-5)


class Pairs(Rows):
    """Whose source sides are the first of those rows, and target sides the last, in pairs."""

    def __len__(self):
        return 3

    def size(self, index):
        return len(self.rows[index]), len(self.rows[index + 4])

    def num_tokens(self, index):
        return max(self.size(index))


def test_each_side_of_pairs_has_its_own_tokens():
    """Sources padded on the left, as fairseq does."""
    sides = {"encoder_": ("src_tokens", 0), "decoder_": ("prev_output_tokens", 4)}
    batches = [[2, 0], [1]]
    for stack, (name, first_row) in sides.items():
        sample, logged = RoutingSample(Pairs(), 20, PAD, stack), {}
        rows = ROWS.rows[first_row : first_row + 3]
        ids = sum(rows, [])[:20]
        start = sum(map(len, ROWS.rows[:first_row]))
        for number in range(2):
            sample.begin(L, len(batches), torch.device("cpu"))
            with metrics.aggregate(new_root=True) as meters:
                for indices in batches:
                    given = {"id": torch.tensor(indices), "net_input": {}}
                    for other, row in sides.values():
                        tokens = [torch.tensor(ROWS.rows[row + i]) for i in indices]
                        left = other == "src_tokens"
                        given["net_input"][other] = data_utils.collate_tokens(
                            tokens, PAD, left_pad=left
                        )
                    places = [
                        torch.arange(len(rows[i])) + start + sum(map(len, rows[:i]))
                        for i in indices
                    ]
                    place = data_utils.collate_tokens(places, 0, left_pad=name == "src_tokens")
                    routing = {
                        stack + st.FIRST_EXPERT_T: FIRST[number][:, place],
                        stack + st.COMBINE_WEIGHT_T: WEIGHT[number][:, place],
                    }
                    found = sample.tokens_of(given)
                    if found is not None:
                        sample.add(found, routing)
                    sample.finish_step(None)
            logged = meters.get_smoothed_values()
        first = FIRST[:, :, start : start + 20].tolist()
        for n in range(L):
            kept = sum(a == b for a, b in zip(first[0][n], first[1][n], strict=True))
            wanted = {
                f"{stack}stability_{n}": kept / 20,
                f"{stack}purity_{n}": purity_by_loops(ids, first[1][n]),
                f"{stack}combine_weight_{n}": WEIGHT[1, n, start : start + 20].mean().item(),
            }
            assert {key: logged[key] for key in wanted} == pytest.approx(wanted, abs=6e-5)


def test_batches_without_a_token_of_it_are_not_asked():
    sample = RoutingSample(ROWS, SIZE, PAD)
    assert [sample.tokens_of(batch([i])[0]) is None for i in range(7)] == [False] * 4 + [True] * 3


def test_a_validation_that_was_broken_off_leaves_no_trace():
    sample = RoutingSample(ROWS, SIZE, PAD)
    validate(sample, 0, BATCHES["some"])
    sample.begin(L, 3, torch.device("cpu"))
    add(sample, 2, [0, 1])
    sample.finish_step(None)
    logged = validate(sample, 1, BATCHES["some"])
    assert logged == pytest.approx(by_loops(1, SIZE), abs=6e-5)


def check_two_ranks(rank):
    """The second rank has a batch less, in whose place a trainer repeats one without asking."""
    sample = RoutingSample(ROWS, SIZE, PAD)
    shares = [[[5, 2], [4, 1], [3]], [[6], [0], []]]
    for number in range(3):
        logged = validate(sample, number, shares[rank], dist.group.WORLD)
        assert logged == pytest.approx(by_loops(number, SIZE), abs=6e-5)


@pytest.mark.distributed
def test_two_ranks_log_what_one_does():
    on_ranks(2, check_two_ranks)
