"""Text to token ids of fairseq's dictionary and back, with the tokenizer of the data folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fairseq.data import Dictionary

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data.chat_template import BadTemplate, ChatTemplate, chat_template_of
from evomoe_plugin.data.dictionary import TokenizerDictionary, dictionary_ids
from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer
from evomoe_plugin.data.tokenizers import Tokenizer, has_tokenizer, load_tokenizer

_PADDING_WORD = "madeupword"  # fairseq pads dictionaries with these to a multiple of 8


class Chats(NamedTuple):
    """Prompts of a chat template: the first token id of each, the others, and ids that end a
    response."""

    starts: list[int]
    prompts: list[list[int]]
    stops: list[int]


class TextCodec:
    """Encodes prompts and decodes generated tokens.

    Args:
        folder: has the tokenizer's files, as `evomoe prepare` writes them. Without a tokenizer,
            text is split at spaces, as in fairseq's own commands without `--bpe`.
        dictionary: the task's.
        chat_template: the option of fine-tuning.
        lang: the language, where each may have a tokenizer of its own.
    Raises:
        OptionError: tokenizer and dictionary do not match.
    """

    def __init__(
        self,
        folder: Path,
        dictionary: Dictionary,
        chat_template: str | None = None,
        lang: str | None = None,
    ):
        self.dictionary, self._folder = dictionary, folder
        self.tokenizer: Tokenizer | None = None
        self._chat_template = chat_template
        if not has_tokenizer(folder, lang):
            return
        self.tokenizer = tokenizer = load_tokenizer(folder, lang)
        try:
            self._token_ids = dictionary_ids(tokenizer, dictionary).tolist()
        except ValueError as error:
            fault = f"its tokenizer and its dict.txt do not match: dict.txt {error}"
            raise OptionError("data", folder, fault) from None
        self._piece_ids = {self._token_ids[i]: i for i, t in enumerate(tokenizer.tokens) if t}

    @property
    def start(self) -> int | None:
        """Token id that the tokenizer starts texts with, if it has one."""
        if self.tokenizer is None or self.tokenizer.start is None:
            return None
        return self._token_ids[self.tokenizer.start]

    def chat_template(self) -> ChatTemplate | None:
        """The template that chats were trained with, if there is one.

        Raises:
            OptionError: its file cannot be read.
        """
        return chat_template_of(self.tokenizer, self._chat_template, self._folder)

    def encode_chat(self, texts: Sequence[str]) -> Chats:
        """Users' messages as the chat template writes them, up to the response.

        Raises:
            OptionError: there is no template, or it fails.
        """
        tokenizer, template = self.tokenizer, self.chat_template()
        if template is None or not isinstance(tokenizer, HuggingFaceTokenizer):
            fault = "no chat template, or the model was trained without it: omit it"
            raise OptionError("chat", True, fault)
        try:
            rendered = [template.prompt(text) for text in texts]
        except BadTemplate as error:
            raise OptionError("chat_template", template.name, str(error)) from None
        finally:
            template.close()
        ids = [tokenizer.encode_parts([text], special=True)[0] for text, _ in rendered]
        if not all(ids):
            raise OptionError("chat_template", template.name, "gives no text before the response")
        ends = {end for _, end in rendered if end is not None}
        stops = [i for end in ends for i in tokenizer.encode_parts([end], special=True)[0]]
        return Chats([prompt[0] for prompt in ids], [prompt[1:] for prompt in ids], stops)

    def encode(self, text: str) -> list[int]:
        """Token ids, without start and end tokens."""
        if self.tokenizer is None:
            return [self.dictionary.index(word) for word in text.split()]
        return [self._token_ids[i] for i in self.tokenizer.encode(text)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text; special tokens are written by name, if they are no tokens of the tokenizer."""
        if self.tokenizer is None:
            return " ".join(self.dictionary[token] for token in token_ids)
        text, pieces = "", list[int]()
        for token in token_ids:
            if token in self._piece_ids:
                pieces.append(self._piece_ids[token])
            else:
                text, pieces = text + self.tokenizer.decode(pieces) + self.dictionary[token], []
        return text + self.tokenizer.decode(pieces)

    def name(self, token: int) -> str:
        """A token as the tokenizer writes it; the dictionary's symbol if it has none."""
        if self.tokenizer is None or token not in self._piece_ids:
            return self.dictionary[token]
        return self.tokenizer.tokens[self._piece_ids[token]] or self.dictionary[token]

    def without_text(self) -> list[int]:
        """Token ids without text, except end-of-sentence."""
        if self.tokenizer is not None:
            known = set(self._piece_ids)
            if isinstance(dictionary := self.dictionary, TokenizerDictionary):
                known -= {dictionary.bos(), dictionary.pad(), dictionary.unk()}
        else:
            known = {
                token
                for token in range(self.dictionary.nspecial, len(self.dictionary))
                if not self.dictionary[token].startswith(_PADDING_WORD)
            }
        return sorted(set(range(len(self.dictionary))) - known - {self.dictionary.eos()})
