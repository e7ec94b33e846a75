"""The options of `prepare` and their validation."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evomoe_plugin.config.errors import OptionError

DOCUMENTS_BY = ("file", "line", "blank-line")
ENCODING_ERRORS = ("strict", "replace")
ROWS = ("text", "chat")
TOKENIZER_OPTIONS = ("sentencepiece_model", "gpt2_bpe", "tokenizer")
DEFAULT_VOCAB_SIZE = 8192
MOST_WORKERS = 1024
_FIXED_ROWS = 260
_TOO_SMALL = f"choose more than {_FIXED_ROWS}: 256 bytes and fairseq's 4 special tokens"
_CHOICES = {"documents_by": DOCUMENTS_BY, "encoding_errors": ENCODING_ERRORS, "rows": ROWS}

# Options that do not change the result. Inputs and tokenizer files are recorded by content.
_NOT_RECORDED = (
    "inputs valid test sentencepiece_model gpt2_bpe tokenizer out workers overwrite".split()
)


@dataclass(frozen=True)
class PrepareOptions:
    """Inputs, output, splitting and tokenization: the flags of `evomoe prepare`, whose --help
    describes each. Sizes are in bytes of UTF-8."""

    inputs: tuple[str, ...]
    out: str
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    text_suffix: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    text_field: str = "text"
    rows: str = "text"
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
    tokenizer: str | None = None
    source: str = ""
    workers: int | None = None
    overwrite: bool = False

    @property
    def trains_tokenizer(self) -> bool:
        """Whether no tokenizer is given, so that one is trained."""
        return not self._given_tokenizers()

    def _given_tokenizers(self) -> dict[str, Any]:
        values = {option: getattr(self, option) for option in TOKENIZER_OPTIONS}
        return {option: value for option, value in values.items() if value is not None}

    @property
    def fractions(self) -> dict[str, float]:
        """The share of input documents assigned to each held-out split by hash."""
        return {
            split: getattr(self, f"{split}_fraction")
            for split in ("valid", "test")
            if not getattr(self, split)
        }

    @property
    def processes(self) -> int:
        """`--workers`, or the cores that this process may use."""
        if hasattr(os, "sched_getaffinity"):
            return self.workers or len(os.sched_getaffinity(0))
        return self.workers or os.cpu_count() or 1

    def recorded(self) -> dict[str, Any]:
        """The options that change the result, as JSON values."""
        values = {name: v for name, v in vars(self).items() if name not in _NOT_RECORDED}
        if self.trains_tokenizer:
            values["vocab_size"] = self.vocab_size or DEFAULT_VOCAB_SIZE
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    def validate(self) -> None:
        """Raise `OptionError` for the first invalid value."""
        for option, value, remedy in self._faults():
            raise OptionError(option, value, remedy)

    def _faults(self) -> Iterator[tuple[str, Any, str]]:
        if not self.inputs:
            yield "INPUT", "(none)", "name files or folders with text"
        if not self.out:
            yield "out", "''", "name the folder to write"
        for option, choices in _CHOICES.items():
            if (value := getattr(self, option)) not in choices:
                yield option, value, f"choose from {', '.join(choices)}"
        if (start := self.document_start) is not None:
            if self.documents_by != "file":
                yield "document_start", start, "cannot be combined with --documents-by"
            try:
                re.compile(start)
            except re.error as error:
                yield "document_start", start, f"not a regular expression: {error}"
        for suffix in self.text_suffix:
            if not re.fullmatch(r"\.[^./\s]+", suffix):
                yield "text_suffix", repr(suffix), "a suffix such as .py or .md"
        for split, share in self.fractions.items():
            if not 0 < share < 1:
                yield f"{split}_fraction", share, "a number between 0 and 1"
        if sum(self.fractions.values()) >= 1:
            yield (
                "valid_fraction",
                self.valid_fraction,
                f"with --test-fraction "
                f"{self.test_fraction} nothing is left for training; their sum must be below 1",
            )
        for option in ("max_bytes", "sample_bytes", "vocab_size", "workers"):
            if (value := getattr(self, option)) is not None and value < 1:
                yield option, value, "a positive number"
        if self.processes > MOST_WORKERS:  # all of which are started at once
            yield "workers", self.workers, f"at most {MOST_WORKERS:,}"
        if len(given := self._given_tokenizers()) > 1:
            option, value = next(iter(given.items()))
            others = " or ".join(f"--{o.replace('_', '-')}" for o in given if o != option)
            yield option, value, f"or {others}, not both"
        if (size := self.vocab_size) is not None:
            if not self.trains_tokenizer:
                yield "vocab_size", size, "only valid if a tokenizer is trained; omit it"
            if size <= _FIXED_ROWS:
                yield "vocab_size", size, _TOO_SMALL
