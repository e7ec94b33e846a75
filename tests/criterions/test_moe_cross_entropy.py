import math
import types

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.cross_entropy import CrossEntropyCriterion
from fairseq.logging import metrics

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterion, _log_unchunked
from evomoe_plugin.models.accounting import ForwardFlops

PAD = 1


class FakeModel(torch.nn.Module):
    """Three tokens of logits, an auxiliary loss and statistics of two layers."""

    def __init__(self, aux=(2.0, 4.0), pairs=(6.0, 3.0), coefficient=1.0):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.randn(1, 4, 7))
        self.aux = torch.nn.Parameter(torch.tensor(aux))
        self.pairs = torch.tensor(pairs)
        self.coefficients = {"balance": coefficient}
        self.forward_flops = {"": ForwardFlops(per_token=1_000_000, per_pair=500_000)}

    def forward(self, src_tokens):
        stats = {
            "tokens": torch.tensor([3.0, 3.0]),
            "pairs": self.pairs,
            "experts": torch.tensor([6.0, 6.0]),
            "tokens_per_expert": torch.stack([self.pairs, torch.zeros(2)], 1),
            "entropy": torch.tensor([3.0, 6.0]),
            "nonfinite": torch.zeros(2),
            "temperature": torch.tensor([4.5, 4.5]),
        }
        return self.logits, {
            "moe_aux": {"balance": self.aux},
            "moe_stats": stats,
            "moe_aux_coefficients": self.coefficients,
        }

    def get_normalized_probs(self, net_output, log_probs):
        return F.log_softmax(net_output[0], -1)

    def get_targets(self, sample, net_output):
        return sample["target"]


SAMPLE = {
    "net_input": {"src_tokens": torch.tensor([[2, 3, 4, PAD]])},
    "target": torch.tensor([[3, 4, 5, PAD]]),
    "ntokens": 3,
}
TASK = types.SimpleNamespace(target_dictionary=types.SimpleNamespace(pad=lambda: PAD))


def make(weight=0.5, method="average", sentence_avg=False, chunk=None, tokens=0):
    return MoECrossEntropyCriterion(TASK, sentence_avg, weight, method, chunk, tokens)


@pytest.mark.parametrize("method, combined", [("average", 3.0), ("sum", 6.0)])
def test_loss_is_cross_entropy_plus_the_weighted_gate_loss(method, combined):
    model = FakeModel()
    loss, sample_size, log = make(method=method)(model, SAMPLE)
    nll = F.cross_entropy(model.logits[0, :3], SAMPLE["target"][0, :3], reduction="sum")
    assert sample_size == 3
    assert loss.item() == pytest.approx(nll.item() + 0.5 * 3 * combined)
    assert log["inner_loss"].item() == pytest.approx(nll.item())
    loss.backward()
    assert torch.allclose(model.aux.grad, torch.full((2,), 0.5 * 3 * combined / 6))


def test_each_loss_has_its_own_coefficient():
    one, tenth = FakeModel(), FakeModel(coefficient=0.1)
    tenth.load_state_dict(one.state_dict())
    logs = [make()(model, SAMPLE)[2] for model in (one, tenth)]
    added = [log["loss"] - log["inner_loss"] for log in logs]
    assert added[1].item() == pytest.approx(0.1 * added[0].item(), rel=1e-4)
    assert torch.equal(logs[0]["moe_aux_balance"], logs[1]["moe_aux_balance"])  # unweighted


@pytest.mark.parametrize("weight, coefficient", [(0.0, 1.0), (0.5, 0.0)])
def test_weight_zero_changes_nothing(weight, coefficient):
    model = FakeModel(coefficient=coefficient)
    loss, *_ = make(weight=weight)(model, SAMPLE)
    plain, *_ = CrossEntropyCriterion(TASK, False)(model, SAMPLE)
    assert torch.equal(loss, plain)
    loss.backward()
    assert model.aux.grad is None


def test_evaluation_adds_no_gate_loss_but_reports_it():
    loss, _, log = make().eval()(FakeModel(), SAMPLE)
    assert torch.equal(loss.detach(), log["inner_loss"])
    assert log["moe_aux_balance"].item() == 9


def reduced(logs):
    metrics.reset()
    with metrics.aggregate("train"):
        MoECrossEntropyCriterion.reduce_metrics(logs)
    return metrics.get_smoothed_values("train")


def test_what_is_logged():
    logs = [make()(FakeModel(), SAMPLE)[2] for _ in range(2)]
    inner = sum(log["inner_loss"].item() for log in logs) / 6 / math.log(2)
    values = reduced(logs)
    assert values["inner_loss"] == pytest.approx(inner, abs=1e-3)
    assert values["ppl"] == pytest.approx(2**inner, rel=1e-2)
    assert values["loss"] == pytest.approx(inner + 0.5 * 3 / math.log(2), abs=1e-3)
    assert values["gate_loss_balance"] == 3
    assert values["temperature"] == 1.5
    assert values["experts_per_token"] == 1.5
    assert values["dead_experts"] == 0.5
    assert values["load_max"] == 2
    assert values["gate_entropy"] == 1.5
    assert values["mflops_per_token"] == pytest.approx(1 + 9 * 0.5 / 3)


