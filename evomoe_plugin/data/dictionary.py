"""fairseq's dictionaries: in order of frequency, or with the token ids of a tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fairseq.data import Dictionary
from fairseq.file_io import PathManager

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.huggingface_tokenizer import (
    FAIRSEQ_WORDS,
    HuggingFaceTokenizer,
    SpecialToken,
)
from evomoe_plugin.data.tokenizers import Tokenizer

# The first line of the file. fairseq without this package cannot read it, and prints this part.
_HEADER = "#token-ids-of-tokenizer.json, read with --user-dir evomoe_plugin"


class TokenizerDictionary(Dictionary):
    """A dictionary with the token ids of a tokenizer.json, so that embeddings keep their rows.

    The entry of token id n is n in decimal. Special tokens that the tokenizer lacks follow, then
    fairseq's padding words. The first line of the file says which ids are special, as fairseq's own
    format cannot.

    Args:
        special: by fairseq's name, as `HuggingFaceTokenizer.special`.
    """

    def __init__(self, special: Mapping[str, SpecialToken]):
        words = {name: special[name].word for name in FAIRSEQ_WORDS}
        super().__init__(**words, add_special_symbols=False)
        self.special = dict(special)
        self.nspecial = 0  # all entries are in the file
        for name, token in special.items():
            setattr(self, f"{name}_index", token.id)

    @classmethod
    def of(
        cls, tokenizer: HuggingFaceTokenizer, counts: Sequence[int], rows: int | None
    ) -> TokenizerDictionary:
        """The dictionary of a tokenizer.

        Args:
            counts: how often each of its ids occurs, then how many documents end; may be longer.
            rows: of the embedding that the ids belong to; None: as many as needed. It has a
                multiple of 8 entries, unless those fit.
        """
        dictionary, size = cls(tokenizer.special), len(tokenizer.tokens)
        for token_id in range(size):
            dictionary.add_symbol(str(token_id), n=int(counts[token_id]))
        for token in sorted(set(tokenizer.special.values())):
            if token.id >= size:
                dictionary.add_symbol(token.word, n=0)
        dictionary.count[dictionary.eos()] += int(counts[size])
        if len(dictionary) > (rows or 0):
            dictionary.pad_to_multiple_(8)
        else:
            dictionary.pad_to_multiple_(rows)
        return dictionary

    @classmethod
    def load(cls, f: Any, add_special_symbols: bool = True) -> Dictionary:
        """Load either kind of dictionary, as fairseq's task of language modeling does."""
        with open(PathManager.get_local_path(f), encoding="utf-8", errors="replace") as file:
            first = file.readline()
        if not first.startswith(_HEADER):
            return Dictionary.load(f, add_special_symbols)
        special = json.loads(first.removeprefix(_HEADER))
        dictionary = cls({name: SpecialToken(*special[name]) for name in FAIRSEQ_WORDS})
        dictionary.add_from_file(f)
        if any(not 0 <= token.id < len(dictionary) for token in dictionary.special.values()):
            raise ValueError("its first line names ids that it does not have")
        return dictionary

    def _load_meta(self, lines: list[str]) -> int:
        return 1

    def _get_meta(self) -> tuple[list[str], list[str]]:
        special = {name: [token.id, token.word] for name, token in self.special.items()}
        return [_HEADER], [json.dumps(special, separators=(",", ":"))]


def dictionary_ids(tokenizer: Tokenizer, dictionary: Dictionary) -> np.ndarray:
    """The dictionary's token id of each of the tokenizer's ids, int32; unk where it has no text.

    Raises:
        ValueError: the dictionary is not the tokenizer's; the message says what it lacks.
    """
    if isinstance(dictionary, TokenizerDictionary):
        special = tokenizer.special if isinstance(tokenizer, HuggingFaceTokenizer) else None
        if special != dictionary.special:
            raise ValueError("has other special tokens than the tokenizer next to it")
        if len(tokenizer.tokens) > len(dictionary):
            raise ValueError(
                f"has {len(dictionary)} entries, where the tokenizer next to it has "
                f"{len(tokenizer.tokens)} token ids"
            )
        return np.arange(len(tokenizer.tokens), dtype=np.int32)
    for token in tokenizer.tokens:
        if token is not None and token not in dictionary:
            raise ValueError(f"has no {token!r}, which the tokenizer next to it produces")
    unk = dictionary.unk()
    ids = [unk if token is None else dictionary.index(token) for token in tokenizer.tokens]
    return np.array(ids, dtype=np.int32)


def load_dictionary(option: str, path: str | os.PathLike[str]) -> Dictionary:
    """Load a dict.txt of either kind.

    Args:
        option: the option that gave the file or its folder, for messages.
    Raises:
        OptionError: no such file, not UTF-8, a line that is not a token and its count, or a
            duplicate token.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise OptionError(option, path, "no such file")
    try:
        return TokenizerDictionary.load(path)
    except OSError as error:
        raise OptionError(option, path, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # fairseq raises a bare Exception for text that is not UTF-8
        raise OptionError(option, path, f"is not a fairseq dictionary: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    message = str(error).split(". ")[0]
    if message.startswith("Incorrect encoding"):
        return "it is not UTF-8"
    return " ".join(message.split())[:200]
