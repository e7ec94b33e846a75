"""Bytes of SentencePiece's byte fallback, which fairseq's commands print by name."""

from __future__ import annotations

import re
from collections.abc import Callable

from fairseq.data import data_utils
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

from evomoe_plugin.patches.patch import Patch, always, wrap

_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")


def with_bytes(text: str) -> str:
    """`text` with runs of pieces such as `<0xC3><0xA9>` as the characters that they encode."""

    def decoded(found: re.Match) -> str:
        return bytes.fromhex(re.sub("<0x|>", "", found[0])).decode("utf-8", "replace")

    return _BYTES.sub(decoded, text)


def _post_process(upstream: Callable, sentence: str, symbol: str) -> str:
    text = upstream(sentence, symbol)
    return with_bytes(text) if symbol == "sentencepiece" else text


def _decode(upstream: Callable, bpe: SentencepieceBPE, text: str) -> str:
    return with_bytes(upstream(bpe, text))


def apply() -> None:
    wrap(data_utils, "post_process", _post_process)
    wrap(SentencepieceBPE, "decode", _decode)


PATCH = Patch(
    name="byte-pieces",
    broken="fairseq-interactive and fairseq-generate print é as <0xC3><0xA9>, with --bpe or "
    "--post-process sentencepiece and a model with byte fallback",
    upstream="fairseq/data/data_utils.py: post_process; "
    "fairseq/data/encoders/sentencepiece_bpe.py: decode",
    remove_when="fairseq decodes with SentencePiece itself",
    needed=always("bytes are parts of characters"),
    apply=apply,
)
