"""The model card says what checkpoint and data folder say, and no number that they do not."""

import dataclasses
import re

import pytest

from evomoe_plugin.data.card import DataCard
from evomoe_plugin.export.folder import export

METERS = [
    (90, "loss", "AverageMeter", {"val": 5, "sum": 50.0, "count": 10, "round": 3}),
    (91, "inner_loss", "AverageMeter", {"val": 3, "sum": 30.0, "count": 10, "round": 3}),
    (100, "experts_per_token", "AverageMeter", {"val": 2, "sum": 30.0, "count": 10, "round": 3}),
    (101, "load_max", "AverageMeter", {"val": 0, "sum": float("nan"), "count": 10, "round": 3}),
    (102, "gate_entropy", "AverageMeter", {"val": None, "sum": 0, "count": 0, "round": 3}),
    (103, "wps", "TimeMeter", {"init": 1.0, "n": 3.0, "round": 0}),
]


@pytest.fixture
def card(make_trained, tmp_path):
    def make(extra=None, **given):
        trained = make_trained(20, **given)
        trained = dataclasses.replace(trained, num_updates=1234, extra_state=extra or {})
        return (export(trained, str(tmp_path / "my-moe")).path / "README.md").read_text()

    return make


def test_what_is_known(card, words):
    files = {"dict.txt": {"bytes": 1, "sha256": "0"}}
    split = {"documents": 7, "items": 7, "tokens": 4321, "bytes": 9999, "unknown_tokens": 0}
    DataCard(
        {"source": "Tales, CC0."},
        {"kind": "gpt2", "rows": 40, "lossless": True, "flags": []},
        {"train": split},
        0,
        [],
        0,
        files,
        {},
    ).save(words)
    text = card(
        {"metrics": {"valid": METERS, "train": []}},
        moe_gate="top_p",
        moe_lexical="normal:1",
    )
    header = text.split("---\n")[1]
    assert "library_name: transformers" in header and "pipeline_tag: text-generation" in header
    assert text.count("trust_remote_code=True") == 2 and "# my-moe" in text
    assert (
        "1,234 updates" in text
        and "parameters in float32, trained" in text
        and "---name" not in text
    )
    assert "| 0 | 5 of width 24 | top_p |" in text and "| 1 | one FFN | – |" in text
    assert (
        "| --moe-lexical | normal:1 |" in text and "| --arch | transformer_lm_gpttiny_moe |" in text
    )
    assert "| experts_per_token | 3 |" in text
    assert "load_max" not in text and "gate_entropy" not in text and "nan" not in text
    assert "Perplexity per token on the split `valid`, in the last validation" in text
    assert "checkpoint: 8.00.\n" in text
    assert "Tales, CC0. Tokenizer: gpt2, 40 entries." in text and "| train | 7 | 4,321 |" in text


@pytest.mark.parametrize("metrics", [None, {}, {"train": METERS}, {"valid": METERS[3:]}])
def test_what_is_unknown_is_not_made_up(card, metrics):
    text = card({} if metrics is None else {"metrics": metrics})
    assert "records no perplexity" in text and "records no statistics of routing" in text
    assert "has no data card" in text
    assert not re.search(r"[Pp]erplexity[^\n]*\d", text)
