"""`evomoe prepare --pairs`: two parallel files to a data folder for `--task translation`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import evomoe_plugin
from evomoe_plugin.checkpoint.atomic_files import sha256
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.card import DataCard, options_difference
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.options import DEFAULT_VOCAB_SIZE
from evomoe_plugin.data.pipeline import explained, versions
from evomoe_plugin.data.progress import Progress
from evomoe_plugin.data.splits import SPLITS, Splitter
from evomoe_plugin.data.tokenizers import SentencePieceTokenizer

_FILES = ("pairs", "valid_pairs", "test_pairs")


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
        left_out = ("out", "overwrite", "langs", *_FILES)
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
        for name in _FILES:
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


class PairCard(DataCard):
    """The card of a folder for translation."""

    @property
    def usage(self) -> str:
        source, target = self.options["langs"]
        joint = " --share-all-embeddings" * (not self.options["separate_vocabularies"])
        pair = f"--source-lang {source} --target-lang {target} --user-dir evomoe_plugin"
        return f"""\
    fairseq-train DATA --task translation {pair} \\
        --arch transformer_tiny_moe{joint} …
    fairseq-generate DATA --task translation {pair} \\
        --path CHECKPOINT --remove-bpe sentencepiece --scoring sacrebleu
    fairseq-interactive DATA --task translation {pair} \\
        --path CHECKPOINT {" ".join(self.tokenizer["flags"])}"""


def prepare_pairs(options: PairOptions, progress: Progress | None = None) -> DataCard:
    """Write `options.out` and return its card; if it exists already, only return its card.

    Raises OptionError for bad input, RunFailed if the disk is full. In any case `options.out` is a
    complete data set, the old or the new one, or does not exist.
    """
    options.validate()
    progress = progress or Progress()
    folder = OutputFolder(options.out)
    with explained(options.out):
        inputs = [
            {
                "name": Path(file).name,
                "split": None if name == "pairs" else name.removesuffix("_pairs"),
                "bytes": Path(file).stat().st_size,
                "sha256": sha256(Path(file)),
            }
            for name in _FILES
            for file in getattr(options, name) or ()
        ]
        with folder.locked():
            card = folder.card()
            if card is not None and not options.overwrite:
                difference = options_difference(card.options, options.recorded())
                if difference is None and card.inputs == inputs:
                    folder.discard()
                    progress.say(f"already prepared: {options.out}")
                    return PairCard(**vars(card))
                fault = difference or "its files were others"
                raise OptionError(
                    "out",
                    options.out,
                    f"contains a data set with other inputs or options ({fault}); pass --overwrite "
                    "to replace it",
                )
            try:
                folder.start()
                card = _Preparation(options, folder, progress, inputs).run()
            except BaseException:
                folder.discard()
                raise
    return card


class _Preparation:
    def __init__(
        self, options: PairOptions, folder: OutputFolder, progress: Progress, inputs: list[dict]
    ):
        self.options, self.folder, self.progress = options, folder, progress
        self.inputs = inputs
        self.langs = options.languages

    def run(self) -> DataCard:
        empty, sizes = self._split()
        evomoe_plugin.register()  # takes seconds: after the files were found to be parallel
        tokenizers = self._tokenizers(sizes["train"])
        counts, dropped = self._encode(tokenizers)
        rows, unknown = self._finish(tokenizers, counts)
        one = tokenizers[0]
        models = sorted(path.name for path in self.folder.data.glob("*.model"))
        first = models[0] if len(models) == 1 else f"sentencepiece.{self.langs[0]}.model"
        card = PairCard(
            options=self.options.recorded(),
            tokenizer={
                "kind": one.kind,
                "rows": rows,
                "lossless": one.lossless,
                "flags": f"--bpe sentencepiece --sentencepiece-model DATA/{first}".split(),
            },
            splits={
                split: {
                    "documents": counts[split]["pairs"],
                    "items": 2 * counts[split]["pairs"],
                    "bytes": sizes[split],
                    "tokens": counts[split]["tokens"],
                    "unknown_tokens": unknown,
                }
                for split in SPLITS
            },
            empty_documents=empty + dropped,
            inputs=self.inputs,
            files_not_read=0,
            files={
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}
                for file in sorted(self.folder.data.iterdir())
            },
            versions=versions(),
        )
        card.save(self.folder.data)
        self.folder.publish()
        return card

    def _text(self, split: str, lang: str) -> Path:
        return self.folder.work / f"{split}.{lang}.txt"

    def _split(self) -> tuple[int, dict[str, int]]:
        """Write the pairs of each split; the number of pairs without text, and bytes by split."""
        splitter = Splitter(self.options.seed, self.options.fractions)
        with self.progress.stage("read") as message:
            found = self._write(splitter)
            if any(not found[split] for split in SPLITS) and (ranked := splitter.ranked()):
                found = self._write(ranked)
            for split in SPLITS:
                if not found[split]:
                    raise OptionError(
                        "pairs",
                        " ".join(self.options.pairs),
                        f"has too few pairs: none is left for {split}; give --{split}-pairs"
                        if split != "train"
                        else "contains no text",
                    )
            message.append(", ".join(f"{found[split]:,} {split}" for split in SPLITS) + " pairs")
        sizes = {
            split: sum(self._text(split, lang).stat().st_size for lang in self.langs)
            for split in SPLITS
        }
        return found["empty"], sizes

    def _write(self, splitter: Splitter) -> Counter[str]:
        found: Counter[str] = Counter()
        files = {
            split: [open(self._text(split, lang), "w", encoding="utf-8") for lang in self.langs]
            for split in SPLITS
        }
        try:
            for name in _FILES:
                given = None if name == "pairs" else name.removesuffix("_pairs")
                for source, target in read_pairs(name, getattr(self.options, name)):
                    if not (source and target):
                        found["empty"] += 1
                        continue
                    split = given or splitter.split_of(f"{source}\t{target}")
                    found[split] += 1
                    for file, line in zip(files[split], (source, target), strict=True):
                        file.write(f"{line}\n")
        finally:
            for file in (file for pair in files.values() for file in pair):
                file.close()
        return found

    def _tokenizers(self, train_bytes: int) -> list[SentencePieceTokenizer]:
        """Of source and target: one model for both, unless vocabularies are separate."""
        from evomoe_plugin.data.train_sentencepiece import (
            MAX_LINE_CHARS,
            train_on_lines,
            trainable_lines,
        )

        share = min(1.0, self.options.sample_bytes / train_bytes)
        size = self.options.vocab_size or DEFAULT_VOCAB_SIZE
        separate = self.options.separate_vocabularies
        groups = [(lang,) for lang in self.langs] if separate else [self.langs]
        tokenizers = []
        with self.progress.stage("tokenizer") as message:
            message.append(f"SentencePiece, {size:,} entries{' each' * separate}")
            for group in groups:
                name = f"sentencepiece.{group[0]}.model" if separate else "sentencepiece.model"
                draw = random.Random(self.options.seed)
                lines = (
                    part[:MAX_LINE_CHARS]
                    for lang in group
                    for line in _lines(self._text("train", lang))
                    if draw.random() < share
                    for part in trainable_lines(line)
                )
                train_on_lines(lines, self.folder.data / name, size)
                tokenizers.append(SentencePieceTokenizer(self.folder.data / name))
        return tokenizers * (2 // len(tokenizers))

    def _prefix(self, split: str, lang: str) -> Path:
        return self.folder.data / f"{split}.{'-'.join(self.langs)}.{lang}"

    def _encode(
        self, tokenizers: list[SentencePieceTokenizer]
    ) -> tuple[dict[str, Counter[str]], int]:
        """Write the pairs with the tokenizers' ids; pairs and tokens by split, dropped pairs."""
        import torch
        from fairseq.data import indexed_dataset

        options, dropped = self.options, 0
        counts: dict[str, Counter[str]] = {}
        ends = [len(tokenizer.tokens) for tokenizer in tokenizers]
        with self.progress.stage("binarise") as message:
            for split in SPLITS:
                counts[split] = Counter()
                prefixes = [str(self._prefix(split, lang)) for lang in self.langs]
                builders = [
                    indexed_dataset.make_builder(
                        indexed_dataset.data_file_path(prefix), "mmap", end + 1 + _EXTRA
                    )
                    for prefix, end in zip(prefixes, ends, strict=True)
                ]
                texts = [_lines(self._text(split, lang)) for lang in self.langs]
                for pair in zip(*texts, strict=True):
                    ids = [t.encode(line) for t, line in zip(tokenizers, pair, strict=True)]
                    if split == "train" and not is_kept(options, *map(len, ids)):
                        dropped += 1
                        continue
                    counts[split]["pairs"] += 1
                    for builder, side, end in zip(builders, ids, ends, strict=True):
                        counts[split]["tokens"] += len(side) + 1
                        builder.add_item(torch.tensor([*side, end], dtype=torch.int32))
                for builder, prefix in zip(builders, prefixes, strict=True):
                    builder.finalize(indexed_dataset.index_file_path(prefix))
            if not counts["train"]["pairs"]:
                raise OptionError(
                    "max_length", options.max_length, "the filters leave nothing to train on"
                )
            message.append(f"{dropped:,} train pairs dropped by length")
        return counts, dropped

    def _finish(
        self, tokenizers: list[SentencePieceTokenizer], counts: dict[str, Counter[str]]
    ) -> tuple[int, int]:
        """Write the dictionaries and replace ids by theirs; entries, and unknown tokens."""
        from evomoe_plugin.data import binarize

        seen = [
            binarize.count_ids(self._prefix("train", lang), len(tokenizer.tokens) + 1)
            for lang, tokenizer in zip(self.langs, tokenizers, strict=True)
        ]
        if not self.options.separate_vocabularies:
            seen = [seen[0] + seen[1]] * 2
        rows = 0
        for lang, tokenizer, count in zip(self.langs, tokenizers, seen, strict=True):
            dictionary = binarize.make_dictionary(tokenizer, count.tolist())
            dictionary.save(str(self.folder.data / f"dict.{lang}.txt"))
            rows = max(rows, len(dictionary))
            for split in SPLITS:
                binarize.convert_ids(dictionary, tokenizer, self._prefix(split, lang))
        return rows, 0  # models of `train_on_lines` fall back to bytes


