"""`prepare` end to end: what comes out, and that nothing but text and options decides it."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from evomoe_plugin.data import staging
from evomoe_plugin.data.card import CARD, CARD_TEXT, DataCard
from tests.data.texts import PreparedText

SPLITS = ("train", "valid", "test")


def texts_of(folder):
    return {path.name: path.read_bytes().decode() for path in folder.iterdir()}


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("passage", [50, 1 << 20])
def test_every_document_comes_back_exactly(make, folder, tmp_path, monkeypatch, passage):
    monkeypatch.setattr("evomoe_plugin.data.documents.PASSAGE_CHARS", passage)
    card = make(valid_fraction=0.2, test_fraction=0.2)
    prepared = PreparedText(tmp_path / "out")
    found = {split: prepared.documents(split) for split in SPLITS}
    assert Counter(sum(found.values(), [])) == Counter(texts_of(folder).values())
    assert len(prepared.dictionary) == 400 == card.tokenizer["rows"]
    for split in SPLITS:
        counts, tokens = card.splits[split], np.concatenate(list(prepared.items(split)))
        ends = (tokens == prepared.dictionary.eos()).sum()
        assert counts["documents"] == len(found[split]) == ends
        assert counts["tokens"] == len(tokens) == prepared.items(split).sizes.sum()
        assert counts["items"] == len(prepared.items(split))
        assert counts["bytes"] == sum(len(text.encode()) for text in found[split])
        assert counts["unknown_tokens"] == 0 == (tokens == prepared.dictionary.unk()).sum()


def test_the_dictionary_is_ordered_by_frequency_in_training(make, tmp_path):
    make()
    prepared = PreparedText(tmp_path / "out")
    counts = np.bincount(np.concatenate(list(prepared.items("train"))), minlength=400)
    tokens = prepared.dictionary.symbols[4:]
    assert prepared.dictionary.count[4:] == counts[4:].tolist()
    order = sorted(zip(-counts[4:], tokens, strict=True))
    assert tokens == [token for _, token in order]


def test_the_language_modeling_task_reads_it(make, tmp_path):
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    card = make()
    task = LanguageModelingTask.setup_task(
        LanguageModelingConfig(
            data=str(tmp_path / "out"),
            sample_break_mode="none",
            tokens_per_sample=32,
            dataset_impl=None,
            use_plasma_view=False,
            seed=1,
        )
    )
    for split in SPLITS:
        task.load_dataset(split)
        assert task.datasets[split].sizes.sum() == card.splits[split]["tokens"]


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "gpt2"])
def test_workers_and_shards_change_nothing(make, tmp_path, monkeypatch, tokenizer, gpt2_files):
    given = {"gpt2_bpe": gpt2_files} if tokenizer == "gpt2" else {}
    make(out=str(tmp_path / "one"), **given)
    monkeypatch.setattr(staging, "SHARD_BYTES", 3000)
    make(out=str(tmp_path / "two"), workers=2, **given)
    make(out=str(tmp_path / "three"), workers=3, **given)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_splits_follow_the_text_wherever_it_stands(make, tmp_path, folder):
    """The same documents as files, rows of JSON and of Parquet are divided alike."""
    texts = [text for _, text in sorted(texts_of(folder).items())]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    found = []
    for name in ("text", "a.jsonl", "a.parquet"):
        make(tmp_path / name, out=str(tmp_path / f"out-{name}"))
        prepared = PreparedText(tmp_path / f"out-{name}")
        found.append([prepared.documents(split) for split in SPLITS])
    assert found[0] == found[1] == found[2]


def test_equal_documents_never_fall_apart(make, folder, tmp_path):
    for path in sorted(folder.iterdir()):
        (folder / f"copy-{path.name}").write_bytes(path.read_bytes())
    make(valid_fraction=0.3, test_fraction=0.3)
    sets = [set(PreparedText(tmp_path / "out").documents(split)) for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 25


@pytest.mark.parametrize("count", [3, 4, 10])
def test_few_documents_fill_every_split(make, tmp_path, count):
    few = tmp_path / "few"
    few.mkdir()
    for number in range(count):
        (few / f"{number}.txt").write_text(f"document {number} of a few " * 20)
    card = make(few, vocab_size=300)
    assert [card.splits[split]["documents"] for split in SPLITS] == [count - 2, 1, 1]
    assert sum(len(PreparedText(tmp_path / "out").documents(split)) for split in SPLITS) == count


def test_given_splits(make, folder, tmp_path):
    """Files named by --valid and --test are those splits, though they stand in an INPUT too."""
    (folder / "held.txt").write_text("held out " * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "a test"}\n')
    card = make(valid=(str(folder / "held.txt"),), test=(str(tmp_path / "b.jsonl"),))
    prepared = PreparedText(tmp_path / "out")
    assert prepared.documents("valid") == ["held out " * 9]
    assert prepared.documents("test") == ["a test"]
    assert card.splits["train"]["documents"] == 25
    assert {i["name"]: i["split"] for i in card.inputs if i["split"]} == {
        "held.txt": "valid",
        "b.jsonl": "test",
    }


def test_gpt2_bpe(make, folder, tmp_path, gpt2_files, caplog):
    card = make(gpt2_bpe=gpt2_files)
    prepared = PreparedText(tmp_path / "out")
    assert Counter(sum((prepared.documents(s) for s in SPLITS), [])) == Counter(
        texts_of(folder).values()
    )
    assert card.tokenizer["flags"][:2] == ["--bpe", "gpt2"]
    assert len(prepared.dictionary) % 8 == 0
    assert {str(number) for number in range(260)} <= set(prepared.dictionary.symbols)
    assert "not the published files of GPT-2" in caplog.text


def test_a_given_sentencepiece_model(make, trained, tmp_path):
    model = trained / "sentencepiece.model"
    make(sentencepiece_model=str(model))
    assert (tmp_path / "out" / "sentencepiece.model").read_bytes() == model.read_bytes()
    assert PreparedText(tmp_path / "out").tokenizer.lossless


def test_unknown_tokens_are_counted_and_reported(make, tmp_path, log):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g h"] * 9),
        model_prefix=str(tmp_path / "m"),
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    (tmp_path / "a.txt").write_text("a b\nc Ω d\ne f\n")
    card = make(
        tmp_path / "a.txt", sentencepiece_model=str(tmp_path / "m.model"), documents_by="line"
    )
    assert sum(card.splits[split]["unknown_tokens"] for split in SPLITS) == 1
    assert "warning: 1 tokens are unknown" in log.getvalue()


def test_the_card_records_everything(make, folder, tmp_path):
    (folder / "empty.txt").write_text(" \n")
    card = make(source="Made up. Public domain.")
    out = tmp_path / "out"
    assert DataCard.load(out) == card
    assert card.damage(out) is None
    assert card.empty_documents == 1
    assert len(card.inputs) == 26 and card.inputs[0]["name"] == "text/00.txt"
    assert set(card.files) | {CARD, CARD_TEXT} == set(os.listdir(out))
    text = (out / CARD_TEXT).read_text()
    for part in (
        "Made up. Public domain.",
        "--sentencepiece-model DATA/sentencepiece.model",
        f"{card.splits['train']['tokens']:,}",
        card.files["train.bin"]["sha256"],
        "Decoding restores the text exactly.",
    ):
        assert part in text
    assert str(tmp_path) not in (out / CARD).read_text()


def test_log_lines_in_a_pipe(make, log):
    make()
    lines = log.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["read", "tokenizer", "binarise"]
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()
    assert all(len(line) < 120 for line in lines)
