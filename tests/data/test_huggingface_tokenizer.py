"""Tokenizers of Hugging Face: the ids are their own, in data, dictionary and embedding."""

import importlib
import json
import random

import pytest
import tokenizers
from fairseq.data import Dictionary, data_utils
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import OmegaConf

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data import load_tokenizer, prepare
from evomoe_plugin.data.dictionary import TokenizerDictionary, dictionary_ids, load_dictionary
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_files
from tests.data.test_bad_input import refuse
from tests.data.texts import options_for
from tests.data.tiny_tokenizers import KINDS, TEXTS, llama2, save

# bos, eos, unk and pad: the tokenizer's token, or the number of ids after its own.
SPECIAL = {
    "gpt2": ("<|endoftext|>", "<|endoftext|>", 0, 1),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", 0, 1),
    "llama2": ("<s>", "</s>", "<unk>", 0),
    "unigram": (0, "</s>", "<unk>", "<pad>"),
    "wordpiece": (0, 1, "[UNK]", 2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: save(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def transformers():
    return importlib.import_module("transformers")


def load(folder):
    return HuggingFaceTokenizer(tokenizer_files(str(folder)))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(folders, transformers, kind):
    ours, theirs = load(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    for text in [*TEXTS, "\n".join(TEXTS)]:
        ids = ours.encode(text)
        alone = {"add_special_tokens": False}
        assert ids == theirs(text, split_special_tokens=True, **alone)["input_ids"]
        assert ours.encode_parts([text], special=True) == [theirs(text, **alone)["input_ids"]]
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        if kind not in ("wordpiece",):  # ends a text, too
            start = [] if ours.start is None else [ours.start]
            assert start + ours.encode("a b") == theirs("a b")["input_ids"]
    vocabulary = theirs.get_vocab().values()
    assert len(ours.tokens) == max(vocabulary) + 1
    assert [i for i in vocabulary if ours.tokens[i] != str(i)] in ([], [ours.special["unk"].id])


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_its_own_or_follow_them(folders, kind):
    tokenizer = load(folders[kind])
    library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    wanted = [
        len(tokenizer.tokens) + token if isinstance(token, int) else library.token_to_id(token)
        for token in SPECIAL[kind]
    ]
    assert [tokenizer.special[name].id for name in ("bos", "eos", "unk", "pad")] == wanted


def test_what_a_configuration_says_of_special_tokens(tmp_path):
    folder = save(tmp_path / "a", "llama2", pad_token={"content": "</s>"}, add_bos_token=False)
    tokenizer = load(folder)
    assert tokenizer.special["pad"] == (len(tokenizer.tokens), "<pad>")  # not the id of eos
    assert tokenizer.start is None
    # Without a configuration, tokens of fairseq's names are meant.
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load(folder)
    assert [token.id for token in tokenizer.special.values()][:3] == [1, 2, 0]
    assert tokenizer.start == 1
    words = {"eos_token": "<0x0A>", "pad_token": "[PAD]"}
    (folder / "special_tokens_map.json").write_text(json.dumps(words))
    tokenizer = load(folder)
    assert tokenizer.special["eos"].word == "<0x0A>" in tokenizer.control_tokens
    assert tokenizer.special["pad"] == (len(tokenizer.tokens), "[PAD]")


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_text_have_its_ids(folders, kind):
    tokenizer, draw = load(folders[kind]), random.Random(1)
    for text in TEXTS:
        cuts = sorted(draw.choices(range(len(text) + 1), k=3))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        for special in (False, True):
            [whole] = tokenizer.encode_parts([text], special)
            found = tokenizer.encode_parts(parts, special)
            assert [i for part in found for i in part] == whole
    texts = ["The quick brown", " fox jumps", " over, "]
    found = [tokenizer.decode(part) for part in tokenizer.encode_parts(texts)]
    assert [text.lower().strip() for text in found[:2]] == ["the quick brown", "fox jumps"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for number in range(12):
        content = "\n".join([f"{number}", *TEXTS[number:], *TEXTS[:number]])
        (folder / f"{number:02d}.txt").write_text(content, newline="")
    return folder


def documents(folder, split, eos):
    """The ids of each document, without its end."""
    data = data_utils.load_indexed_dataset(f"{folder}/{split}", None, "mmap")
    found, ids = [], []
    for token in (token for item in data for token in item.tolist()):
        if token == eos:
            found.append(ids)
            ids = []
        else:
            ids.append(token)
    assert not ids
    return found


@pytest.mark.parametrize("passage", [60, 1 << 20])
@pytest.mark.parametrize("kind", ["gpt2", "llama2", "wordpiece"])
def test_prepared_data_has_the_ids(folders, texts, tmp_path, quiet, monkeypatch, kind, passage):
    monkeypatch.setattr("evomoe_plugin.data.documents.PASSAGE_CHARS", passage)
    monkeypatch.setattr("evomoe_plugin.data.staging.SHARD_BYTES", 2000)
    card = prepare(options_for(tmp_path, texts, tokenizer=str(folders[kind])), quiet)
    out, tokenizer = tmp_path / "out", load(folders[kind])
    copied = {path.name: path.read_bytes() for path in folders[kind].iterdir()}
    assert {name: (out / name).read_bytes() for name in copied} == copied
    task = LanguageModelingTask.setup_task(
        LanguageModelingConfig(
            data=str(out),
            sample_break_mode="none",
            tokens_per_sample=32,
            dataset_impl=None,
            use_plasma_view=False,
            seed=1,
        )
    )
    task.load_dataset("train")
    dictionary = task.dictionary
    ids = {name: getattr(dictionary, name)() for name in ("bos", "eos", "unk", "pad")}
    assert ids == {name: token.id for name, token in tokenizer.special.items()}
    assert ids == card.tokenizer["special"]
    assert len(dictionary) == card.tokenizer["rows"] == -(-(max(ids.values()) + 1) // 8) * 8 or (
        len(dictionary) % 8 == 0
    )
    found = [d for split in ("train", "valid", "test") for d in documents(out, split, ids["eos"])]
    start = [] if tokenizer.start is None else [tokenizer.start]
    assert all(document[: len(start)] == start for document in found)
    if passage > 60:
        wanted = [start + tokenizer.encode(path.read_bytes().decode()) for path in texts.iterdir()]
        assert sorted(found) == sorted(wanted)
    assert sum(dictionary.count) == card.splits["train"]["tokens"]
    assert dictionary.count[ids["eos"]] == card.splits["train"]["documents"]


def test_dictionary_keeps_ids_through_its_file(folders, tmp_path):
    tokenizer = load(folders["llama2"])
    size = len(tokenizer.tokens)
    made = TokenizerDictionary.of(tokenizer, [*range(size), 7], rows=None)
    made.save(str(tmp_path / "dict.txt"))
    loaded = load_dictionary("data", tmp_path / "dict.txt")
    assert isinstance(loaded, TokenizerDictionary)
    assert (loaded.symbols, loaded.count) == (made.symbols, made.count)
    assert loaded.symbols[:size] == [str(i) for i in range(size)]
    assert loaded.symbols[size] == "<pad>" and len(loaded) % 8 == 0
    assert (loaded.bos(), loaded.eos(), loaded.unk(), loaded.pad()) == (1, 2, 0, size)
    assert loaded.count[2] == 2 + 7
    assert dictionary_ids(tokenizer, loaded).tolist() == list(range(size))
    with pytest.raises(ValueError, match="expected '<token> <cnt> .*read with --user-dir evomoe"):
        Dictionary.load(str(tmp_path / "dict.txt"))  # fairseq alone says what is missing


def test_rows_are_those_of_the_models_embedding(folders, tmp_path):
    tokenizer = load(folders["llama2"])
    size = len(tokenizer.tokens)
    counts = [0] * (size + 1)
    # Room for padding, or none.
    assert len(TokenizerDictionary.of(tokenizer, counts, rows=size + 13)) == size + 13
    assert len(TokenizerDictionary.of(tokenizer, counts, rows=size)) == (size // 8 + 1) * 8


@pytest.fixture
def given(tmp_path):
    """A folder of a Llama-2 tokenizer to spoil, outside of where output would be seen."""
    return save(tmp_path / "given", "llama2")


def slow(folder):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")


def without_one(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def spoilt(content, name="tokenizer.json"):
    def spoil(folder):
        (folder / name).write_bytes(content)

    return spoil


def changed(change):
    def spoil(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


BAD = {
    "slow": (slow, "has no tokenizer.json, only tokenizer.model of a slow tokenizer: convert it"),
    "nothing": (without_one, "has no tokenizer.json: give the folder of a model of Hugging Face"),
    "empty": (spoilt(b""), "tokenizer.json: is damaged, or no tokenizer.json: EOF while"),
    "cut off": (
        lambda folder: spoilt((folder / "tokenizer.json").read_bytes()[:900])(folder),
        "is damaged, or no tokenizer.json: EOF while parsing",
    ),
    "bytes": (spoilt(b"{\xff}"), r"tokenizer.json: is not UTF-8 \(byte 2\)"),
    "another kind": (spoilt(b'{"model": {"type": "Foo"}}'), "is damaged, or no tokenizer.json"),
    "no tokens": (
        changed(lambda t: t["model"].update(vocab={}, merges=[]) or t.update(added_tokens=[])),
        "is damaged, or no tokenizer.json|has no tokens",
    ),
    "huge id": (
        changed(lambda t: t["model"]["vocab"].update(zz=4_000_000_000)),
        "has the token id 4000000000: give a tokenizer with ids below 4194304",
    ),
    "no unknown": (
        changed(
            lambda t: t.update(
                model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "?"}, added_tokens=[]
            )
        ),
        "cannot encode a text: WordLevel error: Missing .UNK.",
    ),
    "configuration": (
        spoilt(b"[1]", "tokenizer_config.json"),
        "tokenizer_config.json: is JSON, but no object",
    ),
    "special tokens": (spoilt(b"{", "special_tokens_map.json"), "special_tokens_map.json: is not"),
    "small model": (
        spoilt(b'{"vocab_size": 300}', "config.json"),
        r"has \d+ token ids, but the embedding of the model next to it has 300 rows",
    ),
    "small inner model": (
        spoilt(b'{"text_config": {"vocab_size": 7}}', "config.json"),
        "has 7 rows .vocab_size of config.json.: give the tokenizer of this model",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tokenizers(tmp_path, folder, quiet, given, case):
    spoil, message = BAD[case]
    spoil(given)
    refuse(tmp_path, quiet, message, folder, tokenizer=str(given))


def test_a_gigantic_file(tmp_path, folder, quiet, given):
    with open(given / "tokenizer.json", "r+b") as file:
        file.truncate(1 << 30)
    refuse(
        tmp_path, quiet, "has 1,024 MiB: give a file of at most 256", folder, tokenizer=str(given)
    )


def test_paths(tmp_path, folder, quiet, given):
    refuse(tmp_path, quiet, "--tokenizer no: no such file or folder", folder, tokenizer="no")
    (given / "tokenizer.model").touch()
    path = str(given / "tokenizer.model")
    refuse(tmp_path, quiet, "is of a slow tokenizer: convert it with", folder, tokenizer=path)
    both = {"tokenizer": str(given), "sentencepiece_model": "m"}
    refuse(tmp_path, quiet, "--sentencepiece-model m: or --tokenizer, not both", folder, **both)
    files = tokenizer_files(str(given))
    assert tokenizer_files(str(given / "tokenizer.json")) == files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}


def test_a_data_set_of_another_tokenizer(tmp_path, folder, quiet, given):
    prepare(options_for(tmp_path, folder, tokenizer=str(given)), quiet)
    with pytest.raises(OptionError, match="contains a data set with other inputs or options .--t"):
        other = save(tmp_path / "other", "gpt2")
        prepare(options_for(tmp_path, folder, tokenizer=str(other)), quiet)
    dictionary = load_dictionary("data", tmp_path / "out" / "dict.txt")
    with pytest.raises(ValueError, match="has other special tokens than the tokenizer next to it"):
        dictionary_ids(load(other), dictionary)
    tokenizer, names = llama2()
    tokenizer.add_tokens([f"new{n}" for n in range(20)])
    tokenizer.save(str(tmp_path / "out" / "tokenizer.json"))
    larger = load_tokenizer(tmp_path / "out")
    larger.special = dictionary.special
    with pytest.raises(ValueError, match=r"has 4\d\d entries, where the tokenizer next to it has"):
        dictionary_ids(larger, dictionary)


@pytest.mark.parametrize(
    "first, reason",
    [
        ("[1]", "list indices"),
        ("{}", "'bos'"),
        ('{"bos":[1,"a"],"eos":[999,"b"],"unk":[0,"c"],"pad":[2,"d"]}', "names ids that"),
    ],
)
def test_a_damaged_first_line(tmp_path, first, reason):
    path = tmp_path / "dict.txt"
    header = "#token-ids-of-tokenizer.json, read with --user-dir evomoe_plugin"
    path.write_text(f"{header} {first}\n0 1\n1 1\n2 1\n")
    with pytest.raises(OptionError, match=f"is not a fairseq dictionary: .*{reason}"):
        load_dictionary("data", path)


def test_stock_commands_encode_and_decode_with_it(folders):
    from fairseq.data.encoders import build_bpe

    from evomoe_plugin.data.tokenizer_encoder import TokenizerJson

    path = str(folders["gpt2"] / "tokenizer.json")
    config = OmegaConf.create({"_name": "tokenizer_json", "tokenizer_json": path})
    encoder, tokenizer = build_bpe(config), load(folders["gpt2"])
    assert isinstance(encoder, TokenizerJson)
    for text in TEXTS:
        words = encoder.encode(text)
        assert words.split() == [str(i) for i in tokenizer.encode(text)]
        assert encoder.decode(f"{words} <pad>") == text
    assert encoder.is_beginning_of_word(encoder.encode(" dog").split()[0])
