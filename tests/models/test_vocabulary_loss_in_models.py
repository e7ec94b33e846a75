"""The criterion's loss from chunks of logits against that of all logits, in whole models."""

import types

import pytest
import torch

from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from tests.models.conftest import BOTH_FAMILIES

PAD = 1
TASK = types.SimpleNamespace(target_dictionary=types.SimpleNamespace(pad=lambda: PAD))


def course(model, chunk, sample, reduce=True, training=True, sentence_avg=False):
    """Loss, what is logged, and gradients."""
    model.train(training).zero_grad()
    criterion = MoECrossEntropyCriterion(TASK, sentence_avg, moe_vocab_chunk=chunk).train(training)
    loss, size, log = criterion(model, sample, reduce)
    if training:
        loss.sum().backward()
    return loss.detach(), size, log, {n: p.grad for n, p in model.named_parameters()}


def batch(weighted=False):
    x = torch.randint(4, 40, (3, 8))
    target = x.roll(-1, 1)
    target[0, :4] = target[1, -2:] = PAD  # a prompt, and the end of a row
    x[1, -2:] = PAD
    given = {"src_tokens": x, "src_lengths": torch.full((3,), 8)}
    if weighted:
        given["token_weights"] = (x % 3 + 1).double()
        given["segments"] = torch.arange(8).repeat(3, 1) // 4
    return {"net_input": given, "target": target, "ntokens": int((target != PAD).sum())}


@pytest.mark.parametrize(
    "given, training, reduce, weighted",
    [
        ({}, True, True, False),
        ({}, True, True, True),
        ({}, True, False, False),
        ({}, False, True, False),
        ({}, False, False, True),
        ({"share_decoder_input_output_embed": True}, True, True, True),
        ({"decoder_output_dim": 12}, True, True, False),
        ({"moe_train_only": "experts,gate"}, True, True, True),
        ({"checkpoint_activations": True}, True, False, False),
    ],
    ids=lambda value: next(iter(value), "plain") if isinstance(value, dict) else str(value),
)
def test_chunks_of_the_vocabulary_loss_change_nothing(
    make_model, given, training, reduce, weighted
):
    model, sample = make_model(**given), batch(weighted)
    chunked = course(model, 5, sample, reduce, training, sentence_avg=weighted)
    stock = course(model, 0, sample, reduce, training, sentence_avg=weighted)
    torch.testing.assert_close(chunked[0], stock[0], rtol=1e-5, atol=1e-5)
    assert chunked[1] == stock[1] and chunked[2].keys() == stock[2].keys()
    for name, value in stock[2].items():
        torch.testing.assert_close(
            torch.as_tensor(chunked[2][name]),
            torch.as_tensor(value),
            rtol=1e-5,
            atol=1e-5,
            equal_nan=True,
        )
    for name, grad in stock[3].items():
        assert (chunked[3][name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(chunked[3][name], grad, rtol=1e-4, atol=1e-5, msg=name)


@BOTH_FAMILIES
def test_logits_are_not_asked_for(make_model, monkeypatch):
    model = make_model()
    monkeypatch.setattr(model.decoder, "output_layer", None)
    course(model, None, batch())
    with pytest.raises(TypeError):
        course(model, 0, batch())
