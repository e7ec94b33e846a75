"""`prepare`: from text files to a data folder for `--task language_modeling`."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import logging
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import evomoe_plugin
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data.card import DataCard, options_difference
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.progress import Progress
from evomoe_plugin.data.sources import SourceFile, find_sources, inputs_difference, sha256
from evomoe_plugin.data.splits import SPLITS
from evomoe_plugin.data.staging import Staged, shard_prefixes, stage
from evomoe_plugin.data.tokenizers import (
    GPT2_SHA256,
    SENTENCEPIECE_MODEL,
    GPT2Tokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from evomoe_plugin.data.train_sentencepiece import train_sentencepiece
from evomoe_plugin.data.workers import Workers

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

DICTIONARY = "dict.txt"
_PACKAGES = ("ve-fairseq", "fairseq-fixed", "fairseq", "sentencepiece", "pyarrow", "numpy")


def prepare(options: PrepareOptions, progress: Progress | None = None) -> DataCard:
    """Write `options.out` and return its card; if it exists already, only return its card.

    Raises OptionError for bad input, RunFailed if the disk is full or a process dies. In any case
    `options.out` is a complete data set, the old or the new one, or does not exist. An interrupted
    run keeps its work in a sibling folder, and the next one with equal options continues it.
    """
    options.validate()
    progress = progress or Progress()
    folder = OutputFolder(options.out)
    with _explained(options):
        sources = find_sources(options)
        recorded = options.recorded() | _given_tokenizer(options)
        with folder.locked():
            try:
                card = _already_prepared(folder, options, recorded, sources)
                if card is not None:
                    folder.discard()
                    progress.say(f"already prepared: {options.out}")
                    return card
                return _Preparation(options, recorded, sources, folder, progress).run()
            except BaseException as error:
                if isinstance(error, OptionError) or _is_full(error) or not folder.can_continue():
                    folder.discard()
                raise


class _Preparation:
    def __init__(
        self, options: PrepareOptions, recorded: dict, sources: list[SourceFile],
        folder: OutputFolder, progress: Progress,
    ):
        self.options, self.recorded, self.sources = options, recorded, sources
        self.work, self.data = folder.work, folder.data
        self.folder, self.progress = folder, progress

    def run(self) -> DataCard:
        staged = self._stage()
        evomoe_plugin.register()  # before the workers are forked: they need fairseq too
        with Workers(self.options.processes, self.progress.tick) as workers:
            tokenizer = self._make_tokenizer(staged, workers)
            rows, counts = self._binarize(tokenizer, staged, workers)
        card = self._card(tokenizer, staged, rows, counts)
        card.save(self.data)
        self.folder.publish()
        return card

    def _stage(self) -> Staged:
        staged = Staged.load(self.work)
        if (staged is not None and staged.options == self.recorded
                and not inputs_difference(staged.inputs, staged.files_not_read, self.sources)):
            self.progress.say("continuing an interrupted run")
            return staged
        self.folder.start()
        self._copy_tokenizer()
        with self.progress.stage("read", sum(source.bytes for source in self.sources)) as message:
            staged = stage(self.sources, self.options, self.work, self.progress.advance)
            documents = ", ".join(f"{staged.splits[split].documents:,} {split}" for split in SPLITS)
            size = sum(split.bytes for split in staged.splits.values())
            message.append(f"{len(staged.inputs):,} files, {size / 1e6:,.1f} MB of text; "
                           f"documents: {documents}")
        staged.options = self.recorded
        staged.save(self.work)
        return staged

    def _copy_tokenizer(self) -> None:
        """Copy a given tokenizer; an invalid one is rejected before text is read."""
        if model := self.options.sentencepiece_model:
            SentencePieceTokenizer(Path(model))
            shutil.copyfile(model, self.data / SENTENCEPIECE_MODEL)
        if files := self.options.gpt2_bpe:
            GPT2Tokenizer(*map(Path, files))
            for file, name in zip(files, GPT2_SHA256, strict=True):
                shutil.copyfile(file, self.data / name)

    def _make_tokenizer(self, staged: Staged, workers: Workers) -> Tokenizer:
        model = self.data / SENTENCEPIECE_MODEL
        if self.options.trains_tokenizer and not model.exists():
            size, entries = staged.splits["train"].bytes, self.recorded["vocab_size"]
            share = min(1.0, self.options.sample_bytes / size)
            with self.progress.stage("tokenizer") as message:
                workers.run(train_sentencepiece, shard_prefixes(self.work, "train", staged), model,
                            entries, share, self.options.seed)
                message.append(f"SentencePiece, {entries:,} entries, from "
                               f"{size * share / 1e6:,.1f} MB of the train split")
        return load_tokenizer(self.data)

    def _binarize(
        self, tokenizer: Tokenizer, staged: Staged, workers: Workers
    ) -> tuple[int, dict[str, np.ndarray]]:
        """Size of the dictionary, and the count of each of the tokenizer's ids by split."""
        import numpy as np

        from evomoe_plugin.data import binarize

        vocabulary, prefixes = tokenizer.tokens, {split: self.data / split for split in SPLITS}
        ids = len(vocabulary) + 1
        rows = len(binarize.make_dictionary(vocabulary, np.zeros(ids, dtype=np.int64)))
        shards = {split: shard_prefixes(self.work, split, staged) for split in SPLITS}
        every = [shard for split in SPLITS for shard in shards[split]]
        to_do = [shard for shard in every if not binarize.is_binarized(shard)]
        with self.progress.stage("binarise", len(every)) as message:
            self.progress.advance(len(every) - len(to_do))
            for _ in workers.map(
                binarize.binarize_shard,
                [(shard, str(self.data), max(rows, ids)) for shard in to_do],
            ):
                self.progress.advance(1)
            counts = {}
            for split, prefix in prefixes.items():
                binarize.merge(shards[split], prefix, max(rows, ids))
                counts[split] = binarize.count_ids(prefix, ids)
            dictionary = binarize.make_dictionary(vocabulary, counts["train"])
            dictionary.save(str(self.data / DICTIONARY))
            for prefix in prefixes.values():
                binarize.convert_ids(dictionary, vocabulary, prefix)
            message.append("tokens: " + ", ".join(f"{counts[split].sum():,} {split}"
                                                  for split in SPLITS))
        return rows, counts

    def _card(
        self, tokenizer: Tokenizer, staged: Staged, rows: int, counts: dict[str, np.ndarray]
    ) -> DataCard:
        unknown = [i for i, token in enumerate(tokenizer.tokens) if token is None]
        splits = {
            split: {"documents": staged.splits[split].documents,
                    "items": staged.splits[split].passages,
                    "bytes": staged.splits[split].bytes,
                    "tokens": int(count.sum()),
                    "unknown_tokens": int(count[unknown].sum())}
            for split, count in counts.items()
        }
        if total := sum(split["unknown_tokens"] for split in splits.values()):
            self.progress.say(f"warning: {total:,} tokens are unknown to the tokenizer")
        files = sorted(self.data.iterdir())
        return DataCard(
            options=self.recorded,
            tokenizer={"kind": tokenizer.kind, "rows": rows, "lossless": tokenizer.lossless,
                       "flags": list(tokenizer.flags)},
            splits=splits,
            empty_documents=staged.empty_documents,
            inputs=staged.inputs,
            files_not_read=staged.files_not_read,
            files={file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
                   for file in files},
            versions=_versions(),
        )


