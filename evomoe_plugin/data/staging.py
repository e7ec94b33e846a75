"""Staging: divide the text of all inputs into splits, and each split into independent shards.

A shard is a file with one passage per line: the JSON list [text, ends_document] in ASCII, so that
fairseq's line reader cannot mistake a character of the text for the end of a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.documents import Passage, read_documents
from evomoe_plugin.data.files import write_atomically
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
    inputs: list[dict] = field(default_factory=list)  # name, split, bytes, sha256 of files read
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


def shard_prefix(work: Path, split: str, number: int) -> Path:
    return work / f"{split}-{number:06d}"


def passages_path(prefix: Path) -> Path:
    return prefix.with_suffix(".passages")


def shard_prefixes(work: Path, split: str, staged: Staged) -> list[Path]:
    return [shard_prefix(work, split, number) for number in range(staged.splits[split].shards)]


def read_passages(
    prefix: Path, wanted: Callable[[], bool] = lambda: True
) -> Iterator[Passage]:
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
    if any(not staged.splits[split].documents for split in ("train", *options.fractions)):
        ranked = splitter.ranked()
        if ranked is not None:
            staged = _Stager(options, ranked, work, lambda _: None).run(sources)
    _check_no_split_is_empty(staged, options)
    return staged


class _Stager:
    def __init__(
        self, options: PrepareOptions, splitter: Splitter, work: Path, advance: Advance
    ):
        self.options, self.splitter, self.advance = options, splitter, advance
        self.left = options.max_bytes  # remaining bytes of the INPUTs
        self.staged = Staged()
        self.shards = {split: _ShardWriter(work, split, self.staged.splits[split])
                       for split in SPLITS}

    def run(self, sources: list[SourceFile]) -> Staged:
        try:
            for source in sources:
                if source.split is None and self.left == 0:
                    self.staged.files_not_read += 1
                    continue
                self.staged.inputs.append({"name": source.name, "split": source.split,
                                           "bytes": source.bytes, "sha256": source.sha256()})
                self._stage_documents(source)
        finally:
            for shard in self.shards.values():
                shard.close()
        return self.staged

    def _stage_documents(self, source: SourceFile) -> None:
        split = None  # of the current document
        for passage in read_documents(source, self.options, self.advance):
            if split is None and passage.ends_document and not passage.text.strip():
                self.staged.empty_documents += 1
                continue
            starts = split is None
            if starts:
                split = source.split or self.splitter.split_of(passage.text)
            if source.split is None and self.left is not None:
                passage = self._within_limit(passage)
                if self.left == 0 and starts and not passage.text.strip():
                    return
            self.shards[split].write(passage, starts)
            if source.split is None and self.left == 0:
                return
            if passage.ends_document:
                split = None

    def _within_limit(self, passage: Passage) -> Passage:
        """The passage, cut at `--max-bytes`, where its document then ends."""
        text = passage.text.encode()
        if len(text) > self.left:
            text = text[:text.rfind(b"\n", 0, self.left) + 1 or self.left]
            self.left = 0
        else:
            self.left -= len(text)
        return Passage(text.decode("utf-8", "ignore"), passage.ends_document or self.left == 0)


class _ShardWriter:
    def __init__(self, work: Path, split: str, counts: StagedSplit):
        self.work, self.split, self.counts = work, split, counts
        self.stream = None

    def write(self, passage: Passage, starts_document: bool) -> None:
        if self.stream is None:
            prefix = shard_prefix(self.work, self.split, self.counts.shards)
            self.stream = open(passages_path(prefix), "w", encoding="ascii")
            self.counts.shards += 1
        self.stream.write(json.dumps(passage) + "\n")
        self.counts.passages += 1
        self.counts.documents += starts_document
        self.counts.bytes += len(passage.text.encode())
        if self.stream.tell() >= SHARD_BYTES:
            self.close()

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None


def _check_no_split_is_empty(staged: Staged, options: PrepareOptions) -> None:
    counts = {split: staged.splits[split].documents for split in SPLITS}
    for split in SPLITS:
        if counts[split]:
            continue
        if split != "train" and getattr(options, split):
            raise OptionError(split, " ".join(getattr(options, split)), "contains no text")
        total = sum(counts[name] for name in ("train", *options.fractions))
        if not total:
            raise OptionError("INPUT", " ".join(options.inputs), "contains no text")
        wanted = ", ".join(("train", *options.fractions))
        if total <= 1000:
            raise OptionError(
                "INPUT", " ".join(options.inputs),
                f"has too few distinct documents ({total}) for {wanted}; "
                "--documents-by blank-line splits text files further, --valid and --test "
                "name separate files",
            )
        raise OptionError(f"{split}_fraction", options.fractions.get(split),
                          f"none of {total} documents fell into {split}; choose a larger fraction")
