"""Text to token ids of fairseq's dictionary and back, with the tokenizer of the data folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fairseq.data import Dictionary

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.tokenizers import (
    GPT2_ENCODER,
    SENTENCEPIECE_MODEL,
    Tokenizer,
    load_tokenizer,
)

_PADDING_WORD = "madeupword"  # fairseq pads dictionaries with these to a multiple of 8


class TextCodec:
    """Encodes prompts and decodes generated tokens.

    Args:
        folder: has the tokenizer's files, as `evomoe prepare` writes them. Without a tokenizer,
            text is split at spaces, as in fairseq's own commands without `--bpe`.
        dictionary: the task's.
    Raises:
        OptionError: tokenizer and dictionary do not match.
    """

    def __init__(self, folder: Path, dictionary: Dictionary):
        self.dictionary = dictionary
        self.tokenizer: Tokenizer | None = None
        if any((folder / name).exists() for name in (SENTENCEPIECE_MODEL, GPT2_ENCODER)):
            self.tokenizer = load_tokenizer(folder)
            tokens = self.tokenizer.tokens
            for token in filter(None, tokens):
                if token not in dictionary:
                    raise OptionError(
                        "data",
                        folder,
                        "its tokenizer and its dict.txt do not "
                        f"match: there is no {token!r} in dict.txt",
                    )
            self._token_ids = [dictionary.index(token or "<unk>") for token in tokens]
            self._piece_ids = {self._token_ids[i]: i for i, token in enumerate(tokens) if token}

    def encode(self, text: str) -> list[int]:
        """Token ids, without start and end tokens."""
        if self.tokenizer is None:
            return [self.dictionary.index(word) for word in text.split()]
        return [self._token_ids[i] for i in self.tokenizer.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text; special tokens are written by name."""
        if self.tokenizer is None:
            return " ".join(self.dictionary[token] for token in token_ids)
        text, pieces = "", list[int]()
        for token in token_ids:
            if token in self._piece_ids:
                pieces.append(self._piece_ids[token])
            else:
                text, pieces = text + self.tokenizer.decode(pieces) + self.dictionary[token], []
        return text + self.tokenizer.decode(pieces)

    def without_text(self) -> list[int]:
        """Token ids without text, except end-of-sentence."""
        if self.tokenizer is not None:
            known = set(self._piece_ids)
        else:
            known = {
                token
                for token in range(self.dictionary.nspecial, len(self.dictionary))
                if not self.dictionary[token].startswith(_PADDING_WORD)
            }
        return sorted(set(range(len(self.dictionary))) - known - {self.dictionary.eos()})