_EXTRA = 16  # entries of a dictionary beside the tokenizer's: fairseq's, and padding


def is_kept(options: PairOptions, source: int, target: int) -> bool:
    """Whether a pair of so many tokens is trained on."""
    short, long = sorted((source, target))
    if short < options.min_length or (options.max_length and long > options.max_length):
        return False
    return options.max_length_ratio is None or long <= options.max_length_ratio * max(short, 1)


def read_pairs(option: str, files: tuple[str, str] | None) -> Iterator[tuple[str, str]]:
    """Pairs of lines, with single spaces and none at the ends.

    Args:
        option: that gave the files, for messages.
        files: of source and target; None: there are none.
    Raises:
        OptionError: not UTF-8, or of different numbers of lines.
    """
    if files is None:
        return
    source, target = (_decoded(option, file) for file in files)
    for number, pair in enumerate(zip_longest(source, target), start=1):
        if None in pair:
            shorter = files[pair.index(None)]
            raise OptionError(
                option,
                " ".join(files),
                f"the files are not parallel: {shorter} has {number - 1} lines, the other has more",
            )
        one, other = pair
        yield " ".join(one.split()), " ".join(other.split())


def _decoded(option: str, file: str) -> Iterator[str]:
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise OptionError(option, file, f"line {number} is not UTF-8") from None


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")
