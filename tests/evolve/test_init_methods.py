"""What each way of spawning makes of an expert, by hand and by its statistics."""

import itertools

import pytest
import torch

from evomoe_plugin.evolve import init_methods
from evomoe_plugin.evolve.init_methods import METHODS, kept_mask, seed_of
from evomoe_plugin.experts import ExpertFFN
from tests.evolve.conftest import spawn_expert

F, D = 120, 50
RATES = {"copy": 0.0, "mask": 0.3, "noise": 0.2, "reinit": 0.3}


def expert(gated=False, dtype=torch.float32):
    """The tensors of one expert, each with a mean and deviation of its own."""
    torch.manual_seed(1)
    stack = ExpertFFN(1, D, F, torch.relu, gated=gated)
    return {
        name: ((i + 1) * torch.randn(p.shape[1:]) + i / 2).to(dtype)
        for i, (name, p) in enumerate(stack.named_parameters())
    }


@pytest.mark.parametrize("shape", [(3,), (16,), (33,), (100,), (40, 3), (31, 7), (64, 100)])
def test_numbers_drawn_in_parts_are_those_of_one_call(shape, monkeypatch):
    monkeypatch.setattr(init_methods, "_PART", 64)
    parts = list(init_methods._drawn(torch.zeros(shape), torch.Generator().manual_seed(3)))
    assert len(parts) == {(100,): 2, (40, 3): 2, (64, 100): 4}.get(shape, 1)
    drawn = torch.cat([part for _, part in parts])
    assert torch.equal(drawn, torch.randn(shape, generator=torch.Generator().manual_seed(3)))


def spawn(source, method, key=5, rate=None, rescale=False):
    rate = RATES[method] if rate is None else rate
    return spawn_expert(source, method, key=key, rate=rate, rescale=rescale)


@pytest.mark.parametrize("gated", [False, True])
def test_a_copy_is_equal_and_apart(gated):
    source = expert(gated)
    copy = spawn(source, "copy")
    assert copy.keys() == source.keys()
    for name in source:
        assert torch.equal(copy[name], source[name])
        assert copy[name].data_ptr() != source[name].data_ptr()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("rescale", [False, True])
def test_masked_weights_are_zero_and_the_others_as_they_were(rate, rescale):
    source = expert()
    masked = spawn(source, "mask", rate=rate, rescale=rescale)
    for name, value in masked.items():
        kept = kept_mask(name, value.shape, "mask", key=5, rate=rate)
        if name.endswith("_bias"):
            assert torch.equal(value, source[name])
            assert kept.all()
            continue
        assert torch.equal(value == 0, ~kept)
        share = 1 - kept.float().mean().item()
        assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / value.numel()) ** 0.5)
        wanted = source[name][kept] / (1 - rate if rescale else 1)
        assert torch.equal(value[kept], wanted)


def test_the_masks_of_an_expert_are_unrelated():
    one = kept_mask("fc1_weight", (F, D), "mask", key=5, rate=0.5)
    other = kept_mask("fc2_weight", (F, D), "mask", key=5, rate=0.5)
    assert (one == other).float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_rescaled_products_have_the_mean_of_the_source():
    source = {"fc1_weight": torch.ones(F, D)}
    sums = [
        spawn(source, "mask", key=key, rescale=True)["fc1_weight"].sum(1).mean()
        for key in range(30)
    ]
    assert torch.stack(sums).mean().item() == pytest.approx(D, rel=0.01)


def test_noise_is_normal_and_of_each_tensor_s_own_deviation():
    source = expert()
    noisy = spawn(source, "noise")
    for name, value in noisy.items():
        noise = (value - source[name]) / source[name].std(correction=0)
        few = 4 / value.numel() ** 0.5
        assert noise.std().item() == pytest.approx(0.2, rel=few)
        assert noise.mean().item() == pytest.approx(0, abs=0.2 * few)
        if value.numel() > 1000:  # 68 % of a normal variable lie within one deviation
            assert (noise.abs() < 0.2).float().mean().item() == pytest.approx(0.683, abs=0.03)
        assert kept_mask(name, value.shape, "noise", key=5, rate=0.2).all()


