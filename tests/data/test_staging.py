"""Staging: limits, shards, and that neither text nor characters are lost on the way."""

import json
import random
import tracemalloc

import pytest

from evomoe_plugin.data import staging, train_sentencepiece
from evomoe_plugin.data.sources import find_sources
from evomoe_plugin.data.staging import read_passages, shard_prefixes, stage
from tests.data.texts import ODD, options_for


@pytest.fixture
def work(tmp_path):
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.fixture
def held_out(tmp_path):
    """Options that give the held-out splits, so that all of the inputs is for training."""
    paths = {}
    for split in ("valid", "test"):
        (tmp_path / f"held-{split}.txt").write_text(split)
        paths[split] = (str(tmp_path / f"held-{split}.txt"),)
    return paths


def staged_text(work, options):
    """The counts, and the documents of the train split."""
    staged = stage(find_sources(options), options, work, lambda n: None)
    documents, parts = [], []
    for shard in shard_prefixes(work, "train", staged):
        for text, ends_document, _ in read_passages(shard):
            parts.append(text)
            if ends_document:
                documents.append("".join(parts))
                parts = []
    assert not parts
    return staged, documents


@pytest.mark.parametrize("limit", [24, 500, 2400, 2401, 7000, 9600, 20000])
def test_max_bytes_keeps_whole_lines(tmp_path, work, held_out, limit):
    lines = [f"line {number:04d} of this text" for number in range(400)]  # 22 bytes each
    for name in range(4):
        text = "\n".join(lines[name * 100 : (name + 1) * 100])
        (tmp_path / f"{name}.txt").write_text(text)
    options = options_for(
        tmp_path,
        *(tmp_path / f"{n}.txt" for n in range(4)),
        **held_out,
        max_bytes=limit,
        documents_by="line",
    )
    staged, documents = staged_text(work, options)
    whole = min(limit // 22, 400)
    assert documents[:whole] == lines[:whole]
    assert staged.splits["train"].bytes == min(limit, 400 * 22)
    read = [i["name"] for i in staged.inputs if i["split"] is None]
    assert read == [f"{n}.txt" for n in range(4)][: len(read)]
    assert len(read) + staged.files_not_read == 4
    assert len(read) == min(4, -(-limit // 2200))


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (1, ["o"]),
        (3, ["one"]),
        (4, ["one", "t"]),
        (12, ["one", "two\n"]),
        (13, ["one", "two\nthré\n"]),
        (100, ["one", "two\nthré\nfour", "five"]),
    ],
)
def test_max_bytes_cuts_a_document_after_a_line(tmp_path, work, held_out, limit, kept):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "one"}\n{"text": ""}\n{"text": "two\\nthré\\nfour"}\n{"text": "five"}\n',
        encoding="utf-8",
    )
    options = options_for(tmp_path, tmp_path / "a.jsonl", **held_out, max_bytes=limit)
    assert staged_text(work, options)[1] == kept


def test_max_bytes_does_not_touch_given_splits(tmp_path, work, held_out):
    (tmp_path / "a.txt").write_text("abcdef")
    options = options_for(tmp_path, tmp_path / "a.txt", **held_out, max_bytes=2)
    staged, documents = staged_text(work, options)
    assert documents == ["ab"]
    assert [staged.splits[split].bytes for split in ("train", "valid", "test")] == [2, 5, 4]


def test_shards_are_ascii_and_divide_between_passages(tmp_path, work, held_out, monkeypatch):
    monkeypatch.setattr(staging, "SHARD_BYTES", 300)
    monkeypatch.setattr("evomoe_plugin.data.documents.PASSAGE_CHARS", 100)
    for number in range(9):
        (tmp_path / f"{number}.txt").write_text(f"{number} {ODD}" * 3, newline="")
    options = options_for(tmp_path, *(tmp_path / f"{n}.txt" for n in range(9)), **held_out)
    staged, documents = staged_text(work, options)
    assert documents == [f"{number} {ODD}" * 3 for number in range(9)]
    files = sorted(work.glob("train-*"))
    assert len(files) == staged.splits["train"].shards > 9
    for file in files:
        assert file.read_bytes().isascii()
        assert len(file.read_bytes()) < 300 + 700


def test_a_document_of_24_mb_is_staged_in_less_than_20(tmp_path, work, held_out):
    (tmp_path / "large.txt").write_text("some words of text, é\n" * 1_000_000)
    options = options_for(tmp_path, tmp_path / "large.txt", **held_out)
    sources = find_sources(options)
    tracemalloc.start()
    staged = stage(sources, options, work, lambda n: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert staged.splits["train"].bytes == 23_000_000
    assert (staged.splits["train"].documents, staged.splits["train"].passages) == (1, 21)


def sample(tmp_path, texts, share):
    """The lines drawn from a shard of passages."""
    lines = [json.dumps([text, True]) + "\n" for text in texts]
    staging.passages_path(tmp_path / "shard").write_text("".join(lines))
    return list(train_sentencepiece._sample([tmp_path / "shard"], share, random.Random(5)))


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5])
def test_the_tokenizer_sees_a_sample_of_the_lines(tmp_path, monkeypatch, share):
    monkeypatch.setattr(train_sentencepiece, "MAX_LINE_CHARS", 30)
    texts = ["\n".join(f"{n} {line} " * 9 for line in range(20)) for n in range(500)]
    every, drawn = sample(tmp_path, texts, 1.0), sample(tmp_path, texts, share)
    assert "".join(every) == "".join(texts).replace("\n", "")
    assert drawn == sample(tmp_path, texts, share)
    assert all(len(line) <= 30 for line in drawn)
    assert 0.7 * share < len(drawn) / len(every) < 1.3 * share
    assert len({line.split()[0] for line in drawn}) > 50


def test_the_tokenizer_sees_no_whitespace_but_spaces(tmp_path):
    lines = sample(tmp_path, [ODD], 1.0)
    assert lines[:3] == ["def f(x):", "if x:", "        return  x  "]
    assert not any((c.isspace() and c != " ") or c in "\u2581\u2585\0" for c in "".join(lines))
