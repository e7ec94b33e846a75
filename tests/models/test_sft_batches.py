"""Batches of fine-tuning through a model: token weights in the losses, and what divides them."""

import numpy as np
import pytest
import torch
from fairseq.logging import metrics

from evomoe_plugin.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from evomoe_plugin.data.sft_dataset import SFTDataset
from evomoe_plugin.data.sft_examples import Example

START = 2  # </s>
# (tokens of the prompt, tokens of the response), an earlier response in the last one.
SHAPES = ((3, 2), (1, 7), (6, 3), (2, 4))


@pytest.fixture
def examples():
    draw = np.random.default_rng(3)
    made = []
    for prompt, response in SHAPES:
        responses = np.array([0] * prompt + [1] * response, dtype=np.int32)
        tokens = draw.integers(4, 40, len(responses)).astype(np.int32)
        made.append(Example(tokens, responses, START))
    made.append(
        Example(
            draw.integers(4, 40, 8).astype(np.int32),
            np.array([0, 1, 1, 0, 0, 2, 2, 2], dtype=np.int32),
            START,
        )
    )
    return made


def batch(examples, task, rows=None, **given):
    dataset = SFTDataset(examples, task.target_dictionary, **given)
    return dataset.collater([dataset[i] for i in rows or range(len(dataset))])


def choices(model):
    """What each gate chooses, from now on."""
    made = []
    for layer in model.decoder.moe_layers:

        def route(*args, _route=layer.gate.route):
            made.append(_route(*args))
            return made[-1]

        layer.gate.route = route
    return made


@pytest.mark.parametrize("packed", [False, True])
def test_dcmoe_balance_loss_with_weights(make_model, task, examples, packed):
    """C * sum_c (P_c / sum P) (f_c / sum f), P and f means over tokens weighed 1, W and 0."""
    model = make_model(moe_gate="top_p", moe_null_experts=1, moe_aux="switch=1").double()
    made = choices(model)
    sample = batch(examples, task, response_weight=10.0, row_size=16 if packed else None)
    weights = sample["net_input"]["token_weights"]
    assert set(weights.unique().tolist()) == {0.0, 1.0, 10.0}
    assert (weights == 10).sum() == sum((example.responses[:-1] > 0).sum() for example in examples)
    sample["net_input"]["token_weights"] = weights.double()
    _, extra = model(**sample["net_input"])
    w_T1 = weights.t().reshape(-1, 1).double()  # the layers are length-first
    for layer, choice in enumerate(made):
        P_C = (choice.probs_TC * w_T1).sum(0) / w_T1.sum()
        f_C = (choice.mask_TC * w_T1).sum(0) / w_T1.sum()
        wanted = len(P_C) * ((P_C / P_C.sum()) * (f_C / f_C.sum())).sum()
        torch.testing.assert_close(extra["moe_aux"]["switch"][layer], wanted)
    _, plain = model(**batch(examples, task, row_size=16 if packed else None)["net_input"])
    assert not torch.allclose(plain["moe_aux"]["switch"], extra["moe_aux"]["switch"], atol=1e-5)


def gradients(model, criterion, samples):
    """Loss and gradients of an update of these micro-batches, as fairseq's trainer divides.

    fairseq takes its logarithms in fp32, whatever the model is in.
    """
    model.zero_grad()
    total = size = 0
    for sample in samples:
        loss, sample_size, _ = criterion(model, sample)
        loss.backward()
        total, size = total + loss.item(), size + sample_size
    return total / size, [p.grad / size for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("gate", ["dense_to_sparse", "top_p"])
def test_an_update_is_the_mean_over_response_tokens_however_it_is_divided(
    make_model, task, examples, gate
):
    model = make_model(moe_gate=gate).double()
    criterion = MoECrossEntropyCriterion(task, False, moe_gate_loss_wt=0.0)
    whole = gradients(model, criterion, [batch(examples, task)])
    ways = {
        "one by one": [batch(examples, task, [i]) for i in range(5)],
        "uneven": [batch(examples, task, [1]), batch(examples, task, [0, 2, 3, 4])],
        "packed": [batch(examples, task, row_size=20)],
        "packed and divided": [batch(examples, task, [i], row_size=20) for i in range(2)],
    }
    for name, samples in ways.items():
        loss, grads = gradients(model, criterion, samples)
        assert loss == pytest.approx(whole[0], rel=1e-6), name
        for a, b in zip(grads, whole[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7, msg=name)
    # By hand: the mean negative log-likelihood of the tokens of responses.
    nll = []
    for example in examples:
        sample = batch([example], task)
        logp = model(**sample["net_input"])[0].log_softmax(-1)[0]
        nll += [
            -logp[i, token].item() for i, token in enumerate(example.tokens) if example.responses[i]
        ]
    assert whole[0] == pytest.approx(np.mean(nll), rel=1e-6)


def test_flops_are_told_per_token_that_is_computed(make_model, task, examples):
    model = make_model().eval()
    criterion = MoECrossEntropyCriterion(task, False).eval()
    logged = []
    for whole in (False, True):
        _, size, log = criterion(model, batch(examples, task, train_on_prompt=whole))
        with metrics.aggregate(new_root=True) as aggregator:
            criterion.reduce_metrics([log])
        logged.append((size, aggregator.get_smoothed_values()["mflops_per_token"]))
    assert logged[0][0] < logged[1][0]
    assert logged[0][1] == logged[1][1]
