"""The loop of fairseq-eval-lm: its sums against the formula, and what it refuses to print."""

import importlib.util
import math
import re

import pytest
import torch
from fairseq.data import Dictionary
from fairseq_cli import eval_lm as upstream
from torch import nn

from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.evaluation.eval_lm import eval_lm, install_in

PAD = 1
DIGITS = re.compile(r"(?<=\.\d{4})\d+")  # beyond fp32
WORDS = ["so@@", "me", "b@@", "i@@", "gger", "one"]  # token ids 4 to 9


class Bigrams(nn.Module):
    """The probability of a token is a function of the one before."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.logits = nn.Parameter(torch.randn(10, 10, generator=generator))

    def forward(self, src_tokens, src_lengths=None):
        return self.logits[src_tokens], {}

    def get_normalized_probs(self, output, log_probs, sample=None):
        return output[0].log_softmax(-1) if log_probs else output[0].softmax(-1)


@pytest.fixture
def dictionary():
    dictionary = Dictionary()
    for word in WORDS:
        dictionary.add_symbol(word)
    return dictionary


def batch(first, *rows):
    """A batch of samples, numbered from `first`."""
    tokens = [torch.tensor(row) for row in rows]
    sources = [torch.cat([torch.tensor([2]), row[:-1]]) for row in tokens]

    def padded(rows):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    return {
        "id": torch.arange(first, first + len(rows)),
        "ntokens": sum(map(len, rows)),
        "net_input": {"src_tokens": padded(sources), "src_lengths": None},
        "target": padded(tokens),
    }


BATCHES = [batch(0, [4, 5, 9, 2], [6, 7, 8]), {}, batch(2, [9, 9, 4])]
ROWS = [[4, 5, 9, 2], [6, 7, 8], [9, 9, 4]]


def log_probs(model):
    """Of every token of `ROWS`, in order."""
    table = model.logits.detach().double().log_softmax(-1)
    return [
        float(table[before, token])
        for row in ROWS
        for before, token in zip([2, *row], row, strict=False)
    ]


def test_mean_over_tokens(dictionary):
    model = Bigrams()
    scores = log_probs(model)
    found = eval_lm([model], dictionary, BATCHES)
    bits = -sum(scores) / len(scores) / math.log(2)
    assert found["loss"].item() == pytest.approx(bits, rel=1e-6)
    assert found["perplexity"].item() == pytest.approx(2**bits, rel=1e-6)


def test_mean_over_words(dictionary):
    """Words: some one </s> | bigger | one one so@@."""
    model = Bigrams()
    found = eval_lm([model], dictionary, BATCHES, post_process="subword_nmt")
    bits = -sum(log_probs(model)) / (3 + 1 + 3) / math.log(2)
    assert found["loss"].item() == pytest.approx(bits, rel=1e-6)


def test_as_upstream_where_that_is_right(dictionary, caplog):
    """Numbers, words and their statistics."""
    caplog.set_level("INFO")
    original = importlib.util.spec_from_file_location("original", upstream.__file__)
    unchanged = importlib.util.module_from_spec(original)
    original.loader.exec_module(unchanged)
    for options in (
        {},
        {"post_process": "@@ ", "output_word_probs": True, "output_word_stats": True},
    ):
        model, logs, losses = Bigrams(), [], []
        for loop in (unchanged.eval_lm, eval_lm):
            caplog.clear()
            losses.append(float(loop([model], dictionary, BATCHES[:2], **options)["loss"]))
            logs.append([DIGITS.sub("", m) for m in caplog.messages if "Evaluated" not in m])
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        assert logs[0] == logs[1] and bool(logs[0]) == bool(options)


def test_the_first_token_is_not_scored(dictionary):
    model = Bigrams()
    scores = [s for n, s in enumerate(log_probs(model)) if n not in (0, 4, 7)]
    found = eval_lm([model], dictionary, BATCHES, remove_bos_token=True)
    bits = -sum(scores) / len(scores) / math.log(2)
    assert found["loss"].item() == pytest.approx(bits, rel=1e-6)


def test_small_terms_are_not_lost(dictionary):
    """Upstream adds in fp32, where a sum of 10^8 swallows whatever is smaller than 4."""
    model = Bigrams()
    with torch.no_grad():
        model.logits[2, 4] = 1e8
    found = eval_lm([model], dictionary, [batch(0, [5]), *[batch(1, [4, 9])] * 20])
    table = model.logits.detach().log_softmax(-1).double()
    total = table[2, 5] + 20 * (table[2, 4] + table[4, 9])
    assert found["loss"].item() == pytest.approx(-total.item() / 41 / math.log(2), rel=1e-10)


@pytest.mark.parametrize("batches", [[], [{}]])
def test_nothing_to_evaluate(dictionary, batches):
    with pytest.raises(RunFailed, match="there is no token to evaluate"):
        eval_lm([Bigrams()], dictionary, batches)


@pytest.mark.parametrize("logit", [math.nan, -math.inf])
def test_a_probability_of_zero_or_nan(dictionary, logit):
    model = Bigrams()
    with torch.no_grad():
        model.logits[7, 8] = logit
    with pytest.raises(RunFailed, match="sample 1: the model gives a token the probability 0"):
        eval_lm([model], dictionary, BATCHES)


def test_other_subwords_are_refused(dictionary):
    with pytest.raises(OptionError, match="--post-process sentencepiece: give @@ or"):
        eval_lm([Bigrams()], dictionary, BATCHES, post_process="sentencepiece")


def test_the_command_uses_it(monkeypatch):
    monkeypatch.setattr(upstream, "eval_lm", None)
    install_in(upstream.main)
    assert upstream.eval_lm is eval_lm
