"""Our attention against fairseq's: outputs, gradients, incremental state."""

import itertools
import logging

import pytest
import torch
from fairseq.modules import MultiheadAttention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evomoe_plugin.models import attention as attention_file
from evomoe_plugin.models.attention import Mask, Runs, SelfAttention, attend, causal_mask
from evomoe_plugin.models.causal_dropout import BLOCK, attend_with_dropout
from evomoe_plugin.models.segments import Segments

PAD = 1
CLOSE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def pair(dtype=torch.float64, dropout=0.0):
    """Ours and fairseq's with the same weights."""
    ours, stock = (
        kind(16, 2, dropout=dropout, self_attention=True).to(dtype)
        for kind in (SelfAttention, MultiheadAttention)
    )
    with torch.no_grad():
        for parameter in ours.parameters():  # biases too
            parameter.normal_(std=0.3)
    stock.load_state_dict(ours.state_dict())
    return ours, stock


def padding(kind, rows=3, length=7):
    mask = torch.zeros(rows, length, dtype=torch.bool)
    if kind == "right":
        mask[0, -3:] = mask[1, -1:] = True
    if kind == "left":
        mask[0, :3] = mask[1, :1] = True
    return mask


def future(length, dtype):
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


def results(module, x, real_TB, **given):
    """Outputs at tokens that are not padding, and their gradients."""
    x = x.clone().requires_grad_()
    y, weights = module(x, x, x, need_weights=False, **given)
    assert weights is None
    y = y[real_TB]
    grads = torch.autograd.grad(y.double().pow(2).sum(), (x, *module.parameters()))
    return y.detach(), *grads


def assert_equal(ours, stock, dtype):
    largest = max(b.abs().max().item() for b in stock)  # keys' biases have gradients of 0
    for a, b in zip(ours, stock, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=CLOSE[dtype], atol=CLOSE[dtype] * largest)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_causal_attention_equals_stock(kind, dtype):
    ours, stock = pair(dtype)
    mask_BT = padding(kind)
    x = torch.randn(7, 3, 16).to(dtype)
    real_TB = ~mask_BT.t()
    additive = future(7, dtype)
    if kind == "left":  # padding attends to itself, or stock gives NaN
        hidden = mask_BT[:, None].repeat(1, 7, 1) & ~torch.eye(7, dtype=torch.bool)
        additive = (
            additive + torch.zeros(7, 7).masked_fill(hidden, float("-inf")).to(dtype)
        ).repeat_interleave(2, 0)
    assert_equal(
        results(ours, x, real_TB, attn_mask=causal_mask(mask_BT), key_padding_mask=mask_BT),
        results(
            stock,
            x,
            real_TB,
            attn_mask=additive,
            key_padding_mask=mask_BT if kind == "right" else None,
        ),
        dtype,
    )


@pytest.mark.parametrize("kind", ["none", "right", "left"])
def test_attention_to_both_sides_equals_stock(kind):
    ours, stock = pair()
    mask_BT = padding(kind)
    given = {} if kind == "none" else {"key_padding_mask": mask_BT}
    x = torch.randn(7, 3, 16).double()
    assert_equal(
        results(ours, x, ~mask_BT.t(), **given),
        results(stock, x, ~mask_BT.t(), **given),
        torch.float64,
    )


def test_rows_of_several_examples_equal_stock():
    ours, stock = pair()
    numbers = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 0, 0]])
    pad = torch.zeros(2, 7, dtype=torch.bool)
    pad[1, 5:] = True
    packed = Segments(numbers, pad)
    x = torch.randn(7, 2, 16).double()
    assert_equal(
        results(ours, x, ~pad.t(), attn_mask=packed.runs()),
        results(
            stock,
            x,
            ~pad.t(),
            key_padding_mask=pad,
            attn_mask=packed.attention_mask(future(7, torch.float64), 2),
        ),
        torch.float64,
    )


def test_only_padding_on_the_left_needs_a_mask():
    assert causal_mask(None) is causal_mask(padding("right")) is Mask.CAUSAL
    assert causal_mask(padding("left")).shape == (3, 1, 7, 7)


def test_incremental_decoding_keeps_fairseqs_state():
    ours, stock = pair()
    x = torch.randn(5, 3, 16).double()
    order = torch.tensor([2, 0, 0])
    states, outputs = ({}, {}), ([], [])
    pads = padding("left", length=5)
    pads[0, :3] = False
    pads[2, 4] = True  # padding enters late
    for t in range(5):
        for module, state, said in zip((ours, stock), states, outputs, strict=True):
            step = x[t : t + 1]
            pad = pads[:, t : t + 1] if t == 4 else None
            said.append(
                module(
                    step,
                    step,
                    step,
                    key_padding_mask=pad,
                    incremental_state=state,
                    need_weights=False,
                )[0]
            )
            if t == 2:
                module.reorder_incremental_state(state, order)
        kept, theirs = (
            module._get_input_buffer(state)
            for module, state in zip((ours, stock), states, strict=True)
        )
        assert kept.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(kept[name], theirs[name])
    torch.testing.assert_close(torch.cat(outputs[0]), torch.cat(outputs[1]))


