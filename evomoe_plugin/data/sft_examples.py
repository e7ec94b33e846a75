"""Fine-tuning examples: prompts and responses as token ids of fairseq's dictionary."""

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
_REMEDY = "copy it from the data folder of the model"


@dataclass(frozen=True)
class Example:
    """The tokens of one example, including the end-of-sentence of each response, without the one
    at the start."""

    tokens: np.ndarray
    """int32 [n], token ids of the dictionary."""
    responses: np.ndarray
    """int32 [n], number of the response that a token belongs to, from 1; 0: none."""

    def __len__(self) -> int:
        return len(self.tokens)


def truncate(example: Example, limit: int) -> Example | None:
    """The example cut to `limit` tokens; None if nothing of its last response would be left.

    The context of the last response is cut from the left, down to its last token; then the
    response is cut from the right and loses its end token. The remainder of an earlier response
    that lost its beginning is no longer a target.
    """
    over = len(example) - limit
    if over <= 0:
        return example
    last = example.responses.max()
    start = int(np.argmax(example.responses == last))
    cut = min(over, max(start - 1, 0))
    tokens, responses = example.tokens[cut:][:limit], example.responses[cut:][:limit].copy()
    if last not in responses:
        return None
    if cut and responses[0] and responses[0] == example.responses[cut - 1]:
        responses[responses == responses[0]] = 0
    return Example(tokens, responses)


class Encoder:
    """Encodes turns as examples.

    Args:
        folder: has the tokenizer and dict.txt.
        dictionary: loaded from this dict.txt.
    Raises:
        OptionError: there is no tokenizer, or it does not match the dictionary.
    """

    def __init__(self, folder: Path, dictionary: Dictionary):
        if not any((folder / name).is_file() for name in (SENTENCEPIECE_MODEL, GPT2_ENCODER)):
            fault = f"has no tokenizer ({SENTENCEPIECE_MODEL}, or {GPT2_ENCODER} and vocab.bpe)"
            raise OptionError("DATA", folder, f"{fault}: {_REMEDY}")
        try:
            self._tokenizer = load_tokenizer(folder)
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise OptionError("DATA", folder, f"has no {name}: {_REMEDY}") from None
        self._eos, self.unk = dictionary.eos(), dictionary.unk()
        vocabulary = self._tokenizer.tokens
        for token in vocabulary:
            if token is not None and token not in dictionary:
                fault = f"has no {token!r}, which the tokenizer next to it produces: {_REMEDY}"
                raise OptionError("DATA", folder / "dict.txt", fault)
        ids = [self.unk if token is None else dictionary.index(token) for token in vocabulary]
        self._token_ids = np.array(ids, dtype=np.int32)

    def ids(self, text: str) -> np.ndarray:
        """Token ids of the dictionary, int32."""
        return self._token_ids[np.array(self._tokenizer.encode(text), dtype=np.int64)]

    def encode(self, turns: Iterable[Turn]) -> Example:
        """One example. Raises ValueError if the tokenizer encodes a response to no tokens."""
        tokens, responses, response = [], [], 0
        for turn in turns:
            ids = self.ids(turn.text)
            if turn.is_target:
                if not len(ids):
                    raise ValueError("the tokenizer encodes a response to no tokens")
                response += 1
                ids = np.append(ids, np.int32(self._eos))
            tokens.append(ids)
            responses.append(np.full(len(ids), response if turn.is_target else 0, dtype=np.int32))
        return Example(np.concatenate(tokens), np.concatenate(responses))


def load_examples(path: Path, encoder: Encoder, templates: Templates, limit: int) -> list[Example]:
    """All examples of a file, in order, cut to `limit` tokens each; logs how many were cut.

    Raises:
        OptionError: a line is malformed, or no example is left.
    """
    examples, shortened, dropped, unknown = [], 0, 0, 0
    for number, turns in read_turns(path, templates):
        try:
            whole = encoder.encode(turns)
        except ValueError as error:
            raise bad_line(path, number, error) from None
        unknown += int(np.count_nonzero(whole.tokens == encoder.unk))
        example = truncate(whole, limit)
        if example is None:
            dropped += 1
        else:
            shortened += example is not whole
            examples.append(example)
    if not examples:
        fault = f"leaves no response token of any example of {path}: increase it"
        raise OptionError("tokens_per_sample", limit, fault)
    learned = sum(np.count_nonzero(example.responses) for example in examples)
    total = sum(map(len, examples))
    logger.info(
        f"{path}: {len(examples):,} examples, {learned:,} response tokens, "
        f"{total - learned:,} prompt tokens; {shortened:,} examples cut to {limit:,} "
        f"tokens, {dropped:,} dropped since nothing of their response would be left"
    )
    if unknown:
        logger.warning(f"{path}: {unknown:,} tokens are unknown to the dictionary")
    return examples
