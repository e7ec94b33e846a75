"""Small texts, prepared folders read back, and options for both."""

import random

from evomoe_plugin.data import PrepareOptions, load_tokenizer

# What makes a round trip hard: indentation, blank lines, rare whitespace, reserved characters.
ODD = (
    "def f(x):\n\tif x:\n        return  x  \n\n\n# end \u2581 \u2585\r\nnaïve \u3000 \u2028 \xa0 "
    "<s> </s> <unk> <0x0A> \x00 😀 \ufffd\n"
)


def words(seed, count=300):
    """Text that compresses: words of a small vocabulary in lines, some of them indented."""
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(80)]
    return "".join(
        draw.choice(vocabulary) + draw.choice([" ", " ", " ", "\n", "\n    "]) for _ in range(count)
    )


def options_for(tmp_path, *inputs, **given):
    settings = {"out": str(tmp_path / "out"), "vocab_size": 400, "workers": 1, **given}
    if {"sentencepiece_model", "gpt2_bpe", "tokenizer"} & given.keys():
        settings.pop("vocab_size")
    return PrepareOptions(inputs=tuple(map(str, inputs)), **settings)


class PreparedText:
    """The documents of a prepared folder, through fairseq's own dictionary and data set."""

    def __init__(self, folder):
        from fairseq.data import Dictionary, data_utils

        self.folder = str(folder)
        self.dictionary = Dictionary.load(f"{folder}/dict.txt")
        self.tokenizer = load_tokenizer(folder)
        self.ids = {token: i for i, token in enumerate(self.tokenizer.tokens)}
        self.read = data_utils.load_indexed_dataset

    def items(self, split):
        return self.read(f"{self.folder}/{split}", self.dictionary, "mmap")

    def documents(self, split):
        """The text of every document, decoded."""
        texts, tokens = [], []
        for item in self.items(split):
            for row in item.tolist():
                if row == self.dictionary.eos():
                    texts.append(self.tokenizer.decode([self.ids[s] for s in tokens]))
                    tokens = []
                else:
                    tokens.append(self.dictionary[row])
        assert not tokens, "the last document has no end"
        return texts
