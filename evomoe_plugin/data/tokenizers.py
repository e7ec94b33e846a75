"""Tokenizers: text to ids and back, and the token of each id in fairseq's dictionary."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from evomoe_plugin.config.errors import OptionError

SENTENCEPIECE_MODEL = "sentencepiece.model"
TOKENIZER_JSON = "tokenizer.json"
GPT2_ENCODER, GPT2_MERGES = "encoder.json", "vocab.bpe"
GPT2_SHA256 = {
    GPT2_ENCODER: "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    GPT2_MERGES: "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")

# SentencePiece writes a space as this character, and cannot distinguish the two.
SPACE = "\u2581"
PROBE = f" a  b\n\n\tc {SPACE} é \u3000😀\r\n "
_GPT2_CACHED_WORDS = 200_000


class Tokenizer(Protocol):
    """What encodes text to token ids and back, whatever its kind."""

    kind: str
    """sentencepiece, gpt2 or tokenizer_json."""
    flags: str
    """Of fairseq-interactive and fairseq-generate; DATA is the folder."""
    tokens: list[str | None]
    """By id; None: an id that no text is encoded to."""
    lossless: bool
    """Decoding the ids of any text gives exactly this text."""
    start: int | None = None
    """The id that a text starts with, if the tokenizer has one."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those that begin and end it."""
        ...

    def encode_parts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of several texts that follow one another."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...


def has_tokenizer(folder: Path, lang: str | None = None) -> bool:
    """Whether a folder has the main file of a tokenizer, of one language or of all text."""
    names = (SENTENCEPIECE_MODEL, model_name(lang), TOKENIZER_JSON, GPT2_ENCODER)
    return any((folder / name).is_file() for name in names)


def model_name(lang: str | None = None) -> str:
    """The file of a SentencePiece model, of one language of parallel text if there is one each."""
    return SENTENCEPIECE_MODEL if lang is None else f"sentencepiece.{lang}.model"


