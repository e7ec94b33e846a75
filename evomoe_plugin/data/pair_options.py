"""The options of `evomoe prepare --pairs`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.options import DEFAULT_VOCAB_SIZE

FILES = ("pairs", "valid_pairs", "test_pairs")
"""The options that name files."""


@dataclass(frozen=True)
class PairOptions:
    """Files, output, splitting, vocabulary and filters of parallel text."""

    pairs: tuple[str, str]
    out: str
    valid_pairs: tuple[str, str] | None = None
    test_pairs: tuple[str, str] | None = None
    langs: tuple[str, str] | None = None
    separate_vocabularies: bool = False
    min_length: int = 1
    max_length: int | None = None
    max_length_ratio: float | None = None
    valid_fraction: float = 0.05
    test_fraction: float = 0.05
    seed: int = 1
    vocab_size: int | None = None
    sample_bytes: int = 10_000_000
    source: str = ""
    overwrite: bool = False

    @property
    def languages(self) -> tuple[str, str]:
        """Source and target: `--langs`, or the suffixes of the files."""
        if self.langs is not None:
            return self.langs
        source, target = (Path(file).suffix.lstrip(".") for file in self.pairs)
        return source, target

    @property
    def fractions(self) -> dict[str, float]:
        """The share of the pairs that goes to each held-out split without files of its own."""
        return {
            split: getattr(self, f"{split}_fraction")
            for split in ("valid", "test")
            if getattr(self, f"{split}_pairs") is None
        }

    def recorded(self) -> dict[str, Any]:
        """The options that change the result, as JSON values."""
        left_out = ("out", "overwrite", "langs", *FILES)
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        size = self.vocab_size or DEFAULT_VOCAB_SIZE
        return {**values, "vocab_size": size, "langs": list(self.languages)}

    def validate(self) -> None:
        """Raise `OptionError` for the first invalid value."""
        source, target = self.languages
        if not (source.isalnum() and target.isalnum()) or source == target:
            raise OptionError(
                "langs",
                " ".join(self.languages),
                "names of two languages are needed, from the files' suffixes (text.de text.en) or "
                "--langs de en",
            )
        for name in FILES:
            for file in getattr(self, name) or ():
                if not Path(file).is_file():
                    raise OptionError(name, file, "no such file")
        for option in ("min_length", "max_length", "vocab_size", "sample_bytes"):
            if (value := getattr(self, option)) is not None and value < 1:
                raise OptionError(option, value, "give a number of at least 1")
        if self.max_length is not None and self.max_length < self.min_length:
            raise OptionError(
                "max_length", self.max_length, f"give at least --min-length ({self.min_length})"
            )
        if self.max_length_ratio is not None and self.max_length_ratio < 1:
            raise OptionError(
                "max_length_ratio",
                self.max_length_ratio,
                "it is the longer side over the shorter: give 1 or more, such as 1.5",
            )
        for split, share in self.fractions.items():
            if not 0 < share < 1:
                raise OptionError(f"{split}_fraction", share, "a number between 0 and 1")
        if sum(self.fractions.values()) >= 1:
            raise OptionError(
                "valid_fraction", self.valid_fraction, "nothing is left for training; give less"
            )

    def keeps(self, source: int, target: int) -> bool:
        """Whether a pair of so many tokens is trained on."""
        short, long = sorted((source, target))
        if short < self.min_length or (self.max_length and long > self.max_length):
            return False
        return self.max_length_ratio is None or long <= self.max_length_ratio * max(short, 1)
