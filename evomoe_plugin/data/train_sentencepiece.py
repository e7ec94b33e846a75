"""Train a SentencePiece model that encodes any text losslessly.

- BPE: in our measurements many times faster to train than unigram, fewer tokens per text, and based
  on integer counts, so the same text gives the same model on every machine.
- No normalisation, no dummy prefix, spaces kept: decoding restores the text. Runs of spaces may be
  pieces, which helps with code.
- Byte fallback: nothing is unknown.
- No piece contains whitespace other than the space: newlines, tabs and rarer kinds are encoded as
  bytes, since fairseq's dictionary is a file of lines and its tokenizer splits at whitespace.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator
from pathlib import Path

from evomoe_plugin.checkpoint.atomic_files import write_atomically
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.staging import read_passages
from evomoe_plugin.data.tokenizers import SPACE, SPECIAL_TOKENS

MAX_LINE_CHARS = 4000

# Whitespace other than the space, and SentencePiece's characters for a space, an unknown piece and
# the end of a string.
_LEFT_TO_BYTES = re.compile(f"(?:[^\\S ]|[{SPACE}\u2585\0])+")

# Entries of fairseq's dictionary that are not pieces, minus SentencePiece's own <unk>.
_EXTRA_ROWS = len(SPECIAL_TOKENS) - 1


def train_sentencepiece(
    shards: list[Path], model: Path, vocab_size: int, share: float, seed: int
) -> None:
    """Write a model to `model`, such that fairseq's dictionary has `vocab_size` entries.

    It is trained on a `share` of the lines of the shards, sampled with `seed`. Raises OptionError
    if the text does not support such a vocabulary.
    """
    train_on_lines(_sample(shards, share, random.Random(seed)), model, vocab_size)


def train_on_lines(lines: Iterator[str], model: Path, vocab_size: int) -> None:
    """As `train_sentencepiece`, on `trainable_lines` of at most `MAX_LINE_CHARS` characters."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size - _EXTRA_ROWS,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=4 * MAX_LINE_CHARS,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise OptionError("vocab_size", vocab_size, _remedy(str(error))) from None
    write_atomically(model, written.getvalue())


def _sample(shards: list[Path], share: float, draw: random.Random) -> Iterator[str]:
    # Sampling passages first avoids parsing most of a large text; the sampled lines, one in ten of
    # those passages, still come from many documents.
    of_passages = min(1.0, 10 * share)
    of_lines = share / of_passages
    for shard in shards:
        for passage in read_passages(shard, lambda: draw.random() < of_passages):
            for line in trainable_lines(passage.text):
                if draw.random() < of_lines:
                    for start in range(0, len(line), MAX_LINE_CHARS):
                        yield line[start : start + MAX_LINE_CHARS]


def trainable_lines(text: str) -> Iterator[str]:
    """The text without what is encoded as bytes."""
    return filter(None, _LEFT_TO_BYTES.split(text))


def _remedy(error: str) -> str:
    if match := re.search(r"too high .* value <= (\d+)", error):
        return f"the training text supports at most {int(match[1]) + _EXTRA_ROWS}; choose less"
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"its characters need at least {int(match[1]) + _EXTRA_ROWS}; choose more"
    return f"SentencePiece cannot train on this text: {error}"
