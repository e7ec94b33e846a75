"""Tokenizers: any text comes back exactly, and fairseq's own encoders agree."""

import io
from types import SimpleNamespace

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.tokenizers import SPACE, GPT2Tokenizer, SentencePieceTokenizer
from tests.data.texts import ODD, words

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    f" \n\t\r\0ab{SPACE}\u2585\u3000\u2028é<0xA>", max_size=40
)
ANY = settings(max_examples=300, deadline=None)


@pytest.fixture(scope="session")
def gpt2(gpt2_files):
    return GPT2Tokenizer(*gpt2_files)


@ANY
@given(text=ANY_TEXT)
def test_sentencepiece_is_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(tokenizer.tokens[i] is not None for i in ids)


def test_odd_text(tokenizer, gpt2):
    assert tokenizer.lossless and gpt2.lossless
    for each in (tokenizer, gpt2):
        assert each.decode(each.encode(ODD)) == ODD


@ANY
@given(text=ANY_TEXT)
def test_gpt2_is_exact(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


@ANY
@given(text=ANY_TEXT, cut=st.integers(0, 50))
def test_text_divided_anywhere_comes_back(tokenizer, gpt2, text, cut):
    for each in (tokenizer, gpt2):
        assert each.decode(each.encode(text[:cut]) + each.encode(text[cut:])) == text


@ANY
@given(text=st.text(" \n\tabcdefghé", max_size=60))
def test_lines_encoded_apart_are_as_encoded_together(trained, tokenizer, text):
    whole = sentencepiece.SentencePieceProcessor(model_file=str(trained / "sentencepiece.model"))
    assert tokenizer.encode(text) == whole.encode(text)


def test_tokens_suit_fairseq(tokenizer):
    """No token is divided or altered by fairseq's dictionary file and line tokenizer."""
    from fairseq.data import Dictionary
    from fairseq.tokenizer import tokenize_line

    tokens = [token for token in tokenizer.tokens if token is not None]
    assert len(set(tokens)) == len(tokens) == len(tokenizer.tokens) - 1
    assert tokenize_line(" ".join(tokens)) == tokens
    assert not {"<s>", "<pad>", "</s>", "<unk>"} & set(tokens)
    dictionary, copy, file = Dictionary(), Dictionary(), io.StringIO()
    for token in tokens:
        dictionary.add_symbol(token)
    dictionary.save(file)
    file.seek(0)
    copy.add_from_file(file)
    assert copy.symbols == dictionary.symbols


def test_code_keeps_indentation_in_few_tokens(tokenizer):
    text = "\n    abc\n        abc\n"
    assert "".join(tokenizer.tokens[i] for i in tokenizer.encode(text)) == (
        f"<0x0A>{SPACE * 4}abc<0x0A>{SPACE * 8}abc<0x0A>"
    )
    assert any(token and set(token) == {SPACE} and len(token) > 1 for token in tokenizer.tokens)


@pytest.mark.parametrize("text", ["abc de  f", " a<s>é😀", "x" * 50])
def test_fairseq_encodes_a_line_alike(trained, tokenizer, gpt2, gpt2_files, text):
    from fairseq.data.encoders.gpt2_bpe import GPT2BPE
    from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

    stock = SentencepieceBPE(
        SimpleNamespace(
            sentencepiece_model=str(trained / "sentencepiece.model"),
            sentencepiece_enable_sampling=False,
            sentencepiece_alpha=None,
        )
    )
    assert stock.encode(text).split(" ") == [tokenizer.tokens[i] for i in tokenizer.encode(text)]
    stock = GPT2BPE(SimpleNamespace(gpt2_encoder_json=gpt2_files[0], gpt2_vocab_bpe=gpt2_files[1]))
    tokens = [gpt2.tokens[i] for i in gpt2.encode(text)]
    assert stock.encode(text).split(" ") == tokens
    assert stock.decode(" ".join(tokens)) == text


def model(tmp_path, **given):
    """A SentencePiece model as others train them."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(1, 2000).splitlines()),
        model_writer=written,
        minloglevel=3,
        **{"vocab_size": 200, "hard_vocab_limit": False, **given},
    )
    path = tmp_path / "given.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"byte_fallback": True, "vocab_size": 400},
        {"model_type": "bpe", "byte_fallback": True, "vocab_size": 400},
        {"add_dummy_prefix": False, "byte_fallback": True, "vocab_size": 400},
        {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
        {
            "user_defined_symbols": ["\n", "\n\n"],
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
        },
    ],
    ids=["stock", "bytes", "bpe", "no prefix", "identity", "newlines"],
)
def test_a_given_model_encodes_as_it_always_does(tmp_path, given):
    path = model(tmp_path, **given)
    stock, ours = (
        sentencepiece.SentencePieceProcessor(model_file=str(path)),
        SentencePieceTokenizer(path),
    )
    for text in ("abc  de \n\n f", " a\n\n\nb", "é \t", words(3)):
        assert ours.encode(text) == stock.encode(text)
    assert not ours.lossless


def test_whitespace_in_a_given_piece_is_spelt_as_bytes(tmp_path):
    path = model(tmp_path, user_defined_symbols=["\n", "a\u3000"])
    tokens = SentencePieceTokenizer(path).tokens
    assert {"<0x0A>", "a<0xE3><0x80><0x80>"} <= set(tokens)
    assert not any(c.isspace() for token in tokens if token for c in token)


def test_a_given_model_may_hold_control_tokens_of_fairseq(tmp_path):
    tokens = SentencePieceTokenizer(model(tmp_path, pad_id=3)).tokens
    assert tokens[:4] == [None] * 4


UNFIT = {
    "no model": (lambda path: path.write_text("no"), "not a SentencePiece model"),
    "empty": (lambda path: path.write_text(""), "not a SentencePiece model"),
    "reserved": (
        lambda path: model(path.parent, user_defined_symbols=["<pad>"]).rename(path),
        "its piece '<pad>' encodes text",
    ),
    "twins": (
        lambda path: model(
            path.parent, byte_fallback=True, vocab_size=400, user_defined_symbols=["\n"]
        ).rename(path),
        "two of its pieces would be written '<0x0A>'",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_models_are_refused(tmp_path, case):
    write, message = UNFIT[case]
    write(tmp_path / "x.model")
    with pytest.raises(OptionError, match=message):
        SentencePieceTokenizer(tmp_path / "x.model")


def test_gpt2_files_that_do_not_fit(tmp_path, gpt2_files):
    encoder, merges = gpt2_files
    with pytest.raises(OptionError, match="--gpt2-bpe .*in this order"):
        GPT2Tokenizer(merges, encoder)
    other = tmp_path / "vocab.bpe"
    other.write_text("#version\nx y\n")
    with pytest.raises(OptionError, match="has no entry 'xy'"):
        GPT2Tokenizer(encoder, other)
    (tmp_path / "encoder.json").write_text('["a"]')
    with pytest.raises(OptionError, match="not GPT-2's encoder.json"):
        GPT2Tokenizer(tmp_path / "encoder.json", merges)


def test_gpt2_cache_is_bounded(gpt2, monkeypatch):
    monkeypatch.setattr("evomoe_plugin.data.tokenizers._GPT2_CACHED_WORDS", 50)
    for number in range(200):
        gpt2.encode(f"w{number}")
    assert len(gpt2._bpe.cache) < 60
