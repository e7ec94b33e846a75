"""`evomoe prepare --pairs`: two parallel files to a data folder for `--task translation`."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evomoe_plugin
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.card import DataCard
from evomoe_plugin.data.few_files import prepare_files
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.options import DEFAULT_VOCAB_SIZE
from evomoe_plugin.data.pair_files import read_pairs
from evomoe_plugin.data.pair_options import FILES, PairOptions
from evomoe_plugin.data.progress import Progress
from evomoe_plugin.data.splits import SPLITS, Splitter
from evomoe_plugin.data.tokenizers import SentencePieceTokenizer, model_name

_EXTRA = 16  # entries of a dictionary beside the tokenizer's: fairseq's, and padding


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

    @property
    def loader(self) -> str:
        """With a language where each has its own tokenizer."""
        if not self.options["separate_vocabularies"]:
            return super().loader
        return f'load_tokenizer(DATA, "{self.options["langs"][0]}")'


def prepare_pairs(options: PairOptions, progress: Progress | None = None) -> DataCard:
    """Write `options.out` and return its card (`few_files.prepare_files`)."""
    options.validate()
    progress = progress or Progress()
    files = [
        (None if name == "pairs" else name.removesuffix("_pairs"), Path(file))
        for name in FILES
        for file in getattr(options, name) or ()
    ]
    return prepare_files(
        options,
        files,
        PairCard,
        lambda folder: _Preparation(options, folder, progress).run(),
        progress,
    )


class _Preparation:
    def __init__(self, options: PairOptions, folder: OutputFolder, progress: Progress):
        self.options, self.folder, self.progress = options, folder, progress
        self.langs = options.languages

    def run(self) -> dict[str, Any]:
        """Write the data set; the fields of the card (`few_files.prepare_files`)."""
        empty, sizes = self._split()
        evomoe_plugin.register()  # takes seconds: after the files were found to be parallel
        tokenizers = self._tokenizers(sizes["train"])
        counts, dropped = self._encode(tokenizers)
        rows, unknown = self._finish(tokenizers, counts)
        first = self.folder.data / model_name(self._model_of(self.langs[0]))
        return {
            "tokenizer": {
                "kind": tokenizers[0].kind,
                "rows": rows,
                "lossless": tokenizers[0].lossless,
                "flags": f"--bpe sentencepiece --sentencepiece-model DATA/{first.name}".split(),
            },
            "splits": {
                split: {
                    "documents": counts[split]["pairs"],
                    "items": 2 * counts[split]["pairs"],
                    "bytes": sizes[split],
                    "tokens": counts[split]["tokens"],
                    "unknown_tokens": unknown,
                }
                for split in SPLITS
            },
            "empty_documents": empty + dropped,
        }

    def _model_of(self, lang: str) -> str | None:
        """The language in the name of a tokenizer; None where there is one for both."""
        return lang if self.options.separate_vocabularies else None

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
            for name in FILES:
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
                path = self.folder.data / model_name(self._model_of(group[0]))
                draw = random.Random(self.options.seed)
                lines = (
                    part[:MAX_LINE_CHARS]
                    for lang in group
                    for line in _lines(self._text("train", lang))
                    if draw.random() < share
                    for part in trainable_lines(line)
                )
                train_on_lines(lines, path, size)
                tokenizers.append(SentencePieceTokenizer(path))
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
                    if split == "train" and not options.keeps(*map(len, ids)):
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


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield line.rstrip("\n")
