"""`prepare`: from text files to a data folder for `--task language_modeling`."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import evomoe_plugin
from evomoe_plugin.checkpoint.atomic_files import sha256
from evomoe_plugin.config.errors import OptionError, RunFailed
from evomoe_plugin.data.card import DataCard, options_difference
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.given_tokenizer import GivenTokenizer
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.progress import Progress
from evomoe_plugin.data.sources import SourceFile, find_sources, inputs_difference
from evomoe_plugin.data.splits import SPLITS
from evomoe_plugin.data.staging import STAGED, Staged, shard_prefixes, stage
from evomoe_plugin.data.tokenizers import SENTENCEPIECE_MODEL, Tokenizer, load_tokenizer
from evomoe_plugin.data.train_sentencepiece import train_sentencepiece
from evomoe_plugin.data.workers import Workers

if TYPE_CHECKING:
    import numpy as np

DICTIONARY = "dict.txt"
_PACKAGES = "ve-fairseq fairseq-fixed fairseq sentencepiece tokenizers pyarrow numpy".split()


def prepare(options: PrepareOptions, progress: Progress | None = None) -> DataCard:
    """Write `options.out` and return its card; if it exists already, only return its card.

    Raises OptionError for bad input, RunFailed if the disk is full or a process dies. In any case
    `options.out` is a complete data set, the old or the new one, or does not exist. An interrupted
    run keeps its work in a sibling folder, and the next one with equal options continues it.
    """
    options.validate()
    progress = progress or Progress()
    folder = OutputFolder(options.out)
    with explained(options.out):
        sources = find_sources(options)
        given = GivenTokenizer.of(options)
        recorded = options.recorded() | given.recorded()
        with folder.locked():
            try:
                card = folder.prepared(
                    options.overwrite, lambda card: _difference(card, recorded, sources)
                )
                if card is not None:
                    progress.say(f"already prepared: {options.out}")
                    return card
                return _Preparation(options, given, recorded, sources, folder, progress).run()
            except BaseException as error:
                continues = (folder.work / STAGED).exists()
                if isinstance(error, OptionError) or _is_full(error) or not continues:
                    folder.discard()
                raise


@dataclass
class _Preparation:
    options: PrepareOptions
    given: GivenTokenizer
    recorded: dict[str, Any]
    sources: list[SourceFile]
    folder: OutputFolder
    progress: Progress

    def __post_init__(self) -> None:
        self.work, self.data = self.folder.work, self.folder.data

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
        if staged and not _difference(staged, self.recorded, self.sources):
            self.progress.say("continuing an interrupted run")
            return staged
        self.folder.start()
        self._copy_tokenizer()
        with self.progress.stage("read", sum(source.bytes for source in self.sources)) as message:
            staged = stage(self.sources, self.options, self.work, self.progress.advance)
            size = sum(split.bytes for split in staged.splits.values())
            counts = ", ".join(f"{of.documents:,} {split}" for split, of in staged.splits.items())
            message.append(f"{len(staged.inputs):,} files, {size / 1e6:,.1f} MB of text;")
            message.append(f"documents: {counts}")
        staged.options = self.recorded
        staged.save(self.work)
        return staged

    def _copy_tokenizer(self) -> None:
        """Copy a given tokenizer; an invalid one is rejected before text is read."""
        self.given.check()
        for name, file in self.given.files.items():
            shutil.copyfile(file, self.data / name)

    def _make_tokenizer(self, staged: Staged, workers: Workers) -> Tokenizer:
        model = self.data / SENTENCEPIECE_MODEL
        if self.options.trains_tokenizer and not model.exists():
            size, entries = staged.splits["train"].bytes, self.recorded["vocab_size"]
            share = min(1.0, self.options.sample_bytes / size)
            shards = shard_prefixes(self.work, "train", staged)
            with self.progress.stage("tokenizer") as message:
                message.append(f"SentencePiece, {entries:,} entries, from")
                message.append(f"{size * share / 1e6:,.1f} MB of the train split")
                arguments = shards, model, entries, share, self.options.seed
                workers.run(train_sentencepiece, *arguments)
        tokenizer = load_tokenizer(self.data)
        if isinstance(tokenizer, HuggingFaceTokenizer):
            special = ", ".join(
                f"{name} {token.word} {token.id}" for name, token in tokenizer.special.items()
            )
            self.progress.say(f"tokenizer  {len(tokenizer.tokens):,} token ids; {special}")
        return tokenizer

    def _binarize(
        self, tokenizer: Tokenizer, staged: Staged, workers: Workers
    ) -> tuple[int, dict[str, np.ndarray]]:
        """Size of the dictionary, and the count of each of the tokenizer's ids by split."""
        from evomoe_plugin.data import binarize

        prefixes = {split: self.data / split for split in SPLITS}
        ids, embedding_rows = len(tokenizer.tokens) + 1, self.given.embedding_rows
        rows = len(binarize.make_dictionary(tokenizer, [0] * ids, embedding_rows))
        shards = {split: shard_prefixes(self.work, split, staged) for split in SPLITS}
        every = [shard for split in SPLITS for shard in shards[split]]
        to_do = [shard for shard in every if not binarize.is_binarized(shard)]
        with self.progress.stage("binarise", len(every)) as message:
            self.progress.advance(len(every) - len(to_do))
            arguments = [(shard, str(self.data), max(rows, ids)) for shard in to_do]
            for _ in workers.map(binarize.binarize_shard, arguments):
                self.progress.advance(1)
            counts = {}
            for split, prefix in prefixes.items():
                binarize.merge(shards[split], prefix, max(rows, ids))
                counts[split] = binarize.count_ids(prefix, ids)
            train = counts["train"].tolist()
            dictionary = binarize.make_dictionary(tokenizer, train, embedding_rows)
            dictionary.save(str(self.data / DICTIONARY))
            for prefix in prefixes.values():
                binarize.convert_ids(dictionary, tokenizer, prefix)
            totals = ", ".join(f"{count.sum():,} {split}" for split, count in counts.items())
            message.append(f"tokens: {totals}")
        return rows, counts

    def _card(
        self, tokenizer: Tokenizer, staged: Staged, rows: int, counts: dict[str, np.ndarray]
    ) -> DataCard:
        unknown = [i for i, token in enumerate(tokenizer.tokens) if token is None]
        splits = {}
        for split, count in counts.items():
            of = staged.splits[split]
            splits[split] = {
                "documents": of.documents,
                "items": of.passages,
                "bytes": of.bytes,
                "tokens": int(count.sum()),
                "unknown_tokens": int(count[unknown].sum()),
            }
        if total := sum(split["unknown_tokens"] for split in splits.values()):
            self.progress.say(f"warning: {total:,} tokens are unknown to the tokenizer")
        return DataCard(
            options=self.recorded,
            tokenizer={
                "kind": tokenizer.kind,
                "rows": rows,
                "lossless": tokenizer.lossless,
                "flags": tokenizer.flags.split(),
                **_special_tokens(tokenizer),
            },
            splits=splits,
            empty_documents=staged.empty_documents,
            inputs=staged.inputs,
            files_not_read=staged.files_not_read,
            files={
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in sorted(self.data.iterdir())
            },
            versions=versions(),
        )


def _difference(before: DataCard | Staged, recorded: dict, sources: list[SourceFile]) -> str | None:
    return options_difference(before.options, recorded) or inputs_difference(
        before.inputs, before.files_not_read, sources
    )


def _special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return {}
    return {"special": {name: token.id for name, token in tokenizer.special.items()}}


def versions() -> dict[str, str]:
    """Of Python and the packages that a data set depends on."""
    found = {"python": platform.python_version(), "evomoe_plugin": evomoe_plugin.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def explained(out: str) -> Iterator[None]:
    """Report an OSError, while writing the folder `out`, in one line."""
    try:
        yield
    except OSError as error:
        if _is_full(error):
            fault = "no space left on the disk; the partial output has been removed"
            raise RunFailed(f"--out {out}: {fault}") from error
        if isinstance(error, BrokenPipeError):  # of the terminal
            raise
        where = error.filename or f"--out {out}"  # a failed write does not say of what
        raise RunFailed(f"{where}: {error.strerror or error}") from error