def test_sums_over_ranks_give_the_same_numbers():
    logs = [make()(FakeModel(pairs=p), SAMPLE)[2] for p in [(6.0, 3.0), (5.0, 4.0)]]
    summed = {key: logs[0][key] + logs[1][key] for key in logs[0]}
    assert reduced([summed]) == reduced(logs)
    assert MoECrossEntropyCriterion.logging_outputs_can_be_summed()


def test_perplexity_is_of_the_tokens_also_with_sentence_avg():
    model = FakeModel()
    values = reduced([make(sentence_avg=True)(model, SAMPLE)[2]])
    nll = F.cross_entropy(model.logits[0, :3], SAMPLE["target"][0, :3])
    assert values["ppl"] == pytest.approx(nll.exp().item(), rel=1e-2)


@pytest.mark.parametrize(
    "given, message",
    [
        ((-1.0, "sum"), "--moe-gate-loss-wt -1.0"),
        ((float("nan"), "sum"), "--moe-gate-loss-wt nan"),
        ((1.0, "mean"), "--moe-gate-loss-combine-method mean: one of: average, sum"),
        ((1.0, "sum", False, -1), "--moe-vocab-chunk -1: give a number"),
        ((1.0, "sum", False, 0, -1), "--moe-stability-tokens -1: give a number"),
    ],
)
def test_bad_options(given, message):
    with pytest.raises(OptionError, match=message):
        make(*given)


def test_other_models_are_told_of_once(caplog):
    _log_unchunked.cache_clear()
    with caplog.at_level("INFO"):
        for _ in range(2):
            make()(FakeModel(), SAMPLE)
    assert len(caplog.records) == 1 and "not an evomoe_plugin model" in caplog.text


class MeanOfTokens(FakeModel):
    """An auxiliary loss that is a mean over tokens: of a parameter for each token id."""

    def __init__(self):
        super().__init__()
        self.logits_V = torch.nn.Parameter(torch.randn(7, 7))
        self.aux_V = torch.nn.Parameter(torch.randn(7))

    def forward(self, src_tokens, token_weights=None):
        weights = (src_tokens != PAD).float()
        if token_weights is not None:
            weights = weights * token_weights
        mean = (weights * self.aux_V[src_tokens]).sum() / weights.sum()
        return self.logits_V[src_tokens], {
            "moe_aux": {"balance": mean.expand(2)},
            "moe_aux_coefficients": {"balance": 1.0},
        }


@pytest.mark.parametrize("sentence_avg", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_division_into_micro_batches_changes_no_gradient(sentence_avg, weighted):
    """Rows with 1, 3 and 2 targets, of 5, 4 and 2 tokens; also with ranks that have none."""
    source = torch.tensor([[2, 3, 4, 5, 6], [2, 6, 5, 4, PAD], [2, 3, PAD, PAD, PAD]])
    target = source.roll(-1, 1)
    target[0, :-2] = target[:, -1] = PAD
    target[1, 3] = target[2, 1] = 2
    weights_T = torch.rand(3, 5) if weighted else None

    def batch(rows):
        net_input = {"src_tokens": source[rows]}
        if weights_T is not None:
            net_input["token_weights"] = weights_T[rows]
        ntokens = int((target[rows] != PAD).sum())
        return {"net_input": net_input, "target": target[rows], "ntokens": ntokens}

    task = types.SimpleNamespace(**vars(TASK), has_context=True)
    results = []
    for parts in ([[0, 1, 2]], [[0, 1], [2]], [[0], [1], [2]]):
        torch.manual_seed(3)
        model, criterion = MeanOfTokens(), MoECrossEntropyCriterion(task, sentence_avg, 0.5)
        samples = [batch(rows) for rows in parts]
        criterion.begin_update([*samples, {}], lambda value: value)
        logs, size = [], 0
        for sample in samples:
            loss, sample_size, log = criterion(model, sample)
            loss.backward()
            logs.append(log)
            size += sample_size
        assert size == (3 if sentence_avg else int((target != PAD).sum()))
        with metrics.aggregate() as logged:
            criterion.reduce_metrics(logs)
        values = {name: meter.avg for name, meter in logged.items() if hasattr(meter, "avg")}
        mean = values["gate_loss_balance"]
        wanted = float(values["inner_loss"]) if not sentence_avg else None
        if wanted is not None:  # the loss in bits
            assert float(values["loss"]) == pytest.approx(wanted + 0.5 * float(mean) / math.log(2))
        results.append((mean, model.aux_V.grad / size, model.logits_V.grad / size))
    whole, *others = results
    for other in others:
        for ours, theirs in zip(other, whole, strict=True):
            torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(theirs))
