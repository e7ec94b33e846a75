import pytest
import torch
from scipy import stats

from evomoe_plugin.routing.noise import fold, gumbel, mix, sequence_keys, uniform


def splitmix64_finalizer(x: int) -> int:
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("x", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_mix_is_splitmix64(x):
    assert mix(torch.tensor([x])).item() % 2**64 == splitmix64_finalizer(x)


def keys(tokens=4000):
    return sequence_keys(torch.randint(0, 1000, (tokens // 100, 100))).reshape(-1)


def test_uniform_and_gumbel_have_their_distributions():
    u, g = uniform(keys(), 16), gumbel(keys(), 16)
    assert 0 < u.min() and u.max() < 1
    assert torch.isfinite(g).all()
    assert stats.kstest(u.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(g.flatten().numpy(), "gumbel_r").pvalue > 1e-3


def test_extreme_bits_stay_inside_the_open_interval():
    bits = torch.tensor([0, 2**23 - 1], dtype=torch.int64)
    u = (bits.float() + 0.5) * 2.0**-23
    assert 0 < u[0] and u[1] < 1


@pytest.mark.parametrize("part", [0, 1, 10**12, -5])
def test_fold_takes_integers_and_tensors_alike(part):
    key = keys()
    assert torch.equal(fold(key, part), fold(key, torch.tensor(part)))


def test_every_part_of_the_key_changes_the_noise():
    key = keys()
    plain = uniform(fold(fold(key, 1), 2), 8)
    for other in (fold(fold(key, 2), 1), fold(fold(key, 1), 3), fold(key, 1)):
        correlation = torch.corrcoef(torch.stack([plain.flatten(), uniform(other, 8).flatten()]))
        assert abs(correlation[0, 1]) < 0.03


def test_noise_of_a_sequence_is_its_own_whatever_stands_beside_it():
    tokens = torch.randint(0, 50, (6, 9))
    whole = sequence_keys(tokens)
    assert torch.equal(whole[2:5], sequence_keys(tokens[2:5]))
    assert torch.equal(whole.flip(0), sequence_keys(tokens.flip(0)))
    assert whole.unique().numel() == whole.numel()


def test_padding_does_not_count():
    tokens = torch.randint(2, 50, (3, 9))
    padded = torch.nn.functional.pad(tokens, (0, 4), value=1)
    got = sequence_keys(padded, padded.ne(1))[:, :9]
    assert torch.equal(got, sequence_keys(tokens))


def test_torchs_generator_is_left_alone():
    key = keys()
    before = torch.get_rng_state()
    gumbel(key, 4)
    assert torch.equal(before, torch.get_rng_state())