def _already_prepared(
    folder: OutputFolder, options: PrepareOptions, recorded: dict, sources: list[SourceFile]
) -> DataCard | None:
    card = folder.card()
    if card is None or options.overwrite:
        return None
    difference = options_difference(card.options, recorded) or inputs_difference(
        card.inputs, card.files_not_read, sources
    )
    if difference:
        raise OptionError("out", options.out, "contains a data set with other inputs or options "
                          f"({difference}); give another folder, or pass --overwrite to replace it")
    if damaged := card.damage(folder.path):
        raise OptionError("out", options.out, f"its {damaged} does not match the data card; "
                          "pass --overwrite to rebuild it")
    return card


def _given_tokenizer(options: PrepareOptions) -> dict[str, list[str]]:
    """The hashes of given tokenizer files, for the record."""
    given = {"sentencepiece_model": [options.sentencepiece_model] if options.sentencepiece_model
             else [], "gpt2_bpe": options.gpt2_bpe or ()}
    recorded = {}
    for option, paths in given.items():
        for path in paths:
            if not Path(path).is_file():
                raise OptionError(option, path, "no such file")
        if paths:
            recorded[option] = [sha256(path) for path in paths]
    if options.gpt2_bpe and recorded["gpt2_bpe"] != list(GPT2_SHA256.values()):
        logger.warning("--gpt2-bpe %s: not the published files of GPT-2 (SHA-256 %s)",
                       " ".join(options.gpt2_bpe), ", ".join(GPT2_SHA256.values()))
    return recorded


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "evomoe_plugin": evomoe_plugin.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def _explained(options: PrepareOptions) -> Iterator[None]:
    """Report an OSError in one line."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            raise RunFailed(f"--out {options.out}: no space left on the disk; the partial output "
                            "has been removed, nothing else is changed") from error
        if error.filename is None:
            raise
        raise RunFailed(f"{error.filename}: {error.strerror}") from error