def load_tokenizer(folder: str | Path, lang: str | None = None) -> Tokenizer:
    """Load the tokenizer of a prepared folder.

    Args:
        folder: of `evomoe prepare`.
        lang: of which language, where each has its own (`--pairs` with `--separate-vocabularies`);
            elsewhere it is the same.
    Raises:
        OptionError: its files are invalid, or of two languages and `lang` is none of them.
        FileNotFoundError: one is missing.
    """
    folder = Path(folder)
    if (folder / SENTENCEPIECE_MODEL).exists():
        return SentencePieceTokenizer(folder / SENTENCEPIECE_MODEL)
    if langs := sorted(path.name.split(".")[1] for path in folder.glob(model_name("*"))):
        if lang not in langs:
            raise OptionError("lang", lang, f"{folder} has a tokenizer each of {', '.join(langs)}")
        return SentencePieceTokenizer(folder / model_name(lang))
    if (folder / TOKENIZER_JSON).exists():
        from evomoe_plugin.data import huggingface_tokenizer as huggingface

        return huggingface.HuggingFaceTokenizer(huggingface.tokenizer_files(str(folder)))
    return GPT2Tokenizer(folder / GPT2_ENCODER, folder / GPT2_MERGES)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Tokens are its pieces, as in fairseq's own `--bpe sentencepiece`.

    Whitespace inside a piece, which would break fairseq's dictionary and its line tokenizer, is
    written as bytes: `<0x0A>`. Models trained by `prepare` have none (see train_sentencepiece.py).
    """

    kind = "sentencepiece"
    flags = f"--bpe sentencepiece --sentencepiece-model DATA/{SENTENCEPIECE_MODEL}"

    def __init__(self, path: Path):
        import sentencepiece

        content = path.read_bytes()
        try:
            if not content:  # which would pass for none given
                raise RuntimeError
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError:
            raise OptionError("sentencepiece_model", path, "not a SentencePiece model") from None
        self.tokens = [self._token(i) for i in range(self._model.get_piece_size())]
        _check_tokens("sentencepiece_model", path, self.tokens)
        self.encoded_apart = self._encoded_apart()
        self._divider = f"([{''.join(self.encoded_apart)}])"
        self.lossless = self.decode(self.encode(PROBE)) == PROBE

    def _token(self, piece_id: int) -> str | None:
        model = self._model
        if model.is_control(piece_id) or model.is_unknown(piece_id) or model.is_unused(piece_id):
            return None
        return "".join(_as_bytes(c) if c.isspace() else c for c in model.id_to_piece(piece_id))

    def _encoded_apart(self) -> dict[str, list[int]]:
        """Characters that are encoded as bytes in any context: text is split at them.

        These are the space character of SentencePiece, otherwise read as a space, and, for speed
        (encoding time is superlinear in the length), the newline. Empty if the model adds or drops
        spaces at the ends.
        """
        model = self._model
        adds_space = model.encode("a", out_type=str)[0].startswith(SPACE)
        if adds_space or model.decode(model.encode(" a ")) != " a ":
            return {}
        apart = {SPACE: [model.piece_to_id(_as_bytes(SPACE)[i : i + 6]) for i in (0, 6, 12)]}
        if not any("\n" in model.id_to_piece(i) for i in range(len(self.tokens))):
            apart["\n"] = model.encode("\n")
        return {c: ids for c, ids in apart.items() if all(model.is_byte(i) for i in ids)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(self._divider, text) if self.encoded_apart else [text]:
            ids += self.encoded_apart.get(part) or self._model.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._model.decode(list(ids))


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-level BPE, with fairseq's encoder. Tokens are the ids in decimal, as in
    fairseq's own `--bpe gpt2`."""

    kind = "gpt2"
    flags = "--bpe gpt2 --gpt2-encoder-json DATA/encoder.json --gpt2-vocab-bpe DATA/vocab.bpe"
    lossless = True

    def __init__(self, encoder: Path, merges: Path):
        from fairseq.data.encoders.gpt2_bpe_utils import get_encoder

        try:
            self._bpe = get_encoder(str(encoder), str(merges))
            ids = set(self._bpe.encoder.values())
            self.tokens = [str(i) if i in ids else None for i in range(max(ids) + 1)]
            # Every token that the encoder can produce: the bytes and the results of the merges.
            needed = [*self._bpe.byte_encoder.values(), *map("".join, self._bpe.bpe_ranks)]
            missing = [token for token in needed if token not in self._bpe.encoder]
        except (ValueError, TypeError, AttributeError) as error:
            fault = f"not GPT-2's encoder.json and vocab.bpe (in this order): {error}"
            raise OptionError("gpt2_bpe", encoder, fault) from None
        if missing:
            fault = f"has no entry {missing[0]!r}, which {merges} needs: give files that match"
            raise OptionError("gpt2_bpe", encoder, fault)

    def encode(self, text: str) -> list[int]:
        if len(self._bpe.cache) > _GPT2_CACHED_WORDS:  # fairseq never empties it
            self._bpe.cache.clear()
        return self._bpe.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._bpe.decode(ids)


def _as_bytes(character: str) -> str:
    return "".join(f"<0x{byte:02X}>" for byte in character.encode())


def _check_tokens(option: str, path: Path, tokens: list[str | None]) -> None:
    seen: set[str] = set()
    for token in filter(None, tokens):
        if token in SPECIAL_TOKENS:
            fault = f"its piece {token!r} encodes text, but is a special token of fairseq"
            raise OptionError(option, path, f"{fault}; make it a control token of the model")
        if token in seen:
            raise OptionError(option, path, f"two of its pieces would be written {token!r}")
        seen.add(token)


@functools.lru_cache(maxsize=1)
def tokenizer_of_process(folder: str) -> Tokenizer:
    """The tokenizer of `folder`, loaded once in a worker process."""
    return load_tokenizer(folder)
