"""Binarize staged text into the files of fairseq's language modeling task.

The text is encoded once, with the tokenizer's ids. Their counts determine the order of fairseq's
dictionary; then they are replaced by the dictionary's token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from fairseq.binarizer import Binarizer, BinarizeSummary, FileBinarizer
from fairseq.data import Dictionary, indexed_dataset

from evomoe_plugin.data.files import rename
from evomoe_plugin.data.staging import passages_path
from evomoe_plugin.data.tokenizers import Tokenizer, tokenizer_of_process

BLOCK_TOKENS = 1 << 22


class DocumentBinarizer(Binarizer):
    """Encodes a staged passage, with an eos (the id after all tokens) at the end of a document."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.eos = len(tokenizer.tokens)

    def binarize_line(self, line: str, summary: BinarizeSummary) -> torch.IntTensor:
        text, ends_document = json.loads(line)
        ids = self.tokenizer.encode(text)
        if ends_document:
            ids.append(self.eos)
        summary.num_seq += 1
        summary.num_tok += len(ids)
        return torch.tensor(ids, dtype=torch.int32)


def is_binarized(shard: Path) -> bool:
    return Path(indexed_dataset.index_file_path(str(shard))).exists()


def binarize_shard(shard: Path, tokenizer_folder: str, vocab_size: int) -> None:
    """Replace the staged text of a shard by its .bin and .idx, with the tokenizer's ids."""
    part = f"{shard}.part"
    # One worker: with more, fairseq starts processes and this one would wait idle.
    FileBinarizer.multiprocess_dataset(
        str(passages_path(shard)), "mmap",
        DocumentBinarizer(tokenizer_of_process(tokenizer_folder)),
        part, vocab_size=vocab_size, num_workers=1,
    )
    for name in (indexed_dataset.data_file_path, indexed_dataset.index_file_path):
        rename(Path(name(part)), Path(name(str(shard))))
    passages_path(shard).unlink()


def merge(shards: list[Path], prefix: Path, vocab_size: int) -> None:
    """Write `prefix`.bin and .idx, the concatenated shards."""
    builder = indexed_dataset.make_builder(
        indexed_dataset.data_file_path(str(prefix)), "mmap", vocab_size
    )
    for shard in shards:
        builder.merge_file_(str(shard))
    builder.finalize(indexed_dataset.index_file_path(str(prefix)))


def count_ids(prefix: Path, size: int) -> np.ndarray:
    """How often each id below `size` occurs."""
    counts = np.zeros(size, dtype=np.int64)
    with open(indexed_dataset.data_file_path(str(prefix)), "rb") as stream:
        for _, ids in _blocks(stream, _dtype(prefix)):
            counts += np.bincount(ids, minlength=size)
    return counts


def make_dictionary(tokens: list[str | None], counts: np.ndarray) -> Dictionary:
    """fairseq's dictionary of all tokens, padded to a multiple of 8: most frequent first, ties in
    order of spelling. `counts` may be longer than `tokens`."""
    dictionary = Dictionary()
    for token, count in zip(tokens, counts.tolist(), strict=False):
        if token is not None:
            dictionary.add_symbol(token, n=count)
    dictionary.finalize(padding_factor=8)
    return dictionary


def convert_ids(dictionary: Dictionary, tokens: list[str | None], prefix: Path) -> None:
    """Replace the tokenizer's ids in `prefix`.bin by the dictionary's token ids."""
    dtype = _dtype(prefix)
    ids = [dictionary.unk() if t is None else dictionary.index(t) for t in tokens]
    table = np.array([*ids, dictionary.eos()], dtype=dtype)
    with open(indexed_dataset.data_file_path(str(prefix)), "r+b") as stream:
        for start, block in _blocks(stream, dtype):
            stream.seek(start)
            stream.write(table[block].tobytes())


def _dtype(prefix: Path) -> np.dtype:
    index = indexed_dataset.MMapIndexedDataset.Index(indexed_dataset.index_file_path(str(prefix)))
    return np.dtype(index.dtype)


def _blocks(stream: BinaryIO, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    while block := stream.read(BLOCK_TOKENS * dtype.itemsize):
        yield start, np.frombuffer(block, dtype=dtype)
        start += len(block)
