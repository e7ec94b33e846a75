"""Text to rows of fairseq's dictionary and back, with the tokenizer of the data folder."""

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

_FILLING = "madeupword"  # fairseq's symbols that fill a dictionary up to a multiple of 8


class TextCodec:
    """Encodes prompts, decodes what is generated.

    Args:
        folder: has the tokenizer's files, as `evomoe prepare` writes them. Without any, words
            between spaces are symbols, as in fairseq's own commands without `--bpe`.
        dictionary: the task's.
    Raises:
        OptionError: the tokenizer is not the one that the dictionary was made with.
    """

    def __init__(self, folder: Path, dictionary: Dictionary):
        self.dictionary = dictionary
        self.tokenizer: Tokenizer | None = None
        if any((folder / name).exists() for name in (SENTENCEPIECE_MODEL, GPT2_ENCODER)):
            self.tokenizer = load_tokenizer(folder)
            missing = [s for s in self.tokenizer.symbols if s is not None and s not in dictionary]
            if missing:
                raise OptionError("data", folder,
                                  f"its tokenizer and its dict.txt do not belong together: there "
                                  f"is no {missing[0]!r} in dict.txt")
            symbols = self.tokenizer.symbols
            self._rows = [dictionary.unk() if s is None else dictionary.index(s) for s in symbols]
            self._ids = {self._rows[i]: i for i, s in enumerate(symbols) if s is not None}

    def encode(self, text: str) -> list[int]:
        """Rows of the dictionary, without a symbol at the begin or end."""
        if self.tokenizer is None:
            return [self.dictionary.index(word) for word in text.split()]
        return [self._rows[i] for i in self.tokenizer.encode(text)]

    def decode(self, rows: Sequence[int]) -> str:
        """Text; rows that stand for none by their symbols."""
        if self.tokenizer is None:
            return " ".join(self.dictionary[row] for row in rows)
        text, ids = "", []
        for row in rows:
            if row in self._ids:
                ids.append(self._ids[row])
            else:
                text, ids = text + self.tokenizer.decode(ids) + self.dictionary[row], []
        return text + self.tokenizer.decode(ids)

    def without_text(self) -> list[int]:
        """Rows that stand for no text, but for that which ends one."""
        if self.tokenizer is not None:
            known = self._ids
        else:
            known = {row for row in range(self.dictionary.nspecial, len(self.dictionary))
                     if not self.dictionary[row].startswith(_FILLING)}
        rows = set(range(len(self.dictionary))) - set(known)
        return sorted(rows - {self.dictionary.eos()})
