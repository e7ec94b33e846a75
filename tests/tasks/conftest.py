"""A folder to fine-tune on: a small tokenizer, its dictionary, and examples of our own."""

import json
import types

import pytest
import sentencepiece
from fairseq.data import Dictionary

from evomoe_plugin.data.sft_examples import Encoder
from evomoe_plugin.tasks.language_modeling_sft import (
    LanguageModelingSFTConfig,
    LanguageModelingSFTTask,
)

PAIRS = [
    ("Which colour is grass?", " Green."),
    ("Count to five.", " One, two, three, four, five."),
    ("Say no.", " No."),
    ("Name a warm month.", " July is warm in the north."),
    ("Is water wet?", " Yes."),
]
CHAT = [
    ("system", "Be short."),
    ("user", "Hello."),
    ("assistant", "Hi."),
    ("user", "Is it warm?"),
    ("assistant", "No, it is cold."),
]


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def pair(prompt, response):
    return {"prompt": prompt, "response": response}


def chat(*messages):
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def write_tokenizer(folder):
    """A SentencePiece model without normalisation, and fairseq's dictionary of its pieces."""
    text = folder / "text.txt"
    words = " ".join(text for turn in (*PAIRS, CHAT[0], CHAT[1], CHAT[3]) for text in turn)
    text.write_text("\n".join([words, "User: Assistant: a b c d e f"] * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "sentencepiece"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        minloglevel=2,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
    )
    (folder / "sentencepiece.vocab").unlink()
    text.unlink()
    model = sentencepiece.SentencePieceProcessor(str(folder / "sentencepiece.model"))
    dictionary = Dictionary()
    for piece in range(model.get_piece_size()):
        if not (model.is_control(piece) or model.is_unknown(piece)):
            dictionary.add_symbol(model.id_to_piece(piece))
    dictionary.finalize(padding_factor=8)
    dictionary.save(str(folder / "dict.txt"))


@pytest.fixture(scope="session")
def sft_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    write_tokenizer(folder)
    pairs = [pair(*both) for both in PAIRS]
    (folder / "train.jsonl").write_text(lines(*pairs, chat(*CHAT)))
    (folder / "valid.jsonl").write_text(lines(*pairs[:2], chat(*CHAT)))
    return folder


@pytest.fixture
def with_file(sft_folder, tmp_path):
    """The folder with another train.jsonl."""

    def make(content):
        for name in ("dict.txt", "sentencepiece.model"):
            (tmp_path / name).write_bytes((sft_folder / name).read_bytes())
        mode = "wb" if isinstance(content, bytes) else "w"
        with open(tmp_path / "train.jsonl", mode) as stream:
            stream.write(content)
        return tmp_path

    return make


@pytest.fixture
def dictionary(sft_folder):
    return Dictionary.load(str(sft_folder / "dict.txt"))


@pytest.fixture
def encoder(sft_folder, dictionary):
    return Encoder(sft_folder, dictionary)


@pytest.fixture
def make_task(sft_folder):
    """The task with its defaults, 64 tokens a sample, and what is given."""

    def make(folder=None, **given):
        fields = {
            **vars(LanguageModelingSFTConfig()),
            "tokens_per_sample": 64,
            "data": str(folder or sft_folder),
        }
        assert given.keys() <= fields.keys()
        return LanguageModelingSFTTask.setup_task(types.SimpleNamespace(**{**fields, **given}))

    return make


@pytest.fixture
def load(make_task):
    """The data set of the train split."""

    def make(folder=None, **given):
        task = make_task(folder, **given)
        task.load_dataset("train")
        return task.dataset("train")

    return make
