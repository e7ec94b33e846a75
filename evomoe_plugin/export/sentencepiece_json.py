"""SentencePiece models as a tokenizer.json, where the `tokenizers` library gives the same ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from evomoe_plugin.data.tokenizers import PROBE, SPACE, SPECIAL_TOKENS, SentencePieceTokenizer

# Pieces' types in the model's file.
_NORMAL, _USER_DEFINED, _BYTE = 1, 4, 6
_UNIGRAM, _BPE = 1, 2
# Below every path of text, so that no text becomes a token that is not one.
_NEVER = -1e9
_ANY = 2**31
_RANDOM_TEXTS = 2000
_ODD = (
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  a   b  ",
    PROBE,
    f"{SPACE}a{SPACE}{SPACE} b",
    "tab\tand\r\n\n\x0b\x0c\x00\x1f\x7f end",
    "\xa0\u2003\u3000\u2028\u200b\u200d\ufeff",
    "é e\u0301 ﬁ ½ Ⅷ ① ｆｕｌｌ ﷺ",
    "Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 한국어",
    "😀 👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈",
    "".join(SPECIAL_TOKENS) + " <0x0A> <0xE2><0x96><0x81> [INST] <|x|>",
    "aaaaaaaaa abababababa    0000000 ====----",
)


class Inexpressible(Exception):
    """Why a model has no tokenizer.json."""


def sentencepiece_parts(
    path: Path, tokenizer: SentencePieceTokenizer, dictionary: Dictionary
) -> dict[str, Any]:
    """What a tokenizer.json says of a SentencePiece model: normalizer, decoder, model.

    Pieces are written with spaces, not with SentencePiece's character for them, so that this
    character in a text is a character like others.

    Args:
        path: of the model.
        tokenizer: loaded from it.
        dictionary: gives the ids.
    Raises:
        Inexpressible: the library lacks something that the model has, or protobuf is missing.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise Inexpressible(f"its file is read by protobuf: pip install protobuf ({error})") from (
            error
        )
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(path.read_bytes())
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise Inexpressible("it is neither a unigram nor a BPE model")
    if trainer.treat_whitespace_as_suffix:
        raise Inexpressible("its pieces end with spaces (treat_whitespace_as_suffix)")
    if any(piece.type == _USER_DEFINED for piece in proto.pieces):
        raise Inexpressible("it has user-defined pieces")
    names = [dictionary[i] for i in range(len(dictionary))]
    scores = [_NEVER] * len(names)
    texts: dict[str, float] = {}
    for piece, token in zip(proto.pieces, tokenizer.tokens, strict=True):
        if token is None:
            continue
        row = dictionary.index(token)
        names[row] = piece.piece
        if piece.type == _NORMAL:
            names[row] = piece.piece.replace(SPACE, " ")
            scores[row] = texts[names[row]] = piece.score
    if len(set(names)) < len(names):
        raise Inexpressible("two of its entries have the same name")
    model: dict[str, Any] = {"byte_fallback": trainer.byte_fallback}
    if trainer.model_type == _BPE:
        model |= {
            "type": "BPE",
            "dropout": None,
            "unk_token": dictionary[dictionary.unk()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "vocab": {name: row for row, name in enumerate(names)},
            "merges": list(_merges(texts)),
        }
    else:
        model |= {
            "type": "Unigram",
            "unk_id": dictionary.unk(),
            "vocab": [list(entry) for entry in zip(names, scores, strict=True)],
        }
    decoder: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if stripped := _ANY if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix):
        decoder.append({"type": "Strip", "content": " ", "start": stripped, "stop": 0})
    normalizer = list(_normalizer(spec, SPACE not in tokenizer.encoded_apart))
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizer} if normalizer else None,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoder},
        "model": model,
    }


def _merges(scores: dict[str, float]) -> Iterator[list[str]]:
    """Pairs of pieces that make a piece, in SentencePiece's order: by the score of what they make,
    then from the left."""
    found = []
    for piece, score in scores.items():
        for end in range(1, len(piece)):
            if piece[:end] in scores and piece[end:] in scores:
                found.append((-score, -end, piece[:end], piece[end:]))
    for _, _, left, right in sorted(found):
        yield [left, right]


def _normalizer(spec: Any, reads_space: bool) -> Iterator[dict[str, Any]]:
    """As SentencePiece's.

    Args:
        reads_space: whether SentencePiece's character for a space is one in a text.
    """
    if spec.precompiled_charsmap:
        import base64

        charsmap = base64.b64encode(spec.precompiled_charsmap).decode()
        yield {"type": "Precompiled", "precompiled_charsmap": charsmap}
    if spec.remove_extra_whitespaces:
        yield {"type": "Replace", "pattern": {"Regex": r"\A +|(?<= ) +"}, "content": ""}
    if spec.add_dummy_prefix:
        yield {"type": "Prepend", "prepend": " "}
    if reads_space:
        yield {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    if spec.remove_extra_whitespaces:  # at the end, of either character
        yield {"type": "Replace", "pattern": {"Regex": r" +\z"}, "content": ""}


def first_difference(
    path: Path, tokenizer: SentencePieceTokenizer, dictionary: Dictionary
) -> str | None:
    """A text that a tokenizer.json encodes or decodes in another way than the model; None: it
    agrees on texts of many scripts, and on 2,000 random ones of the model's own pieces.

    Args:
        path: of the tokenizer.json.
    """
    from tokenizers import Tokenizer

    from evomoe_plugin.data.dictionary import dictionary_ids

    library = Tokenizer.from_file(str(path))
    library.encode_special_tokens = True
    ids = dictionary_ids(tokenizer, dictionary).tolist()
    for text in _texts(tokenizer):
        pieces = tokenizer.encode(text)
        wanted = [ids[piece] for piece in pieces]
        if library.encode(text, add_special_tokens=False).ids != wanted:
            return text
        known = dictionary.unk() not in wanted
        if known and library.decode(wanted, skip_special_tokens=False) != tokenizer.decode(pieces):
            return text
    return None


def _texts(tokenizer: SentencePieceTokenizer) -> Iterator[str]:
    yield from _ODD
    draw = random.Random(1)
    known = [token.replace(SPACE, " ") for token in tokenizer.tokens if token]
    letters = [token for token in known if len(token) == 1]
    odd = [*" \n\t", "  ", SPACE, "e\u0301", "é", "語", "😀", "</s>", "<0x0A>", "\x00"]
    for _ in range(_RANDOM_TEXTS):
        # Many repeats, where the order of merges shows.
        few = [draw.choice(draw.choice((known, letters or known, odd))) for _ in range(4)]
        yield "".join(draw.choices(few, k=draw.randint(1, 12)))
