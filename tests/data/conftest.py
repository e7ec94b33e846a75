"""Folders of small texts, and what is prepared from them."""

import io
import json

import pytest

from evomoe_plugin.data import load_tokenizer, prepare
from evomoe_plugin.data.progress import Progress
from tests.data.texts import ODD, options_for, words


@pytest.fixture
def log():
    return io.StringIO()


@pytest.fixture
def quiet(log):
    """Progress into `log`, as into a pipe."""
    return Progress(log)


@pytest.fixture
def folder(tmp_path):
    """A folder of 25 text files, one of them odd."""
    path = tmp_path / "text"
    path.mkdir()
    for number in range(24):
        (path / f"{number:02d}.txt").write_text(words(number), newline="")
    (path / "odd.txt").write_text(ODD, newline="")
    return path


@pytest.fixture
def make(folder, tmp_path, quiet):
    """Prepare `folder` with small settings and what is given."""

    def run(*inputs, **given):
        return prepare(options_for(tmp_path, *(inputs or (folder,)), **given), quiet)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder prepared once, from text with most ASCII characters."""
    path = tmp_path_factory.mktemp("trained")
    text = path / "text.txt"
    text.write_text("\n\n".join(words(n) + "".join(map(chr, range(32, 127))) for n in range(30)))
    prepare(options_for(path, text, documents_by="blank-line"), Progress(io.StringIO()))
    return path / "out"


@pytest.fixture(scope="session")
def tokenizer(trained):
    return load_tokenizer(trained)


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory):
    """encoder.json and vocab.bpe in GPT-2's format: the bytes and three merges."""
    from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode

    path = tmp_path_factory.mktemp("gpt2")
    merges = [("a", "b"), ("Ġ", "a"), ("ab", "c")]
    tokens = [*bytes_to_unicode().values(), *map("".join, merges), "<|endoftext|>"]
    encoder, bpe = path / "encoder.json", path / "vocab.bpe"
    encoder.write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    bpe.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return str(encoder), str(bpe)
