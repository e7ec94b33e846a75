import pytest
import torch

from evomoe_plugin.config.checks import validate
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates.context import GateContext, LayerInfo
from evomoe_plugin.gates.hash import HASHES, HashGate, balanced_table, clustered_table, random_table

D, E, V = 8, 4, 50
ZIPF = tuple(10_000 // (rank + 1) for rank in range(V))


@pytest.fixture
def make_gate(moe_options):
    def make(counts=ZIPF, experts=E, layer_id=0, seed=1, **given):
        info = LayerInfo(D, experts, layer_id=layer_id, seed=seed, token_counts_V=counts)
        return HashGate(info, moe_options(moe_gate="hash", **given))

    return make


def masses(table, counts, experts=E):
    return torch.zeros(experts).index_add(0, table, torch.tensor(counts).float())


@pytest.mark.parametrize("kind", HASHES)
def test_a_symbol_goes_to_its_expert_with_weight_1_wherever_it_stands(make_gate, kind):
    gate = make_gate(moe_hash=kind)
    ids = torch.randint(0, V, (30,))
    for x in (torch.randn(30, D), torch.full((30, D), 1e30), torch.zeros(30, D)):
        for training in (True, False):
            plan = gate.train(training)(x, GateContext(token_ids_T=ids))
            assert plan.expert_ids_N[plan.token_ids_N.argsort()].tolist() == [
                gate.table_V[token_id] for token_id in ids.tolist()
            ]
            assert plan.weights_N.tolist() == [1.0] * 30
            assert not plan.aux


def test_balanced_by_hand():
    # 9 -> 0; 5 -> 1; 4 -> 1 (5 < 9); 3 -> 0 (9 = 9, and one id against two); 2 -> 1; 1 -> 1
    assert balanced_table([1, 9, 5, 4, 3, 2], 2).tolist() == [1, 0, 1, 1, 0, 1]


def test_clustered_by_hand():
    # By falling frequency 9 5 4 3 2 1, 24 in all: 9 | 5 4 3 2 1 is 3 off, 9 5 | 4 3 2 1 is 2 off.
    assert clustered_table([1, 9, 5, 4, 3, 2], 2).tolist() == [1, 0, 0, 1, 1, 1]


def test_balanced_balances_what_can_be(make_gate):
    counts = [100 + token_id % 7 for token_id in range(400)]
    load = masses(balanced_table(counts, E), counts)
    assert load.max() / load.mean() < 1.001
    load = masses(balanced_table(ZIPF, E), ZIPF)
    assert load.max() / load.mean() < 1.01


@pytest.mark.parametrize("counts", [ZIPF, tuple(reversed(ZIPF)), (3,) * V], ids=str)
def test_clustered_runs_are_of_neighbours_in_frequency(counts):
    table = clustered_table(counts, E)
    order = sorted(range(V), key=lambda token_id: -counts[token_id])
    experts = [int(table[token_id]) for token_id in order]
    assert experts == sorted(experts)
    assert set(experts) == set(range(E))
    load = masses(table, counts)
    assert load.max() / load.mean() < 1.4


def test_every_expert_has_a_symbol_even_if_one_symbol_is_most_of_the_text():
    counts = [10**6, 1, 1, 1]
    assert sorted(clustered_table(counts, 4).tolist()) == [0, 1, 2, 3]
    assert sorted(balanced_table(counts, 4).tolist()) == [0, 1, 2, 3]
    assert clustered_table([5, 5], 4).tolist() == [0, 1]


@pytest.mark.parametrize("counts", [(0,) * V, (1,) * V, (7,) * V], ids=["zero", "one", "equal"])
@pytest.mark.parametrize("make_table", [balanced_table, clustered_table])
def test_equal_counts_spread_the_symbols(counts, make_table):
    sizes = make_table(counts, E).bincount(minlength=E)
    assert sizes.sum() == V
    assert sizes.max() - sizes.min() <= 1


def test_symbols_that_never_occur_are_spread_too():
    counts = [50, 50, 50, 50] + [0] * 40
    assert balanced_table(counts, 4).bincount().tolist() == [11] * 4


def test_random_depends_on_seed_and_layer_alone_and_is_even():
    table = random_table(20_000, 8, layer_id=0, seed=1)
    assert torch.equal(table, random_table(20_000, 8, layer_id=0, seed=1))
    for layer_id, seed in ((1, 1), (0, 2)):
        other = random_table(20_000, 8, layer_id=layer_id, seed=seed)
        assert 0.1 < (table == other).float().mean() < 0.15
    counts = table.bincount(minlength=8)
    assert counts.min() > 2300
    assert counts.max() < 2700


def test_the_special_symbols_have_experts(make_gate):
    counts = (1, 1, 1, 1) + ZIPF  # bos, pad, eos, unk as fairseq counts them
    for kind in HASHES:
        gate = make_gate(counts, moe_hash=kind)
        plan = gate(torch.randn(4, D), GateContext(token_ids_T=torch.arange(4)))
        assert plan.num_pairs == 4


@pytest.mark.parametrize("kind", HASHES)
def test_one_expert(make_gate, kind):
    assert make_gate(experts=1, moe_hash=kind).table_V.tolist() == [0] * V


def test_the_table_is_in_the_checkpoint_and_no_precision_changes_it(make_gate):
    gate = make_gate(moe_hash="random", seed=1)
    other = make_gate(moe_hash="random", seed=2).half()
    other.load_state_dict(gate.state_dict())
    assert other.table_V.dtype == torch.int64
    assert torch.equal(other.table_V, gate.table_V)
    assert not list(gate.parameters())
    assert gate.flops_per_token() == 0


def test_padding_goes_nowhere(make_gate):
    ids, mask = torch.randint(0, V, (20,)), torch.rand(20) < 0.5
    plan = make_gate()(torch.randn(20, D), GateContext(token_mask_T=mask, token_ids_T=ids))
    assert plan.token_ids_N.sort().values.tolist() == mask.nonzero().squeeze(1).tolist()


def test_what_is_missing_is_named(make_gate):
    with pytest.raises(OptionError, match="--moe-gate hash: .*no vocabulary is known"):
        make_gate(counts=())
    with pytest.raises(ValueError, match="hash routes by token ids: give token_ids_T"):
        make_gate()(torch.randn(3, D), GateContext())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"moe_hash": "md5"}, "--moe-hash md5: one of: balanced, random, clustered"),
        ({"moe_null_experts": 1}, "--moe-null-experts 1: the gate hash cannot select null experts"),
        ({"moe_aux": "z=1"}, "the gate hash has no logits"),
        ({"moe_scorer": "mlp"}, "--moe-scorer mlp: the gate hash does not use it"),
        (
            {"moe_shared_experts": 1, "moe_shared_combine": "softmax"},
            "--moe-shared-combine softmax",
        ),
    ],
)
def test_bad_values(moe_options, given, message):
    with pytest.raises(OptionError) as error:
        validate(moe_options(moe_gate="hash", **given))
    assert message in str(error.value)
