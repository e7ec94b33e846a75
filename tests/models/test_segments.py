"""Rows of several examples give what rows of one give: outputs, losses, gradients, statistics."""

import pytest
import torch
from torch.nn import functional as F

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.gates import gate_names
from evomoe_plugin.models.segments import Segments
from evomoe_plugin.routing.noise import sequence_keys
from tests.models.conftest import BOTH_FAMILIES

PAD, EOS = 1, 2
LENGTHS = (5, 9, 3, 7, 1)
ROWS = ((0, 1), (2, 3, 4))  # 14 tokens, and 11 with 3 of padding
GIVEN = {
    "dense_to_sparse": {"moe_temperature_start": 0.6, "moe_gate_threshold": 0.1},
    "stable": {"moe_stable_updates": 10},
    "top_any": {"moe_max_experts": 6},
    "top_p": {"moe_null_experts": 1, "moe_shared_experts": 2, "moe_shared_combine": "softmax"},
}
# Their choice for a token depends on the tokens beside it, and so on how a batch is laid out.
BY_BATCH = {"base", "expert_choice"}
GATES = [name for name in gate_names() if name not in {"cautious", *BY_BATCH}]


def examples():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(4, 40, (length,), generator=generator) for length in LENGTHS]


def padded(rows, value):
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def unpacked(parts):
    """Inputs of one example a row, and where each example stands."""
    places = [(row, slice(0, len(part))) for row, part in enumerate(parts)]
    return padded(parts, PAD), None, places


def packed(parts):
    """Inputs of two rows, the segments and where each example stands."""
    rows, numbers, places = [], [], {}
    for row, members in enumerate(ROWS):
        start = 0
        for i in members:
            places[i] = (row, slice(start, start + len(parts[i])))
            start += len(parts[i])
        rows.append(torch.cat([parts[i] for i in members]))
        numbers.append(torch.cat([torch.full((len(parts[i]),), n) for n, i in enumerate(members)]))
    return padded(rows, PAD), padded(numbers, 0), [places[i] for i in range(len(parts))]


def course(model, tokens, segments, places, weighted=False):
    """Outputs by example, the losses, the statistics and all gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    given = {} if segments is None else {"segments": segments}
    if weighted:
        given["token_weights"] = (tokens % 3 + 1).double()
    y, extra = model(tokens, **given)
    outputs = [y[place] for place in places]
    loss = sum(
        F.cross_entropy(out, tokens[place], reduction="sum")
        for out, place in zip(outputs, places, strict=True)
    )
    losses = [loss, *(aux.sum() for aux in extra["moe_aux"].values())]
    if model.training:
        sum(losses).backward()
    return outputs, losses, extra["moe_stats"], [p.grad for p in model.parameters()]


def assert_equal_courses(model, weighted=False):
    parts = examples()
    apart = course(model, *unpacked(parts), weighted)
    together = course(model, *packed(parts), weighted)
    for a, b in zip([*apart[0], *apart[1]], [*together[0], *together[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for name, value in apart[2].items():
        torch.testing.assert_close(value, together[2][name], rtol=1e-9, atol=1e-9, equal_nan=True)
    for a, b in zip(apart[3], together[3], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# Evaluation routes without noise or samples, and otherwise as training does.
@BOTH_FAMILIES
@pytest.mark.parametrize(
    "gate, training",
    [
        *((gate, True) for gate in GATES),
        ("dense_to_sparse", False),
        ("top_any", False),
        ("top_p", False),
    ],
)
def test_packed_equals_unpacked(make_model, gate, training):
    model = make_model(moe_gate=gate, **GIVEN.get(gate, {})).double().train(training)
    assert_equal_courses(model)


@pytest.mark.parametrize(
    "gate, given",
    [
        ("dense_to_sparse", {"decoder_learned_pos": True}),
        ("top_p", {"no_token_positional_embeddings": True}),
        ("top_p", {"checkpoint_activations": True}),
        ("dense_to_sparse", {"moe_layers": "1", "layernorm_embedding": True}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_packed_equals_unpacked_in_other_models(make_model, gate, given):
    model = make_model(moe_gate=gate, **GIVEN[gate], **given).double().train()
    assert_equal_courses(model, weighted=True)


def document_batches():
    """One document a row, and the same documents after one another, as pretraining reads them."""
    parts = [torch.cat([torch.tensor([EOS]), part]) for part in examples()]
    tokens, _, places = packed(parts)
    return unpacked(parts), (tokens, None, places)


# The stock attention has no rotary positions.
@pytest.mark.parametrize(
    "make_model, attention",
    [("gpt", "sdpa"), ("gpt", "stock"), ("llama", "sdpa")],
    indirect=["make_model"],
)
def test_documents_of_a_row_are_computed_as_if_alone(make_model, attention):
    model = make_model(moe_gate="top_p", moe_document_mask=True, moe_attention=attention)
    model = model.double().train()
    apart, together = (course(model, *batch) for batch in document_batches())
    for a, b in zip([*apart[0], *apart[1]], [*together[0], *together[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(apart[3], together[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@BOTH_FAMILIES
def test_without_the_document_mask_they_would_attend_to_each_other(make_model):
    model = make_model(moe_gate="top_p").double().eval()
    apart, together = (course(model, *batch) for batch in document_batches())
    assert not torch.allclose(apart[0][1], together[0][1], atol=1e-3)


def test_a_prompt_of_several_documents_is_refused(make_model):
    model = make_model(moe_document_mask=True).eval()
    tokens = torch.tensor([[EOS, 5, EOS]])
    with pytest.raises(OptionError, match="--moe-document-mask True: a prompt with </s> inside"):
        model.decoder(tokens, incremental_state={})


@BOTH_FAMILIES
def test_without_segments_the_examples_would_not_be_apart(make_model):
    model = make_model().double().eval()
    tokens, segments, places = packed(examples())
    apart = model(tokens, segments=segments)[0]
    together = model(tokens)[0]
    second, third = places[1], places[3]
    assert not torch.allclose(apart[second], together[second], atol=1e-3)
    assert not torch.allclose(apart[third], together[third], atol=1e-3)


def test_positions_keys_and_mask_by_hand():
    tokens = torch.tensor([[5, 6, 5, 6, 7], [8, 9, 9, 1, 1]])
    numbers = torch.tensor([[0, 0, 1, 1, 1], [3, 3, 8, 0, 0]])  # padding's do not matter
    segments = Segments(numbers, tokens == PAD)
    assert segments.positions_BT.tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]
    keys = segments.token_keys(tokens)
    for row, start, end in ((0, 0, 2), (0, 2, 5), (1, 0, 2), (1, 2, 3)):
        alone = sequence_keys(tokens[row : row + 1, start:end])[0]
        assert keys[row, start:end].equal(alone)
    mask = segments.attention_mask(torch.full((5, 5), float("-inf")).triu(1), 2)
    seen = (mask == 0).int()
    assert mask.shape == (4, 5, 5) and seen[0].equal(seen[1]) and seen[2].equal(seen[3])
    assert seen[0].tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 1],
    ]
    assert seen[2].tolist()[2:] == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]


@BOTH_FAMILIES
def test_segments_are_for_whole_rows(make_model):
    model = make_model().eval()
    tokens, segments, _ = packed(examples())
    with pytest.raises(ValueError, match="support neither incremental decoding"):
        model.decoder(tokens, incremental_state={}, segments=segments)
