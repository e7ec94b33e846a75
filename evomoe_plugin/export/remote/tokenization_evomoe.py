"""SentencePiece tokenizer for transformers, with the token ids of fairseq's dictionary.

It needs only sentencepiece and transformers.
"""

import json
import re
import shutil
from pathlib import Path

from transformers import PreTrainedTokenizer


class EvoMoETokenizer(PreTrainedTokenizer):
    """Text to the token ids of training, preceded by the start token.

    Special tokens in a text, such as `</s>`, are tokenized as text, unless `split_special_tokens`
    is False; tokens that were added with `add_tokens` are found.

    Args:
        vocab_file: token -> id, JSON.
        model_file: the SentencePiece model.
        encoded_apart: characters at which text is split -> their tokens.
    """

    vocab_files_names = {"vocab_file": "vocab.json", "model_file": "sentencepiece.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file, model_file, encoded_apart=None, **kwargs):
        import sentencepiece

        self._files = (vocab_file, model_file)
        self._vocab = json.loads(Path(vocab_file).read_text(encoding="utf-8"))
        self._tokens = {i: token for token, i in self._vocab.items()}
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self._piece_ids = {self._token(i): i for i in range(self._model.get_piece_size())}
        self._apart = encoded_apart or {}
        self._divider = re.compile(f"([{''.join(self._apart)}])") if self._apart else None
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(encoded_apart=encoded_apart, **kwargs)

    def _token(self, piece_id):
        """The dictionary's token of a piece: whitespace is written as bytes."""
        model = self._model
        if model.is_control(piece_id) or model.is_unknown(piece_id) or model.is_unused(piece_id):
            return "<unk>"
        return "".join(
            "".join(f"<0x{byte:02X}>" for byte in c.encode()) if c.isspace() else c
            for c in model.id_to_piece(piece_id)
        )

    @property
    def vocab_size(self):
        return len(self._vocab)

    def get_vocab(self):
        return {**self._vocab, **self.added_tokens_encoder}

    def tokenize(self, text, **kwargs):
        """The tokens of a text."""
        if not kwargs.get("split_special_tokens", self.split_special_tokens):
            return super().tokenize(text, **kwargs)
        added = [token for token in self.added_tokens_decoder.values() if not token.special]
        if not added:
            return super().tokenize(text, **kwargs)
        pattern = "|".join(_pattern(t) for t in sorted(added, key=lambda t: -len(t.content)))
        tokens, end = [], 0
        for found in re.finditer(pattern, text):
            tokens += self._tokenize(text[end : found.start()])
            tokens.append(next(group for group in found.groups() if group))
            end = found.end()
        return tokens + self._tokenize(text[end:])

    def _tokenize(self, text, **kwargs):
        tokens = []
        for part in self._divider.split(text) if self._divider else (text,):
            tokens += self._apart.get(part) or map(self._token, self._model.encode(part))
        return tokens

    def _convert_token_to_id(self, token):
        return self._vocab.get(token, self._vocab["<unk>"])

    def _convert_id_to_token(self, index):
        return self._tokens.get(index, "<unk>")

    def convert_tokens_to_string(self, tokens):
        """Text; tokens without text, such as special tokens, are written by name."""
        text, pieces = "", []
        for token in tokens:
            if token in self._piece_ids and token != "<unk>":
                pieces.append(self._piece_ids[token])
            else:
                text, pieces = text + self._model.decode(pieces) + token, []
        return text + self._model.decode(pieces)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [self.bos_token_id, *token_ids_0, *(token_ids_1 or ())]

    def get_special_tokens_mask(
        self, token_ids_0, token_ids_1=None, already_has_special_tokens=False
    ):
        special = set(self.all_special_ids)
        if already_has_special_tokens:
            return [int(i in special) for i in token_ids_0]
        return [1] + [0] * (len(token_ids_0) + len(token_ids_1 or ()))

    def save_vocabulary(self, save_directory, filename_prefix=None):
        prefix, saved = f"{filename_prefix}-" if filename_prefix else "", []
        for path, name in zip(self._files, self.vocab_files_names.values(), strict=True):
            target = Path(save_directory) / (prefix + name)
            if target.resolve() != Path(path).resolve():
                shutil.copyfile(path, target)
            saved.append(str(target))
        return tuple(saved)


def _pattern(token):
    """Where an added token is found in a text, with the spaces that it takes."""
    pattern = f"({re.escape(token.content)})"
    if token.single_word:
        pattern = rf"(?<!\w){pattern}(?!\w)"
    return (r"\s*" if token.lstrip else "") + pattern + (r"\s*" if token.rstrip else "")
