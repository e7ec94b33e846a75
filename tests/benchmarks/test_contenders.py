"""All contenders compute the same output."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from speed import contenders, peers
from speed.cases import Case
from speed.inputs import Inputs

CASES = [
    Case("test", 24, 8, 4, 2),
    Case("test", 24, 8, 4, 1, skew=1.0),
    Case("test", 24, 8, 4, wanted=2.5),
    Case("test", 24, 8, 4, wanted=1),
    Case("test", 24, 8, 4, null_share=0, skew=1),
    Case("test", 24, 8, 4, null_share=0.5, skew=1),
]
PLAIN = [contenders.Loop, contenders.GroupedMM, contenders.AllMasked, contenders.OneHot]
GATED = [peers.MixtralGrouped, peers.MixtralEager, peers.OlmoeGrouped, peers.OlmoeEager]


def outputs(contender):
    """Output, and gradient of the input without losses."""
    y, _ = contender(contender.x)
    y.backward(contender.dy)
    return y.detach(), contender.x.grad


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contenders_equal_our_layer(case):
    inputs = Inputs(case)
    y, dx = outputs(contenders.Ours(inputs))
    for kind in PLAIN:
        other_y, other_dx = outputs(kind(inputs))
        torch.testing.assert_close(other_y, y, msg=lambda text, kind=kind: f"{kind}: {text}")
        torch.testing.assert_close(other_dx, dx, msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.slow  # imports transformers
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.gate == "top_k"], ids=lambda case: case.name
)
def test_hugging_face_equals_our_gated_experts(case):
    inputs = Inputs(case)
    y, dx = outputs(contenders.OursGated(inputs))
    for kind in GATED:
        other_y, other_dx = outputs(kind(inputs))
        torch.testing.assert_close(other_y, y, msg=lambda text, kind=kind: f"{kind}: {text}")
        torch.testing.assert_close(other_dx, dx, msg=lambda text, kind=kind: f"{kind}: {text}")


def test_their_gradients_equal_ours():
    """Gradients of gate and experts, without auxiliary losses."""
    inputs = Inputs(CASES[0])
    ours, loop, grouped = (
        kind(inputs) for kind in (contenders.Ours, contenders.Loop, contenders.GroupedMM)
    )
    for contender in (ours, loop, grouped):
        outputs(contender)
    experts = ours.layer.experts
    torch.testing.assert_close(grouped.w1.grad, experts.fc1_weight.grad)
    torch.testing.assert_close(grouped.w2.grad, experts.fc2_weight.grad)
    for networks, grad_EFD, bias in (
        (loop.fc1, experts.fc1_weight.grad, experts.fc1_bias),
        (loop.fc2, experts.fc2_weight.grad.transpose(1, 2), experts.fc2_bias),
    ):
        torch.testing.assert_close(torch.stack([fc.weight.grad for fc in networks]), grad_EFD)
        torch.testing.assert_close(torch.stack([fc.bias.grad for fc in networks]), bias.grad)
    for contender in (loop, grouped):
        torch.testing.assert_close(contender.gate.grad, ours.layer.gate.scorer.weight.grad)


def test_calibration_meets_the_pairs_that_a_case_wants():
    assert Inputs(Case("test", 512, 16, 8, wanted=4)).pairs / 512 == pytest.approx(4, rel=0.02)
    bare = Inputs(Case("test", 512, 64, 8, null_share=0, skew=1)).pairs
    half = Inputs(Case("test", 512, 64, 8, null_share=0.5, skew=1)).pairs
    assert half / bare == pytest.approx(0.5, rel=0.1)
