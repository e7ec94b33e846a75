"""The tokenizer that `prepare` is given: its files, checks, and what is recorded of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomoe_plugin.checkpoint.atomic_files import sha256
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.huggingface_tokenizer import (
    HuggingFaceTokenizer,
    embedding_rows,
    tokenizer_files,
)
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.tokenizers import (
    GPT2_ENCODER,
    GPT2_MERGES,
    GPT2_SHA256,
    SENTENCEPIECE_MODEL,
    GPT2Tokenizer,
    SentencePieceTokenizer,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GivenTokenizer:
    """Empty if a tokenizer is trained."""

    option: str
    value: str
    files: dict[str, Path]  # by their names in the data folder
    embedding_rows: int | None = None  # of the model that a tokenizer.json lies next to

    @classmethod
    def of(cls, options: PrepareOptions) -> GivenTokenizer:
        """Raises OptionError for a missing file."""
        if (path := options.tokenizer) is not None:
            return cls("tokenizer", path, tokenizer_files(path), embedding_rows(path))
        option, names, paths = "", tuple[str, ...](), tuple[str, ...]()
        if options.sentencepiece_model is not None:
            option, names = "sentencepiece_model", (SENTENCEPIECE_MODEL,)
            paths = (options.sentencepiece_model,)
        elif options.gpt2_bpe is not None:
            option, names, paths = "gpt2_bpe", (GPT2_ENCODER, GPT2_MERGES), options.gpt2_bpe
        for path in paths:
            if not Path(path).is_file():
                raise OptionError(option, path, "no such file")
        return cls(option, " ".join(paths), dict(zip(names, map(Path, paths), strict=True)))

    def recorded(self) -> dict[str, Any]:
        """What identifies it, as JSON values."""
        if not self.files:
            return {}
        hashes = {name: sha256(path) for name, path in self.files.items()}
        if self.option == "tokenizer":
            return {"tokenizer": {**hashes, "embedding rows": self.embedding_rows}}
        if self.option == "gpt2_bpe" and hashes != GPT2_SHA256:
            files = self.value
            logger.warning("--gpt2-bpe %s: not the published files of GPT-2 (by SHA-256)", files)
        return {self.option: list(hashes.values())}

    def check(self) -> None:
        """Raises OptionError for files that are no such tokenizer."""
        if self.option == "sentencepiece_model":
            SentencePieceTokenizer(*self.files.values())
        elif self.option == "gpt2_bpe":
            GPT2Tokenizer(*self.files.values())
        elif self.option == "tokenizer":
            ids = len(HuggingFaceTokenizer(self.files).tokens)
            if self.embedding_rows is not None and ids > self.embedding_rows:
                fault = (
                    f"has {ids:,} token ids, but the embedding of the model next to it has "
                    f"{self.embedding_rows:,} rows (vocab_size of config.json): give the tokenizer "
                    "of this model, or tokenizer.json in a folder of its own"
                )
                raise OptionError("tokenizer", self.value, fault)
