"""Kinds of tokens: place in a word, numbers, punctuation."""

from __future__ import annotations

from collections.abc import Iterable

from evomoe_plugin.generation.text import TextCodec

KINDS = ("begins a word", "inside a word", "number", "punctuation", "no text")
BEGINS, INSIDE, NUMBER, PUNCTUATION, NO_TEXT = range(len(KINDS))

_MARKS = ("▁", "Ġ")  # of SentencePiece and of byte-level BPE, for the space before a word
_CONTINUED = "@@"  # of subword-nmt, at the end of a part that goes on
_PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"


def kinds_of(codec: TextCodec, tokens: Iterable[int]) -> dict[int, int]:
    """Token id -> its kind, an index of `KINDS`."""
    silent = {*codec.without_text(), codec.dictionary.eos(), codec.dictionary.indices.get("<mask>")}
    pieces = {token: (codec.name(token), codec.decode([token])) for token in tokens}
    marked = any(_is_marked(*piece) for piece in pieces.values())
    return {
        token: NO_TEXT if token in silent else kind_of(name, text, marked)
        for token, (name, text) in pieces.items()
    }


def kind_of(name: str, text: str, marked: bool) -> int:
    """The kind of a token that has text.

    Args:
        name: as the tokenizer writes it.
        text: decoded by itself.
        marked: whether tokens that begin a word are marked; if not, every word is one token.
    """
    begins = not marked or _is_marked(name, text)
    text = text.strip().removesuffix(_CONTINUED)
    if _PART_OF_CHARACTER in text:
        return INSIDE
    if not any(character.isalnum() for character in text):
        return PUNCTUATION
    if all(character.isdigit() for character in text):
        return NUMBER
    return BEGINS if begins else INSIDE


def _is_marked(name: str, text: str) -> bool:
    return name.startswith(_MARKS) or text.startswith(" ")
