"""Staging: divide the text of all inputs into splits, and each split into independent shards.

A shard is a file with one passage per line: the JSON list of its fields in ASCII, so that no
character of the text can be mistaken for the end of a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from evomoe_plugin.checkpoint.atomic_files import sha256, write_atomically
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.documents import Passage, read_documents
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.readers import Advance
from evomoe_plugin.data.sources import SourceFile
from evomoe_plugin.data.splits import SPLITS, Splitter

SHARD_BYTES = 2 << 20
STAGED = "staged.json"


@dataclass
class StagedSplit:
    documents: int = 0
    passages: int = 0
    bytes: int = 0  # of UTF-8
    shards: int = 0


@dataclass
class Staged:
    """What was staged, its inputs and options; a later run compares them before continuing."""

    options: dict = field(default_factory=dict)
    inputs: list[dict] = field(default_factory=list)  # of files read: see `DataCard`
    files_not_read: int = 0
    empty_documents: int = 0
    splits: dict[str, StagedSplit] = field(
        default_factory=lambda: {split: StagedSplit() for split in SPLITS}
    )

    def save(self, work: Path) -> None:
        write_atomically(work / STAGED, json.dumps(asdict(self)))

    @classmethod
    def load(cls, work: Path) -> Staged | None:
        try:
            values = json.loads((work / STAGED).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        values["splits"] = {name: StagedSplit(**v) for name, v in values["splits"].items()}
        return cls(**values)


def passages_path(prefix: Path) -> Path:
    return prefix.with_suffix(".passages")


def shard_prefixes(work: Path, split: str, staged: Staged) -> list[Path]:
    return [work / f"{split}-{number:06d}" for number in range(staged.splits[split].shards)]


def read_passages(prefix: Path, wanted: Callable[[], bool] = lambda: True) -> Iterator[Passage]:
    """The passages of a shard for which `wanted()` is true; others are not parsed."""
    with open(passages_path(prefix), encoding="ascii") as lines:
        for line in lines:
            if wanted():
                yield Passage(*json.loads(line))


def stage(
    sources: list[SourceFile], options: PrepareOptions, work: Path, advance: Advance
) -> Staged:
    """Write the shards of every split under `work`. Raises OptionError if a split is empty.

    `advance` is called with the number of bytes read.
    """
    splitter = Splitter(options.seed, options.fractions)
    staged = _Stager(options, splitter, work, advance).run(sources)
    empty = any(not staged.splits[split].documents for split in ("train", *options.fractions))
    if empty and (ranked := splitter.ranked()):
        staged = _Stager(options, ranked, work, lambda _: None).run(sources)
    _check_no_split_is_empty(staged, options)
    return staged


class _Stager:
    def __init__(self, options: PrepareOptions, splitter: Splitter, work: Path, advance: Advance):
        self.options, self.splitter, self.advance = options, splitter, advance
        self.left = math.inf if options.max_bytes is None else options.max_bytes  # of the INPUTs
        self.staged = Staged()
        self.shards = {
            split: _ShardWriter(work, split, self.staged.splits[split]) for split in SPLITS
        }

    def run(self, sources: list[SourceFile]) -> Staged:
        try:
            for source in sources:
                if source.split is None and not self.left:
                    self.staged.files_not_read += 1
                    continue
                before = self._items()
                self._stage_documents(source)
                self.staged.inputs.append(
                    {
                        "name": source.name,
                        "split": source.split,
                        "bytes": source.bytes,
                        "sha256": sha256(source.path),
                        "items": {split: n - before[split] for split, n in self._items().items()},
                    }
                )
        finally:
            for shard in self.shards.values():
                shard.close()
        return self.staged

    def _items(self) -> dict[str, int]:
        return {split: counts.passages for split, counts in self.staged.splits.items()}

    def _stage_documents(self, source: SourceFile) -> None:
        split = None  # of the current document
        for passage in read_documents(source, self.options, self.advance):
            if split is None and passage.ends_document and not passage.text.strip():
                self.staged.empty_documents += 1
                continue
            starts, at_limit = split is None, False
            split = split or source.split or self.splitter.split_of(passage.text)
            if source.split is None:
                passage = self._within_limit(passage)
                at_limit = not self.left
            if not (at_limit and starts) or passage.text.strip():
                self.shards[split].write(passage._replace(starts_document=starts))
            if at_limit:
                return
            if passage.ends_document:
                split = None

    def _within_limit(self, passage: Passage) -> Passage:
        """The passage, cut at `--max-bytes`, where its document then ends."""
        text = passage.text.encode()
        if len(text) > self.left:
            limit = int(self.left)
            text = text[: text.rfind(b"\n", 0, limit) + 1 or limit]
            self.left = 0
        else:
            self.left -= len(text)
        return Passage(text.decode("utf-8", "ignore"), passage.ends_document or not self.left)


class _ShardWriter:
    def __init__(self, work: Path, split: str, counts: StagedSplit):
        self.work, self.split, self.counts = work, split, counts
        self.stream: TextIO | None = None

    def write(self, passage: Passage) -> None:
        if self.stream is None:
            path = passages_path(self.work / f"{self.split}-{self.counts.shards:06d}")
            self.stream = open(path, "w", encoding="ascii")
            self.counts.shards += 1
        self.stream.write(json.dumps(passage) + "\n")
        self.counts.passages += 1
        self.counts.documents += passage.starts_document
        self.counts.bytes += len(passage.text.encode())
        if self.stream.tell() >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def _check_no_split_is_empty(staged: Staged, options: PrepareOptions) -> None:
    wanted, inputs = ("train", *options.fractions), " ".join(options.inputs)
    total = sum(staged.splits[split].documents for split in wanted)
    for split in (split for split in SPLITS if not staged.splits[split].documents):
        if given := getattr(options, split, ()):
            raise OptionError(split, " ".join(given), "contains no text")
        if not total:
            raise OptionError("INPUT", inputs, "contains no text")
        if total > 1000:
            fault = f"none of {total} documents fell into {split}; choose a larger fraction"
            raise OptionError(f"{split}_fraction", options.fractions.get(split), fault)
        fault = f"has too few distinct documents ({total}) for {', '.join(wanted)}"
        raise OptionError(
            "INPUT",
            inputs,
            f"{fault}; --documents-by blank-line splits text files "
            "further, --valid and --test name separate files",
        )
