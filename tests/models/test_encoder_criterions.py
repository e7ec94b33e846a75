"""What is trained and logged for masked language models and translation."""

import math
import types

import pytest
import torch
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.logging import metrics

from evomoe_plugin.criterions.moe_cross_entropy import CrossEntropyGumbelCriterion
from evomoe_plugin.criterions.moe_label_smoothed_cross_entropy import MoELabelSmoothedCrossEntropy
from evomoe_plugin.criterions.moe_masked_lm import MaskedLMGumbel, MaskedLMGumbelConfig, MoEMaskedLM
from tests.models.test_encoders import BOTH, PAD, batch, make, sentences  # noqa: F401

LENGTHS = (9, 5, 7)


def sample_of(family):
    """Three sentences; of RoBERTa's 21 tokens 4 are masked."""
    given = batch(family, LENGTHS)
    target = sentences([n - 2 for n in LENGTHS])
    if family == "roberta":
        target = torch.full_like(given["src_tokens"], PAD)
        for row, place in ((0, 2), (0, 5), (1, 1), (2, 3)):
            target[row, place] = given["src_tokens"][row, place]
    return sized(given, target)


def sized(given, target):
    """A batch, with the counts that fairseq's data sets give."""
    counted = target if "prev_output_tokens" in given else given["src_tokens"]
    ntokens = int((counted != PAD).sum())
    return {
        "net_input": given,
        "target": target,
        "ntokens": ntokens,
        "nsentences": len(target),
    }


def part(sample, rows):
    """Some sentences of a batch."""
    target = sample["target"][rows]
    return sized({name: value[rows] for name, value in sample["net_input"].items()}, target)


def criterion_of(family, task, weight):
    if family == "roberta":
        cfg = CRITERION_DATACLASS_REGISTRY["moe_masked_lm"](moe_gate_loss_wt=weight, tpu=False)
        return MoEMaskedLM(cfg, task).train()
    return MoELabelSmoothedCrossEntropy(task, False, 0.1, moe_gate_loss_wt=weight).train()


@BOTH
def test_perplexity_has_no_gate_loss_and_experts_are_of_all_tokens(make, task, family):  # noqa: F811
    model, sample = make(family, moe_gate="dense", moe_aux="z=1").train(), sample_of(family)
    criterion = criterion_of(family, task, 0.5)
    loss, size, log = criterion(model, sample)
    assert size == (sample["target"] != PAD).sum()
    aux = [float(value) for key, value in log.items() if key.startswith("moe_aux_")]
    assert all(value > 0 for value in aux)
    assert float(loss) > float(log["inner_loss"])
    assert float(log["loss"]) == pytest.approx(float(loss))
    with metrics.aggregate() as found:
        criterion.reduce_metrics([log])
        values = found.get_smoothed_values()
    plain = log["inner_loss"] if family == "roberta" else log["nll_loss"]
    assert values["ppl"] == pytest.approx(math.exp(float(plain) / float(size)), abs=0.02)
    for stack in ("",) if family == "roberta" else ("encoder_", "decoder_"):
        assert values[f"{stack}experts_per_token"] == 4


@BOTH
def test_the_loss_of_an_update_does_not_depend_on_its_division(make, task, family):  # noqa: F811
    """With Gumbel noise, and a loss of gates that is a mean over tokens."""
    model, sample = make(family, moe_aux="z=1").train(), sample_of(family)
    model.set_num_updates(5)
    criterion = criterion_of(family, task, 0.5)
    results = []
    for parts in ([sample], [part(sample, [2]), part(sample, [0, 1])]):
        model.zero_grad()
        criterion.begin_update(parts, lambda sums: sums)
        loss = sum(criterion(model, each)[0] for each in parts)
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    (loss, gradients), (other_loss, others) = results
    assert loss.item() == pytest.approx(other_loss.item(), rel=1e-5)
    for one, other in zip(gradients, others, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_names_of_evomoe_are_those_without_gate_losses(make, task):  # noqa: F811
    masked = MaskedLMGumbel(MaskedLMGumbelConfig(tpu=False), task)
    weight = CRITERION_DATACLASS_REGISTRY["cross_entropy_gumbel"]().moe_gate_loss_wt
    # A translation task has a dictionary each.
    two = types.SimpleNamespace(source_dictionary=None, target_dictionary=task.target_dictionary)
    written = CrossEntropyGumbelCriterion(two, False, moe_gate_loss_wt=weight)
    for family, criterion in (("roberta", masked), ("transformer", written)):
        model, sample = make(family, moe_gate="switch").train(), sample_of(family)
        loss, _, log = criterion.train()(model, sample)
        assert torch.equal(loss.detach(), log["inner_loss"])
        assert any(key.startswith("moe_aux_") for key in log)
