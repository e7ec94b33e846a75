"""Tokenizers of Hugging Face: a tokenizer.json, which the `tokenizers` library runs."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.tokenizers import PROBE, TOKENIZER_JSON, Tokenizer

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
MODEL_CONFIG = "config.json"
FILES = (TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, CHAT_TEMPLATE)

# Files of the tokenizers that transformers calls slow, which run in Python.
_SLOW = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json")
# Several times the largest that are published.
_MAX_BYTES, _MAX_CONFIG_BYTES, _MAX_IDS = 1 << 28, 1 << 24, 1 << 22

# fairseq's names of the tokens that it needs itself.
FAIRSEQ_WORDS = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
# transformers' names of special tokens, which chat templates read.
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class SpecialToken(NamedTuple):
    id: int
    word: str


def tokenizer_files(given: str) -> dict[str, Path]:
    """The files of a tokenizer, by their names in a data folder.

    Args:
        given: its folder, or its tokenizer.json.
    Raises:
        OptionError: there is no tokenizer.json.
    """
    path = Path(given)
    if path.is_file():
        found = {TOKENIZER_JSON: path}
        if path.name in _SLOW:
            raise OptionError(
                "tokenizer", given, f"is of a slow tokenizer: {_convert(path.parent)}"
            )
        path = path.parent
    elif path.is_dir():
        found = {TOKENIZER_JSON: path / TOKENIZER_JSON}
    else:
        raise OptionError("tokenizer", given, "no such file or folder")
    if not found[TOKENIZER_JSON].is_file():
        slow = next((name for name in _SLOW if (path / name).is_file()), None)
        fault = f"has no {TOKENIZER_JSON}"
        if slow is None:
            fault += ": give the folder of a model of Hugging Face, or its tokenizer.json"
        else:
            fault += f", only {slow} of a slow tokenizer: {_convert(path)}"
        raise OptionError("tokenizer", given, fault)
    return found | {name: path / name for name in FILES[1:] if (path / name).is_file()}


def _convert(folder: Path) -> str:
    return (
        "convert it with transformers, "
        f"AutoTokenizer.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER)"
    )


def embedding_rows(given: str) -> int | None:
    """Rows of the embedding of the model next to a tokenizer; None if there is none.

    Raises:
        OptionError: its config.json is no JSON object.
    """
    path = Path(given)
    path = (path if path.is_dir() else path.parent) / MODEL_CONFIG
    if not path.is_file():
        return None
    config = _read_object(path)
    inner = config.get("text_config")
    size = config.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return size if isinstance(size, int) and not isinstance(size, bool) else None


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json with its own token ids. Tokens are the ids in decimal.

    A text is encoded as transformers does with `split_special_tokens=True`: special tokens that it
    contains are text. With `special` they are special tokens, as transformers reads them otherwise.

    Args:
        files: tokenizer.json and others of `FILES`, by these names.
    Attributes:
        special: by fairseq's name. bos, eos, unk and pad are those that the tokenizer's files name,
            or its tokens of fairseq's names, as in `FAIRSEQ_WORDS`; else ids after all of its own.
            pad shares its id with no other, and unk not with bos or eos.
        config: the content of tokenizer_config.json.
        names: transformers' names of special tokens, `bos_token`, to their text.
        control_tokens: texts of the tokens that no text is encoded to.
        chat_template: the Jinja source; None if there is none.
    Raises:
        OptionError: a file is damaged or too large.
    """

    kind = "huggingface"
    flags = f"--bpe tokenizer_json --tokenizer-json DATA/{TOKENIZER_JSON}"

    def __init__(self, files: Mapping[str, Path]):
        self.path = files[TOKENIZER_JSON]
        self._tokenizer = _load(self.path)
        self.config = config = (
            _read_object(files[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in files else {}
        )
        named = _read_object(files[SPECIAL_TOKENS_MAP]) if SPECIAL_TOKENS_MAP in files else {}
        self.names = {**_special_words(named), **_special_words(config)}
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._check_ids(vocabulary)
        if "unk_token" not in self.names and (unknown := self._unknown_of_model()):
            self.names["unk_token"] = unknown
        self.special = _special_tokens(vocabulary, self.names)
        self._mark_special(vocabulary)
        unknown_id = self.special["unk"].id
        self.tokens: list[str | None] = [None] * (max(vocabulary.values()) + 1)
        for i in vocabulary.values():
            self.tokens[i] = None if i == unknown_id else str(i)
        if self._starts_with_bos(config.get("add_bos_token")):
            self.start = self.special["bos"].id
            self.flags += " --add-bos-token"
        self.chat_template = _chat_template(files.get(CHAT_TEMPLATE), config)
        self.lossless = self.decode(self.encode(PROBE)) == PROBE

    def _check_ids(self, vocabulary: Mapping[str, int]) -> None:
        if not vocabulary:
            raise OptionError("tokenizer", self.path, "has no tokens")
        if (last := max(vocabulary.values())) >= _MAX_IDS:
            fault = f"has the token id {last}: give a tokenizer with ids below {_MAX_IDS}"
            raise OptionError("tokenizer", self.path, fault)

    def _unknown_of_model(self) -> str | None:
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        if unknown is None and (i := getattr(self._tokenizer.model, "unk_id", None)) is not None:
            unknown = self._tokenizer.id_to_token(i)
        return unknown

    def _mark_special(self, vocabulary: Mapping[str, int]) -> None:
        from tokenizers import AddedToken

        added = self._tokenizer.get_added_tokens_decoder()
        known = {token.content for token in added.values() if token.special}
        words = [word for word in self.names.values() if word in vocabulary]
        words += [token.word for token in self.special.values() if token.word in vocabulary]
        new = [word for word in dict.fromkeys(words) if word not in known]
        self._tokenizer.add_special_tokens(
            [AddedToken(word, special=True, normalized=False) for word in new]
        )
        self.control_tokens = frozenset({*known, *new})

    def _starts_with_bos(self, configured: Any) -> bool:
        bos = self.special["bos"].id
        if bos >= len(self.tokens):
            return False
        if isinstance(configured, bool):
            return configured
        return self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos]

    def encode(self, text: str) -> list[int]:
        return self._encode(text).ids

    def encode_parts(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of each of several texts that follow one another, encoded as one text.

        A token that reaches into the next text belongs to the one that it starts in.

        Args:
            special: special tokens in the texts are not text.
        """
        encoding = self._encode("".join(texts), special)
        ends = list(itertools.accumulate(map(len, texts)))
        parts: list[list[int]] = [[] for _ in texts]
        reached = 0
        for token_id, (start, _) in zip(encoding.ids, encoding.offsets, strict=True):
            reached = max(reached, start)
            parts[min(bisect.bisect_right(ends, reached), len(parts) - 1)].append(token_id)
        return parts

    def _encode(self, text: str, special: bool = False) -> Any:
        self._tokenizer.encode_special_tokens = not special
        with _explained(self.path, "cannot encode a text"):
            return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Text; special tokens are written by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


@contextlib.contextmanager
def _explained(path: Path, fault: str) -> Iterator[None]:
    """Report a failure of the library in one line."""
    try:
        yield
    except BaseException as error:
        # What Rust panics with is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise OptionError("tokenizer", path, f"{fault}: {reason}") from None


def _load(path: Path) -> Any:
    import tokenizers

    text = _read(path, _MAX_BYTES)
    with _explained(path, "is damaged, or no tokenizer.json"):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        # Kept in the file for single uses, and random.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None):
            tokenizer.model.dropout = None
        return tokenizer


def _read(path: Path, limit: int) -> str:
    if (size := path.stat().st_size) > limit:
        fault = f"has {size >> 20:,} MiB: give a file of at most {limit >> 20} MiB"
        raise OptionError("tokenizer", path, fault)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError("tokenizer", path, f"is not UTF-8 (byte {error.start + 1})") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read(path, _MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise OptionError("tokenizer", path, f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise OptionError("tokenizer", path, "is JSON, but no object")
    return content


def _special_words(config: Mapping[str, Any]) -> dict[str, str]:
    """The text of each special token that a configuration names."""
    words = {}
    for name in (f"{name}_token" for name in _NAMES):
        value = config.get(name)
        word = value.get("content") if isinstance(value, dict) else value
        if isinstance(word, str) and word:
            words[name] = word
    return words


def _special_tokens(
    vocabulary: Mapping[str, int], names: Mapping[str, str]
) -> dict[str, SpecialToken]:
    known, found = dict(vocabulary), dict[str, SpecialToken]()
    for name, fairseq_word in FAIRSEQ_WORDS.items():
        words = [word for word in (names.get(f"{name}_token"), fairseq_word) if word]
        # Padding is never a target, and unknown tokens are counted.
        taken = {token.id for token in found.values()} if name in ("unk", "pad") else set()
        word = next((word for word in words if word in known and known[word] not in taken), None)
        if word is None:
            new_id = max(known.values()) + 1
            word = next((word for word in words if word not in known), f"{fairseq_word}{new_id}")
            known[word] = new_id
        found[name] = SpecialToken(known[word], word)
    return found


def _chat_template(path: Path | None, config: Mapping[str, Any]) -> str | None:
    if path is not None:
        return _read(path, _MAX_CONFIG_BYTES)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each for each in template if isinstance(each, dict)}
        template = named.get("default", {}).get("template")
    return template if isinstance(template, str) else None
