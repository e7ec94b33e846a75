"""The auction against scipy's solver on the matrix with a column for every place at an expert."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from evomoe_plugin.routing import assignment
from evomoe_plugin.routing.assignment import EPSILON, balanced_assignment


def best_total(scores_TE):
    """Every expert has floor(T / E) columns that must be taken and one more that may be: for each
    expert that keeps it empty there is a row that scores 0 there and can go nowhere else."""
    scores = scores_TE.double().numpy()
    T, E = scores.shape
    floor, odd = divmod(T, E)
    matrix = np.repeat(scores, floor, axis=1)
    if odd:
        matrix = np.concatenate([matrix, scores], axis=1)
        nowhere = -1e4 * max(np.abs(scores).max(), 1)
        empty = np.full((E - odd, matrix.shape[1]), nowhere)
        empty[:, E * floor :] = 0
        matrix = np.concatenate([matrix, empty])
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    return matrix[rows, columns][:T].sum()


def check_counts(expert_T, T, E):
    counts = torch.bincount(expert_T, minlength=E)
    assert expert_T.shape == (T,)
    assert counts.numel() == E
    assert sorted(counts.tolist()) == sorted((T + n) // E for n in range(E))


def check(scores_TE):
    T, E = scores_TE.shape
    expert_T = balanced_assignment(scores_TE)
    check_counts(expert_T, T, E)
    total = scores_TE.double()[torch.arange(T), expert_T].sum().item()
    spread = (scores_TE.amax(1) - scores_TE.amin(1)).max().item()
    missing = best_total(scores_TE) - total
    assert missing <= EPSILON * (T + E) * spread + 1e-9 * abs(total)
    return expert_T


SCORES = {
    "normal": torch.randn,
    "ties": lambda T, E: torch.randint(0, 3, (T, E)).float(),
    "equal": torch.ones,
    "equal rows": lambda T, E: torch.randn(T, 1).expand(T, E),
    "few kinds of token": lambda T, E: torch.randn(T, E)[torch.randint(0, max(T // 9, 1), (T,))],
    "one favourite": lambda T, E: torch.randn(T, E) * 0.1 + 5 * torch.randn(E),
    "heavy tails": lambda T, E: torch.randn(T, E) ** 5,
    "low rank": lambda T, E: torch.randn(T, 3) @ torch.randn(3, E),
    "huge": lambda T, E: torch.randn(T, E) * 1e30,
    "tiny": lambda T, E: torch.randn(T, E) * 1e-20,
    "far from 0": lambda T, E: torch.randn(T, E).double() + 1e5,
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
    "T, E",
    [
        (1, 2),
        (1, 7),
        (2, 2),
        (3, 8),
        (7, 8),
        (8, 8),
        (9, 8),
        (16, 2),
        (40, 5),
        (64, 4),
        (67, 4),
        (101, 33),
        (301, 7),
    ],
)
def test_counts_are_exact_and_the_total_is_the_best(kind, T, E):
    check(SCORES[kind](T, E))


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    generator = torch.Generator().manual_seed(seed)
    T, E = (int(torch.randint(1, most, (), generator=generator)) for most in (120, 12))
    kind = list(SCORES)[seed % len(SCORES)]
    torch.manual_seed(seed)
    check(SCORES[kind](T, E))


def test_by_hand():
    scores = torch.tensor([[5.0, 4.0], [9.0, 1.0], [8.0, 2.0], [7.0, 6.0]])
    # The two that lose least, 1 and 1, go to expert 1; 7 - 6 and 5 - 4.
    assert balanced_assignment(scores).tolist() == [1, 0, 0, 1]
    # Three tokens: the odd place goes where it gains most.
    assert balanced_assignment(scores[:3]).tolist() == [1, 0, 0]


def test_one_expert_and_no_token():
    assert balanced_assignment(torch.randn(3, 1)).tolist() == [0, 0, 0]
    assert balanced_assignment(torch.randn(0, 4)).shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_numbers_that_are_none_leave_the_counts_exact(bad):
    scores = torch.randn(50, 4)
    scores[7] = bad
    scores[9, 2] = bad
    check_counts(balanced_assignment(scores), 50, 4)
    check_counts(balanced_assignment(torch.full((50, 4), bad)), 50, 4)


def test_the_same_answer_again_and_no_gradient():
    scores = torch.randn(200, 8, requires_grad=True)
    first = balanced_assignment(scores)
    assert torch.equal(first, balanced_assignment(scores.detach().clone()))
    assert not first.requires_grad


@pytest.mark.parametrize("rounds, exchanges", [(1, 0), (0, 0), (0, 200), (3, 1)])
def test_it_ends_with_exact_counts_however_few_rounds_there_are(monkeypatch, rounds, exchanges):
    monkeypatch.setattr(assignment, "_ROUNDS", rounds)
    monkeypatch.setattr(assignment, "_EXCHANGES", exchanges)
    for T, E in ((63, 5), (3, 9), (100, 10)):
        check_counts(balanced_assignment(torch.randn(T, E)), T, E)


def test_exchanges_alone_find_the_best():
    """Their end is what the stated tolerance rests on, not the auction before them."""
    scores = torch.randn(60, 5)
    start = torch.arange(60) % 5
    values = scores.double() - scores.double().amax(1, keepdim=True)
    expert_T = assignment._exchange(values / -values.min(), start)
    assert scores[torch.arange(60), expert_T].sum().item() == pytest.approx(
        best_total(scores), rel=1e-5
    )


def test_memory_stays_at_tokens_by_experts():
    T, E = 600, 4
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for result in out if isinstance(out, tuple | list) else [out]:
                if isinstance(result, torch.Tensor):
                    largest = max(largest, result.numel())
            return out

    with Watch():
        balanced_assignment(torch.randn(T, E))
    assert T <= largest <= T * E
