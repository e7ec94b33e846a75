"""Fine-tuning examples: prompts and responses as token ids of fairseq's dictionary."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from fairseq.data import Dictionary

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.chat_template import BadTemplate, ChatTemplate
from evomoe_plugin.data.dictionary import dictionary_ids
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer
from evomoe_plugin.data.sft_files import bad_record, read_records
from evomoe_plugin.data.tokenizers import has_tokenizer, load_tokenizer
from evomoe_plugin.data.turns import BadRecord, Templates, Turn, Turns, read_turns

logger = logging.getLogger(__name__)
_REMEDY = "copy it from the data folder of the model"


@dataclass(frozen=True)
class Example:
    """The tokens of one example, including the one that ends each response."""

    tokens: np.ndarray
    """int32 [n], token ids of the dictionary, without the first."""
    responses: np.ndarray
    """int32 [n], number of the response that a token belongs to, from 1; 0: none."""
    start: int
    """The first token id, which is read only."""

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
    return replace(example, tokens=tokens, responses=responses)


class Encoder:
    """Encodes records as examples.

    Args:
        folder: has the tokenizer and dict.txt.
        dictionary: loaded from this dict.txt.
    Raises:
        OptionError: there is no tokenizer, or it does not match the dictionary.
    """

    def __init__(self, folder: Path, dictionary: Dictionary):
        if not has_tokenizer(folder):
            fault = (
                "has no tokenizer (sentencepiece.model, tokenizer.json, or encoder.json and "
                "vocab.bpe)"
            )
            raise OptionError("DATA", folder, f"{fault}: {_REMEDY}")
        try:
            self.tokenizer = load_tokenizer(folder)
        except FileNotFoundError as error:
            name = Path(error.filename).name
            raise OptionError("DATA", folder, f"has no {name}: {_REMEDY}") from None
        try:
            self._token_ids = dictionary_ids(self.tokenizer, dictionary)
        except ValueError as error:
            raise OptionError("DATA", folder / "dict.txt", f"{error}: {_REMEDY}") from None
        self._eos, self.unk = dictionary.eos(), dictionary.unk()
        self._start = self._eos
        if self.tokenizer.start is not None:
            self._start = int(self._token_ids[self.tokenizer.start])

    def ids(self, text: str) -> np.ndarray:
        """Token ids of the dictionary, int32."""
        return self._token_ids[np.array(self.tokenizer.encode(text), dtype=np.int64)]

    def encode(self, record: Turns) -> Example:
        """One example. Raises BadRecord if the tokenizer encodes a response to no tokens."""
        texts = [turn.text for turn in record.turns]
        if record.are_ended:
            assert isinstance(self.tokenizer, HuggingFaceTokenizer)
            parts = self.tokenizer.encode_parts(texts, special=True)
        else:
            parts = [
                part
                for stretch in _up_to_targets(record.turns)
                for part in self.tokenizer.encode_parts([turn.text for turn in stretch])
            ]
        tokens, responses, response = [], [], 0
        for turn, part in zip(record.turns, parts, strict=True):
            ids = self._token_ids[np.array(part, dtype=np.int64)]
            if turn.is_target:
                if not len(ids):
                    raise BadRecord("the tokenizer encodes a response to no tokens")
                response += 1
                if not record.are_ended:
                    ids = np.append(ids, np.int32(self._eos))
            tokens.append(ids)
            responses.append(np.full(len(ids), response if turn.is_target else 0, dtype=np.int32))
        example = Example(np.concatenate(tokens), np.concatenate(responses), self._start)
        if record.are_ended and not example.responses[0]:  # the chat's own first token
            return Example(example.tokens[1:], example.responses[1:], int(example.tokens[0]))
        return example


def _up_to_targets(turns: list[Turn]) -> Iterator[list[Turn]]:
    """Turns up to each target, after which an end-of-sentence separates the texts."""
    stretch = []
    for turn in turns:
        stretch.append(turn)
        if turn.is_target:
            yield stretch
            stretch = []


def load_examples(
    path: Path,
    encoder: Encoder,
    templates: Templates,
    limit: int,
    chat_template: ChatTemplate | None = None,
) -> list[Example]:
    """All examples of a file, in order, cut to `limit` tokens each; logs how many were cut.

    Raises:
        OptionError: a record is malformed, the chat template fails, or no example is left.
    """
    examples, shortened, dropped, unknown = [], 0, 0, 0
    for place, record in read_records(path):
        try:
            whole = encoder.encode(read_turns(record, templates, chat_template))
        except BadRecord as error:
            raise bad_record(place, error) from None
        except BadTemplate as error:
            assert chat_template
            raise OptionError("chat_template", chat_template.name, f"{place}: {error}") from None
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
