"""A tokenizer.json for fairseq's own commands: `--bpe tokenizer_json --tokenizer-json FILE`."""

# No `from __future__ import annotations`: fairseq reads the types of the dataclass at run time.

from dataclasses import dataclass, field

from fairseq.data.encoders import register_bpe
from fairseq.dataclass import FairseqDataclass

from evomoe_plugin.data.huggingface_tokenizer import HuggingFaceTokenizer, tokenizer_files


@dataclass
class TokenizerJsonConfig(FairseqDataclass):
    tokenizer_json: str = field(
        default="???", metadata={"help": "tokenizer.json of the data folder"}
    )


@register_bpe("tokenizer_json", dataclass=TokenizerJsonConfig)
class TokenizerJson:
    """Words are the token ids in decimal, the entries of `TokenizerDictionary`."""

    def __init__(self, cfg: TokenizerJsonConfig):
        self._tokenizer = HuggingFaceTokenizer(tokenizer_files(cfg.tokenizer_json))

    def encode(self, text: str) -> str:
        return " ".join(map(str, self._tokenizer.encode(text)))

    def decode(self, words: str) -> str:
        """Text; words that are no token ids, such as `<pad>`, are left out."""
        return self._tokenizer.decode([int(word) for word in words.split() if word.isdecimal()])

    def is_beginning_of_word(self, word: str) -> bool:
        return self.decode(word).startswith(" ")
