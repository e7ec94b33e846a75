"""The options of `prepare` and their validation."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, fields
from typing import Any

from evomoe_plugin.config.errors import OptionError

DOCUMENTS_BY = ("file", "line", "blank-line")
ENCODING_ERRORS = ("strict", "replace")
DEFAULT_VOCAB_SIZE = 8192
_FIXED_ROWS = 260

# Options that do not change the result. Inputs and tokenizer files are recorded by content.
_NOT_RECORDED = ("inputs", "valid", "test", "sentencepiece_model", "gpt2_bpe", "out", "workers",
                 "overwrite")


@dataclass(frozen=True)
class PrepareOptions:
    """Inputs, output, splitting and tokenization. Sizes are in bytes of UTF-8."""

    inputs: tuple[str, ...]
    out: str
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    text_suffix: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    documents_by: str = "file"
    document_start: str | None = None
    encoding_errors: str = "strict"
    max_bytes: int | None = None
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 1
    vocab_size: int | None = None
    sample_bytes: int = 10_000_000
    sentencepiece_model: str | None = None
    gpt2_bpe: tuple[str, str] | None = None
    source: str = ""
    workers: int | None = None
    overwrite: bool = False

    @property
    def trains_tokenizer(self) -> bool:
        return self.sentencepiece_model is None and self.gpt2_bpe is None

    @property
    def fractions(self) -> dict[str, float]:
        """The share of input documents assigned to each held-out split by hash."""
        wanted = {"valid": self.valid_fraction, "test": self.test_fraction}
        given = {"valid": self.valid, "test": self.test}
        return {split: share for split, share in wanted.items() if not given[split]}

    @property
    def processes(self) -> int:
        """`--workers`, or the cores that this process may use."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1)

    def recorded(self) -> dict[str, Any]:
        """The options that change the result, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)
                  if f.name not in _NOT_RECORDED}
        if self.trains_tokenizer:
            values["vocab_size"] = self.vocab_size or DEFAULT_VOCAB_SIZE
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def validate(self) -> None:
        """Raise `OptionError` for the first invalid value."""
        if not self.inputs:
            raise OptionError("INPUT", "(none)", "name files or folders with text")
        if not self.out:
            raise OptionError("out", "''", "name the folder to write")
        _choice("documents_by", self.documents_by, DOCUMENTS_BY)
        _choice("encoding_errors", self.encoding_errors, ENCODING_ERRORS)
        self._validate_document_start()
        for suffix in self.text_suffix:
            if not re.fullmatch(r"\.[^./\s]+", suffix):
                raise OptionError("text_suffix", repr(suffix), "a suffix such as .py or .md")
        for split, share in self.fractions.items():
            if not 0 < share < 1:
                raise OptionError(f"{split}_fraction", share, "a number between 0 and 1")
        if sum(self.fractions.values()) >= 1:
            raise OptionError("valid_fraction", self.valid_fraction,
                              f"with --test-fraction {self.test_fraction} nothing is left for "
                              "training; their sum must be below 1")
        for name in ("max_bytes", "sample_bytes", "vocab_size", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(name, value, "a positive number")
        self._validate_tokenizer()

    def _validate_document_start(self) -> None:
        if self.document_start is None:
            return
        if self.documents_by != "file":
            raise OptionError("document_start", self.document_start,
                              f"cannot be combined with --documents-by {self.documents_by}")
        try:
            re.compile(self.document_start)
        except re.error as error:
            raise OptionError("document_start", self.document_start,
                              f"not a regular expression: {error}") from None

    def _validate_tokenizer(self) -> None:
        if self.sentencepiece_model is not None and self.gpt2_bpe is not None:
            raise OptionError("sentencepiece_model", self.sentencepiece_model,
                              "choose this or --gpt2-bpe, not both")
        if self.vocab_size is not None and not self.trains_tokenizer:
            raise OptionError("vocab_size", self.vocab_size,
                              "only valid if a tokenizer is trained; omit it")
        if self.vocab_size is not None and self.vocab_size <= _FIXED_ROWS:
            raise OptionError("vocab_size", self.vocab_size,
                              f"choose more than {_FIXED_ROWS}: 256 bytes and fairseq's "
                              "4 special tokens are included")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(name, value, f"choose from {', '.join(choices)}")
