"""Examples to fine-tune on: prompts and answers as rows of fairseq's dictionary."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fairseq.data import Dictionary

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.tokenizers import GPT2_ENCODER, SENTENCEPIECE_MODEL, load_tokenizer
from evomoe_plugin.data.turns import Templates, Turn, bad_line, read_turns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """The tokens of one example, end-of-sentences of answers included, without the one that
    fairseq puts before the first."""

    tokens: np.ndarray
    """int32 [n], rows of the dictionary."""
    answers: np.ndarray
    """int32 [n], which answer a token belongs to, from 1; 0: none."""

    def __len__(self) -> int:
        return len(self.tokens)


def truncate(example: Example, limit: int) -> Example | None:
    """The example in at most `limit` tokens; None if nothing of its last answer would be left.

    What stands before the last answer is cut from the left, down to its last token; then the
    answer is cut from the right and has no end. Of an earlier answer that lost its beginning the
    rest is read, not learned.
    """
    over = len(example) - limit
    if over <= 0:
        return example
    last = example.answers.max()
    start = int(np.argmax(example.answers == last))
    cut = min(over, max(start - 1, 0))
    tokens, answers = example.tokens[cut:][:limit], example.answers[cut:][:limit].copy()
    if last not in answers:
        return None
    if cut and answers[0] and answers[0] == example.answers[cut - 1]:
        answers[answers == answers[0]] = 0
    return Example(tokens, answers)


class Encoder:
    """Turns into examples.

    Args:
        folder: holds the tokenizer and dict.txt.
        dictionary: that dict.txt.
    Raises:
        OptionError: there is no tokenizer, or it is not the dictionary's.
    """

    def __init__(self, folder: Path, dictionary: Dictionary):
        if not any((folder / name).is_file() for name in (SENTENCEPIECE_MODEL, GPT2_ENCODER)):
            raise OptionError("DATA", folder, f"has no tokenizer ({SENTENCEPIECE_MODEL}, or "
                              f"{GPT2_ENCODER} and vocab.bpe): copy that of the folder the model "
                              "was trained on")
        try:
            self._tokenizer = load_tokenizer(folder)
        except FileNotFoundError as error:
            raise OptionError("DATA", folder, f"has no {Path(error.filename).name}: copy it from "
                              "the folder the model was trained on") from None
        self._eos, self._unk = dictionary.eos(), dictionary.unk()
        symbols = self._tokenizer.symbols
        for symbol in symbols:
            if symbol is not None and symbol not in dictionary:
                raise OptionError("DATA", folder / "dict.txt", f"has no {symbol!r}, which the "
                                  "tokenizer beside it writes: take both from the folder the "
                                  "model was trained on")
        self._rows = np.array([self._unk if symbol is None else dictionary.index(symbol)
                               for symbol in symbols], dtype=np.int32)

    def ids(self, text: str) -> np.ndarray:
        """Rows of the dictionary, int32."""
        return self._rows[np.array(self._tokenizer.encode(text), dtype=np.int64)]

    def encode(self, turns: Iterable[Turn]) -> Example:
        """One example. Raises ValueError if the tokenizer leaves nothing of an answer."""
        tokens, answers, answer = [], [], 0
        for turn in turns:
            ids = self.ids(turn.text)
            if turn.learned:
                if not len(ids):
                    raise ValueError("the tokenizer leaves nothing of an answer")
                answer += 1
                ids = np.append(ids, np.int32(self._eos))
            tokens.append(ids)
            answers.append(np.full(len(ids), answer if turn.learned else 0, dtype=np.int32))
        return Example(np.concatenate(tokens), np.concatenate(answers))

    def count_unknown(self, example: Example) -> int:
        """Tokens that the dictionary does not know."""
        return int((example.tokens == self._unk).sum())


def load_examples(
    path: Path, encoder: Encoder, templates: Templates, limit: int
) -> list[Example]:
    """All examples of a file, in its order, in at most `limit` tokens each; logs what was cut.

    Raises:
        OptionError: a line is malformed, or no example is left.
    """
    examples, shortened, dropped, unknown = [], 0, 0, 0
    for number, turns in read_turns(path, templates):
        try:
            whole = encoder.encode(turns)
        except ValueError as error:
            raise bad_line(path, number, error) from None
        unknown += encoder.count_unknown(whole)
        example = truncate(whole, limit)
        if example is None:
            dropped += 1
            continue
        shortened += example is not whole
        examples.append(example)
    if not examples:
        raise OptionError("tokens_per_sample", limit, f"leaves no answer of any example of {path}: "
                          "give more")
    learned = sum(int((example.answers > 0).sum()) for example in examples)
    total = sum(map(len, examples))
    logger.info("%s: %s examples, %s tokens of answers, %s of prompts; %s examples cut to %s "
                "tokens, %s dropped since nothing of their answer would be left", path,
                *(f"{n:,}" for n in (len(examples), learned, total - learned, shortened, limit,
                                     dropped)))
    if unknown:
        logger.warning("%s: %s tokens are unknown to the dictionary", path, f"{unknown:,}")
    return examples