def test_prompts_with_padding_before_them_are_decoded_as_alone(make_model):
    """Without positions, which fairseq counts from the padding on."""
    model = make_model(no_token_positional_embeddings=True).eval()
    x = torch.randint(4, 40, (2, 8))
    padded = torch.cat([torch.tensor([[PAD, PAD, PAD], [4, 5, 6]]), x], 1)

    def decode(tokens):
        state = {}
        return [
            model.decoder(tokens[:, : t + 1], incremental_state=state)[0][:, 0]
            for t in range(tokens.size(1))
        ]

    together, alone = decode(padded), decode(x[:1])
    for t in range(8):
        torch.testing.assert_close(together[3 + t][0], alone[t][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(padded)[0][0, 3:], model(x[:1])[0][0], rtol=1e-4, atol=1e-5)


def test_what_it_does_not_know_is_fairseqs_and_said_once(caplog):
    ours, stock = pair()
    attention_file._log_stock.cache_clear()
    x = torch.randn(7, 3, 16).double()
    masks = causal_mask(padding("left")) | torch.eye(7, dtype=torch.bool)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            for mask, additive in (
                (Mask.CAUSAL, future(7, torch.float64)),
                (
                    masks,
                    torch.zeros(3, 7, 7)
                    .double()
                    .masked_fill(~masks[:, 0], float("-inf"))
                    .repeat_interleave(2, 0),
                ),
            ):
                y, weights = ours(x, x, x, attn_mask=mask, need_head_weights=True)
                y_stock, weights_stock = stock(x, x, x, attn_mask=additive, need_head_weights=True)
                torch.testing.assert_close(y, y_stock)
                torch.testing.assert_close(weights, weights_stock)
    assert [r.getMessage() for r in caplog.records] == [
        "attention is computed by fairseq's own forward pass: attention weights are asked for"
    ]


# Dropout


@pytest.mark.parametrize("length", [3, BLOCK, 2 * BLOCK + 5])
def test_dropout_by_blocks_equals_dropped_weights(length):
    q, k, v = (
        torch.randn(2, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    p = 0.3
    torch.manual_seed(5)
    kept = attend_with_dropout(  # values of one-hot vectors: the weights that are left
        q, k, torch.eye(length, dtype=torch.float64).expand(2, 2, -1, -1), 0.5, p
    ).detach()
    weights = (0.5 * q @ k.transpose(2, 3) + future(length, torch.float64)).softmax(-1)
    torch.testing.assert_close(kept[kept != 0], (weights / (1 - p)).detach()[kept != 0])
    dropped = ((kept == 0) & (weights > 0)).sum() / (weights > 0).sum()
    assert abs(dropped - p) < (0.35 if length == 3 else 0.02)

    torch.manual_seed(5)
    ours = attend_with_dropout(q, k, v, 0.5, p)
    oracle = (weights * (kept != 0) / (1 - p)) @ v
    torch.testing.assert_close(ours, oracle)
    for a, b in zip(
        *(torch.autograd.grad(y.pow(2).sum(), (q, k, v)) for y in (ours, oracle)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_without_dropout_and_with_nothing_but_dropout():
    q, k, v = (torch.randn(1, 2, 70, 4, requires_grad=True) for _ in range(3))
    torch.testing.assert_close(
        attend_with_dropout(q, k, v, 0.5, 0.0),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5),
    )
    nothing = attend_with_dropout(q, k, v, 0.5, 1.0)
    assert not nothing.any()
    nothing.sum().backward()
    assert not any(x.grad.any() for x in (q, k, v))


@pytest.mark.parametrize("kind", ["none", "left"])
def test_dropout_is_that_of_training_alone(kind):
    ours, _ = pair(torch.float32, dropout=0.3)
    x = torch.randn(7, 1, 16).expand(-1, 4000, -1)
    mask = causal_mask(padding(kind)[:1].expand(4000, -1))
    drawn = ours(x, x, x, attn_mask=mask, need_weights=False)[0]
    expected = ours.eval()(x, x, x, attn_mask=mask, need_weights=False)[0]
    assert not torch.allclose(drawn[:, 0], drawn[:, 1])
    torch.testing.assert_close(expected[:, 0], expected[:, 1])
    torch.testing.assert_close(drawn.mean(1), expected[:, 0], rtol=0, atol=0.05)


def test_dropout_under_autocast_and_in_half_precision():
    q, k, v = (torch.randn(1, 2, 70, 4, requires_grad=True) for _ in range(3))
    grads = []
    for dtype, autocast in (
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = attend_with_dropout(*(x.to(dtype) for x in (q, k, v)), 0.5, 0.1)
        assert y.dtype == dtype
        grads.append(torch.autograd.grad(y.float().sum(), (q, k, v)))
    for half in grads[1:]:
        for a, b in zip(half, grads[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0.03 * b.abs().max().item())


# Whole models


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"checkpoint_activations": True},
        {"moe_layers": "1", "decoder_learned_pos": True},
        {"moe_post_norm": True, "moe_gate": "top_k"},
    ],
    ids=lambda given: next(iter(given), "plain"),
)
@pytest.mark.parametrize("kind", ["none", "right", "segments"])
def test_models_equal_those_with_stock_attention(make_model, given, kind):
    models = [make_model(moe_attention=name, **given).double() for name in ("sdpa", "stock")]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randint(4, 40, (3, 9))
    if kind == "right":
        x[padding(kind, length=9)] = PAD
    more = {"segments": (torch.arange(9) // 4).repeat(3, 1)} if kind == "segments" else {}
    courses = []
    for model in models:
        model.train().set_num_updates(20)
        y, extra = model(x, **more)
        loss = y.logsumexp(-1)[x != PAD].sum() + extra["moe_aux"]["balance"].sum()
        loss.backward()
        courses.append((y[x != PAD], *(p.grad for p in model.parameters())))
    for a, b in zip(*courses, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    if kind != "segments":
        assert models[0].decoder._future_mask.numel() == 0  # never built


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_runs_on_a_gpu_equal_those_in_fp32(dtype):
    runs = Runs((3, 4, 7, 1, 6))
    given = [torch.randn(3, 2, 7, 16, device="cuda").to(dtype).requires_grad_() for _ in "qkv"]
    wide = [x.detach().float().requires_grad_() for x in given]
    results = []
    for q, k, v in (given, wide):
        y = attend(q, k, v, runs, 0.25)
        grads = torch.autograd.grad(y.float().pow(2).sum(), (q, k, v))
        results.append([y, *grads])
    for half, full in zip(*results, strict=True):
        assert half.dtype == dtype
        largest = full.abs().max().item()
        torch.testing.assert_close(half.float(), full, rtol=0, atol=3e-2 * largest)


def varlen_by_hand(query, key, value, starts_q, starts_k, max_q, max_k, *, scale, window_size):
    """What torch documents of `varlen_attn`, which needs a GPU: [tokens, heads, width] each."""
    assert starts_q.dtype == starts_k.dtype == torch.int32 and window_size == (-1, 0)
    bounds = starts_q.tolist()
    assert bounds == starts_k.tolist() and bounds[0] == 0 and bounds[-1] == len(query) == len(key)
    assert max_q == max_k == max(end - start for start, end in itertools.pairwise(bounds))
    out = torch.zeros_like(query)
    for start, end in itertools.pairwise(bounds):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        logits = scale * q @ k.transpose(1, 2)
        weights = (logits + future(end - start, logits.dtype)).softmax(2)
        out[start:end] = (weights @ v).transpose(0, 1)
    return out


@torch.no_grad()
def test_runs_at_once_and_by_flex_attention_are_those_one_by_one(monkeypatch):
    """The call that GPUs take, up to the kernel, and a document mask of torch's flex_attention."""
    from torch.nn.attention import flex_attention as flex

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 3, 40, 8) for _ in range(3))
    runs = Runs((7, 1, 32, 40))
    wanted = attend(q, k, v, runs, 0.3)
    at_once = attention_file._attend_in_runs_at_once(q, k, v, runs, 0.3)
    torch.testing.assert_close(at_once, wanted, rtol=0, atol=1e-6)
    lengths = torch.tensor(runs.lengths)
    run_BT = torch.arange(len(lengths)).repeat_interleave(lengths).view(2, 40)

    def sees(b, h, query, key):
        return (run_BT[b, query] == run_BT[b, key]) & (query >= key)

    mask = flex.create_block_mask(sees, 2, None, 40, 40, device="cpu")
    by_flex = flex.flex_attention(q, k, v, block_mask=mask, scale=0.3)
    torch.testing.assert_close(by_flex, wanted, rtol=0, atol=1e-6)


class Shapes(TorchDispatchMode):
    """The shapes of all results of operations that have two dimensions of `length` or more."""

    def __init__(self, length):
        super().__init__()
        self.length, self.square = length, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if torch.is_tensor(result) and sum(n >= self.length for n in result.shape) > 1:
                self.square.append((str(function), tuple(result.shape)))
        return results


@pytest.mark.parametrize(
    "make_model, attention",
    [("gpt", "sdpa"), ("gpt", "stock"), ("llama", "sdpa")],
    indirect=["make_model"],
)
def test_documents_need_no_square_tensor(make_model, attention):
    """Forward and backward, of a row longer than all else is wide; fairseq's own attention does."""
    T, documents = 150, 10
    model = make_model(moe_gate="top_p", moe_document_mask=True, moe_attention=attention)
    assert max(n for p in model.parameters() for n in p.shape[1:]) < T
    tokens = torch.randint(4, 40, (1, T), generator=torch.Generator().manual_seed(4))
    tokens[:, :: T // documents] = 2
    with Shapes(T) as shapes:
        model(tokens)[0].sum().backward()
    assert bool(shapes.square) == (attention == "stock"), shapes.square[:3]
