"""`evomoe prepare --pairs`: what a folder for translation holds."""

import random
import re

import pytest
from fairseq.data import Dictionary, data_utils

from evomoe_plugin.cli import main
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.pair_options import PairOptions
from evomoe_plugin.data.pairs import prepare_pairs
from evomoe_plugin.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from evomoe_plugin.generation.text import TextCodec


@pytest.fixture
def files(tmp_path):
    """300 pairs, one of them without a target."""
    dice, lines = random.Random(0), []
    for n in range(300):
        words = [f"{dice.choice('äbcdé')}{dice.randrange(9)}" for _ in range(dice.randrange(2, 9))]
        lines.append(
            (" ".join(words), " ".join(word.upper() for word in reversed(words)) + f" {n}")
        )
    lines[7] = (lines[7][0], "")
    lines[8] = ("  a \t b\u00a0c ", "▁ D")
    for i, lang in enumerate(("de", "en")):
        (tmp_path / f"text.{lang}").write_text("\n".join(pair[i] for pair in lines) + "\n")
    return lines, [str(tmp_path / f"text.{lang}") for lang in ("de", "en")]


def prepared(tmp_path, files, name="out", **given):
    size = 280 if given.get("separate_vocabularies") else 300
    options = PairOptions(tuple(files), str(tmp_path / name), vocab_size=size, **given)
    return prepare_pairs(options), tmp_path / name


def read(folder, lang, model="sentencepiece.model"):
    """Sentences by split."""
    tokenizer = SentencePieceTokenizer(folder / model)
    dictionary = Dictionary.load(str(folder / f"dict.{lang}.txt"))
    ids = {token: i for i, token in enumerate(tokenizer.tokens) if token is not None}
    found = {}
    for split in ("train", "valid", "test"):
        data = data_utils.load_indexed_dataset(str(folder / f"{split}.de-en.{lang}"), dictionary)
        assert all(row[-1] == dictionary.eos() for row in data)
        found[split] = [
            tokenizer.decode([ids[dictionary[int(i)]] for i in row[:-1]]) for row in data
        ]
    return found


@pytest.mark.parametrize("separate", [False, True])
def test_the_text_is_kept_in_parallel(tmp_path, files, separate):
    lines, names = files
    card, folder = prepared(tmp_path, names, separate_vocabularies=separate)
    models = [
        f"sentencepiece.{lang}.model" if separate else "sentencepiece.model"
        for lang in ("de", "en")
    ]
    source, target = (read(folder, *of) for of in zip(("de", "en"), models, strict=True))
    wanted = {(" ".join(s.split()), " ".join(t.split())) for s, t in lines if t}
    found = [pair for split in source for pair in zip(source[split], target[split], strict=True)]
    assert len(found) == 299 and set(found) == wanted
    assert card.empty_documents == 1
    for lang, model in zip(("de", "en"), models, strict=True):
        wanted = SentencePieceTokenizer(folder / model).encode("c D 1")
        assert load_tokenizer(folder, lang).encode("c D 1") == wanted
        codec = TextCodec(folder, Dictionary.load(str(folder / f"dict.{lang}.txt")), lang=lang)
        assert codec.decode(codec.encode("c D 1")) == "c D 1" and codec.tokenizer is not None
    if separate:
        with pytest.raises(OptionError, match="has a tokenizer each of de, en"):
            load_tokenizer(folder)
    same = (folder / "dict.de.txt").read_text() == (folder / "dict.en.txt").read_text()
    assert same is not separate
    assert ("--share-all-embeddings" in (folder / "DATA_CARD.md").read_text()) is not separate
    again, _ = prepared(tmp_path, names, "again", separate_vocabularies=separate)
    assert again.files == card.files


def test_filters_are_of_the_train_split(tmp_path, files):
    _, names = files
    whole, _ = prepared(tmp_path, names, "whole")
    card, folder = prepared(tmp_path, names, max_length=12, max_length_ratio=1.5)
    kept = card.splits["train"]["documents"]
    assert 0 < kept < whole.splits["train"]["documents"]
    assert card.empty_documents == 1 + whole.splits["train"]["documents"] - kept
    assert card.splits["valid"] == whole.splits["valid"]
    sizes = []
    for lang in ("de", "en"):
        dictionary = Dictionary.load(str(folder / f"dict.{lang}.txt"))
        data = data_utils.load_indexed_dataset(str(folder / f"train.de-en.{lang}"), dictionary)
        sizes.append(data.sizes - 1)
    for a, b in zip(*sizes, strict=True):
        assert max(a, b) <= 12 and max(a, b) <= 1.5 * min(a, b)


def test_splits_of_their_own(tmp_path, files):
    lines, names = files
    card, folder = prepared(tmp_path, names, valid_pairs=tuple(names))
    assert card.splits["valid"]["documents"] == 299 and card.splits["train"]["documents"] < 299
    assert read(folder, "de")["valid"][0] == lines[0][0]


def run(*words):
    return main(["prepare", *map(str, words)])


def test_bad_input_takes_one_line(tmp_path, files, capsys):
    _, (de, en) = files
    short, out = tmp_path / "short.en", tmp_path / "out"
    short.write_text("a\nb\n")
    latin = tmp_path / "latin.en"
    latin.write_bytes(b"a\n\xff\n")
    for words, message in (
        (("--pairs", de, short), "not parallel: .*short.en has 2 lines, the other has more"),
        (("--pairs", de, latin), "latin.en: line 2 is not UTF-8"),
        (("--pairs", de, tmp_path / "none.en"), "none.en: no such file"),
        (("--pairs", de, de), "names of two languages are needed"),
        (("--pairs", de, en, "--rows", "chat"), "--rows chat: is not of --pairs: leave it out"),
        (
            ("--pairs", de, en, "--max-length-ratio", "0.5"),
            "--max-length-ratio 0.5: it is the long",
        ),
        (("--pairs", de, en, "--max-length", "1"), "--max-length 1: the filters leave nothing"),
        ((de, "--max-length", "3"), "--max-length 3: is of parallel text or GLUE: give --pairs"),
        (("--pairs", de, en, de), "INPUT .*: is not of --pairs: leave it out"),
    ):
        given = (*words, "--out", out, *(["--vocab-size", "300"] if "--pairs" in words else []))
        assert run(*given) == 2, words
        printed = capsys.readouterr().err
        assert re.search(message, printed), printed
        assert not out.exists()


def test_the_same_again_is_kept_and_other_options_are_refused(tmp_path, files, capsys):
    _, names = files
    words = ("--pairs", *names, "--vocab-size", "300", "--out", tmp_path / "out")
    assert run(*words) == 0
    assert "--task translation --source-lang de --target-lang en" in capsys.readouterr().out
    before = (tmp_path / "out/train.de-en.de.bin").stat().st_mtime_ns
    assert run(*words) == 0
    assert (tmp_path / "out/train.de-en.de.bin").stat().st_mtime_ns == before
    assert run(*words, "--max-length", "12") == 2
    assert "--max-length was None, and is now 12" in capsys.readouterr().err
    (tmp_path / "out/train.de-en.de.bin").write_bytes(b"")
    assert run(*words) == 2
    assert "its train.de-en.de.bin does not match the data card" in capsys.readouterr().err
    assert run(*words, "--max-length", "12", "--overwrite") == 0