@pytest.mark.parametrize("gated", [False, True])
def test_whole_hidden_units_are_drawn_afresh(gated):
    source = expert(gated)
    drawn = spawn(source, "reinit")
    units = {}
    for name, value in drawn.items():
        kept = kept_mask(name, value.shape, "reinit", key=5, rate=0.3)
        assert torch.equal(value == source[name], kept)
        if name == "fc2_bias":
            assert kept.all()
            continue
        rows = kept if kept.dim() == 1 else kept[:, 0]
        assert torch.equal(kept, rows.view(-1, *[1] * (kept.dim() - 1)).expand(kept.shape))
        units[name] = rows.tolist()
        assert sum(~rows) == 36
        if kept.dim() == 2:  # 1800 numbers
            mean, deviation = source[name].mean(), source[name].std()
            assert value[~rows].mean().item() == pytest.approx(
                mean.item(), abs=4 * deviation.item() / 1800**0.5
            )
            assert value[~rows].std().item() == pytest.approx(deviation.item(), rel=0.07)
    assert len({tuple(rows) for rows in units.values()}) == 1


@pytest.mark.parametrize("rate, count", [(0.001, 1), (0.5, 60), (1.0, 120)])
def test_the_number_of_units_is_exact_and_at_least_one(rate, count):
    kept = kept_mask("fc1_bias", (F,), "reinit", key=5, rate=rate)
    assert int((~kept).sum()) == count


@pytest.mark.parametrize("method", METHODS)
def test_experts_differ_pairwise_and_each_is_always_the_same(method):
    source = expert()
    before = {name: value.clone() for name, value in source.items()}
    keys = [seed_of(1, layer, e) for layer in range(2) for e in range(4)]
    assert len(set(keys)) == len(keys)
    experts = [spawn(source, method, key=key) for key in keys]
    for one, other in itertools.combinations(experts, 2):
        same = torch.equal(one["fc1_weight"], other["fc1_weight"])
        assert same == (method == "copy")
    torch.manual_seed(99)  # torch's own generator is no part of it
    for key, value in zip(keys, experts, strict=True):
        again = spawn(dict(reversed(source.items())), method, key=key)
        assert all(torch.equal(again[name], value[name]) for name in source)
    assert all(torch.equal(source[name], before[name]) for name in source)


def test_random_numbers_are_these():
    """Runs that were begun with an older version must spawn the same experts."""
    kept = kept_mask("fc1_weight", (2, 8), "mask", key=seed_of(1, 2, 3), rate=0.5)
    assert kept.int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("method", METHODS)
def test_torch_s_generator_is_not_touched(method):
    source = expert()
    before = torch.get_rng_state()
    spawn(source, method)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precision_is_kept(method, dtype):
    source = expert(dtype=dtype)
    for name, value in spawn(source, method).items():
        assert value.dtype == dtype
        single = spawn({name: source[name].float()}, method)[name]
        assert torch.allclose(value.float(), single, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "method, rate, rescale, message",
    [
        ("slice", 0.3, False, "method slice: one of: copy, mask, noise, reinit"),
        ("mask", 1.0, False, "rate 1.0"),
        ("mask", -0.1, False, "rate -0.1"),
        ("mask", float("nan"), False, "rate nan"),
        ("reinit", 1.1, False, "rate 1.1"),
        ("noise", float("inf"), False, "rate inf"),
        ("reinit", 0.3, True, "rescale: the method reinit masks nothing"),
    ],
)
def test_what_cannot_be_is_refused(method, rate, rescale, message):
    with pytest.raises(ValueError, match=message):
        spawn(expert(), method, rate=rate, rescale=rescale)


def test_tensors_of_something_else_are_refused():
    with pytest.raises(KeyError, match="no tensor of an expert: centroid"):
        spawn({"centroid": torch.ones(3)}, "noise")
