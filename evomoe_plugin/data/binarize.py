"""Binarize staged text into the files of fairseq's language modeling task.

The text is encoded once, with the tokenizer's ids. Their counts determine the order of fairseq's
dictionary, unless it keeps the ids of a tokenizer.json; then they are replaced by the dictionary's
token ids.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary, indexed_dataset

from evomoe_plugin.checkpoint.atomic_files import rename
from evomoe_plugin.data.dictionary import TokenizerDictionary, dictionary_ids
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer
from evomoe_plugin.data.staging import passages_path, read_passages
from evomoe_plugin.data.tokenizers import Tokenizer, tokenizer_of_process

BLOCK_TOKENS = 1 << 22


def is_binarized(shard: Path) -> bool:
    return Path(indexed_dataset.index_file_path(str(shard))).exists()


def binarize_shard(shard: Path, tokenizer_folder: str, vocab_size: int) -> None:
    """Replace the staged text of a shard by its .bin and .idx, with the tokenizer's ids.

    A document ends with an eos, the id after all tokens, and starts as the tokenizer starts a text.
    """
    part, tokenizer = f"{shard}.part", tokenizer_of_process(tokenizer_folder)
    builder = indexed_dataset.make_builder(indexed_dataset.data_file_path(part), "mmap", vocab_size)
    start = [] if tokenizer.start is None else [tokenizer.start]
    for passage in read_passages(shard):
        ids = start * passage.starts_document + tokenizer.encode(passage.text)
        ids += [len(tokenizer.tokens)] * passage.ends_document
        builder.add_item(torch.tensor(ids, dtype=torch.int32))
    builder.finalize(indexed_dataset.index_file_path(part))
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
    counts, dtype = np.zeros(size, dtype=np.int64), _dtype(prefix)
    with open(indexed_dataset.data_file_path(str(prefix)), "rb") as stream:
        while (ids := np.fromfile(stream, dtype, BLOCK_TOKENS)).size:
            counts += np.bincount(ids, minlength=size)
    return counts


def make_dictionary(
    tokenizer: Tokenizer, counts: list[int], embedding_rows: int | None = None
) -> Dictionary:
    """fairseq's dictionary of all tokens.

    That of a tokenizer.json keeps its ids (`TokenizerDictionary`). Others are padded to a multiple
    of 8: most frequent first, ties in order of spelling.

    Args:
        counts: of each of the tokenizer's ids, then of documents.
        embedding_rows: of the model that a tokenizer.json belongs to, if there is one.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return TokenizerDictionary.of(tokenizer, counts, embedding_rows)
    dictionary = Dictionary()
    for token, count in zip(tokenizer.tokens, counts, strict=False):
        if token is not None:
            dictionary.add_symbol(token, n=count)
    dictionary.finalize(padding_factor=8)
    return dictionary


def convert_ids(dictionary: Dictionary, tokenizer: Tokenizer, prefix: Path) -> None:
    """Replace the tokenizer's ids in `prefix`.bin by the dictionary's token ids."""
    dtype = _dtype(prefix)
    table = np.append(dictionary_ids(tokenizer, dictionary), dictionary.eos()).astype(dtype)
    with open(indexed_dataset.data_file_path(str(prefix)), "r+b") as stream:
        while (block := np.fromfile(stream, dtype, BLOCK_TOKENS)).size:
            stream.seek(-block.nbytes, os.SEEK_CUR)
            stream.write(table[block].tobytes())


def _dtype(prefix: Path) -> np.dtype:
    index = indexed_dataset.MMapIndexedDataset.Index(indexed_dataset.index_file_path(str(prefix)))
    return np.dtype(index.dtype)
