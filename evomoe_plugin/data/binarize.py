"""From staged text to the files that fairseq's language modeling task reads.

The text is encoded once, with the tokenizer's own ids; what is counted there gives fairseq's
dictionary its order, and the ids are then replaced by their rows in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from fairseq.binarizer import Binarizer, BinarizeSummary, FileBinarizer
from fairseq.data import Dictionary, indexed_dataset

from evomoe_plugin.data.files import rename
from evomoe_plugin.data.staging import passages_path
from evomoe_plugin.data.tokenizers import Tokenizer, tokenizer_of_process

BLOCK_TOKENS = 1 << 22


class DocumentBinarizer(Binarizer):
    """Encodes a staged passage, and an eos where its document ends: the id after all symbols."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.eos = len(tokenizer.symbols)

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
    """Replace the staged text of a shard by its .bin and .idx, of the tokenizer's ids."""
    part = f"{shard}.part"
    # fairseq would divide the file among processes, but leave this one idle until they are done.
    FileBinarizer.multiprocess_dataset(
        str(passages_path(shard)), "mmap",
        DocumentBinarizer(tokenizer_of_process(tokenizer_folder)),
        part, vocab_size=vocab_size, num_workers=1,
    )
    for name in (indexed_dataset.data_file_path, indexed_dataset.index_file_path):
        rename(Path(name(part)), Path(name(str(shard))))
    passages_path(shard).unlink()


def merge(shards: list[Path], prefix: Path, vocab_size: int) -> None:
    """Write `prefix`.bin and .idx, the shards one after another."""
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


def make_dictionary(symbols: list[str | None], counts: np.ndarray) -> Dictionary:
    """fairseq's dictionary of all symbols, padded to a multiple of 8 rows: the most frequent
    first, equal ones by their spelling. `counts` may go on beyond the symbols."""
    dictionary = Dictionary()
    for symbol, count in zip(symbols, counts.tolist(), strict=False):
        if symbol is not None:
            dictionary.add_symbol(symbol, n=count)
    dictionary.finalize(padding_factor=8)
    return dictionary


def number_by(dictionary: Dictionary, symbols: list[str | None], prefix: Path) -> None:
    """Replace the tokenizer's ids in `prefix`.bin by their rows of the dictionary."""
    dtype = _dtype(prefix)
    rows = [dictionary.unk() if s is None else dictionary.index(s) for s in symbols]
    table = np.array([*rows, dictionary.eos()], dtype=dtype)
    with open(indexed_dataset.data_file_path(str(prefix)), "r+b") as stream:
        for start, ids in _blocks(stream, dtype):
            stream.seek(start)
            stream.write(table[ids].tobytes())


def _dtype(prefix: Path) -> np.dtype:
    index = indexed_dataset.MMapIndexedDataset.Index(indexed_dataset.index_file_path(str(prefix)))
    return np.dtype(index.dtype)


def _blocks(stream, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
    start = 0
    while block := stream.read(BLOCK_TOKENS * dtype.itemsize):
        yield start, np.frombuffer(block, dtype=dtype)
        start += len(block)
