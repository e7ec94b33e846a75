"""Tokenizers of Hugging Face, trained on a few lines, in the layouts of published models."""

import json
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests fork

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

# Latin, Cyrillic, Greek, Arabic, Hebrew, Devanagari, Thai, Chinese, Japanese, Korean, Ethiopic;
# emoji with joiners, combining marks, code, rare spaces, and the names of special tokens.
TEXTS = [
    "The quick brown fox jumps over the lazy dog, twice.",
    "  two  spaces, a tab\tand\nnew\n\nlines \r\n",
    "Съешь же ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "نص حكيم له سر قاطع",
    "דג סקרן שט בים",
    "ऋषियों को सताने वाले दुष्ट",
    "เป็นมนุษย์สุดประเสริฐ",
    "視野無限廣，窗外有藍天",
    "いろはにほへと ちりぬるを",
    "키스의 고유조건은 입술끼리",
    "ሰማይ አይታረስ",
    "👩‍👩‍👧 🏳️‍🌈 e\u0301 \u2581 \u3000 \xa0 \ufeff x",
    "def f(x):\n    return {'a': x ** 2}  # 100 %",
    "</s> <s> <unk> <|endoftext|> [SEP] <0x0A>",
    "",
]
_LINES = [text for text in TEXTS[:6] for _ in range(3)]


def gpt2():
    """Byte-level BPE; one special token for all purposes, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _train(tokenizer, trainers.BpeTrainer, 400, [], pre_tokenizers.ByteLevel.alphabet())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    names = ("bos_token", "eos_token", "unk_token")
    return tokenizer, dict.fromkeys(names, "<|endoftext|>")


def llama3():
    """Byte-level BPE with a split of its own; texts start with a special token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = Regex(
        r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, trainers.BpeTrainer, 400, [], pre_tokenizers.ByteLevel.alphabet())
    heads = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *heads])
    _start_with(tokenizer, "<|begin_of_text|>")
    return tokenizer, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def llama2():
    """BPE over SentencePiece's text, with bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = _sentencepiece_decoder()
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(tokenizer, trainers.BpeTrainer, 420, ["<unk>", "<s>", "</s>", *bytes_])
    tokenizer = _without_special(tokenizer, bytes_)
    _start_with(tokenizer, "<s>")
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def unigram():
    """Unigram with bytes for unknown characters, as SentencePiece trains by default."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "</s>", "<unk>", *bytes_]
    _train(tokenizer, trainers.UnigramTrainer, 360, special, unk_token="<unk>")
    tokenizer = _without_special(tokenizer, bytes_, byte_fallback=True)
    tokenizer.decoder = _sentencepiece_decoder()
    return tokenizer, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def wordpiece():
    """BERT's: lower case, unknown words, and none of the special tokens that fairseq needs but
    one."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    _train(tokenizer, trainers.WordPieceTrainer, 200, special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(8)  # as many published files have it
    tokenizer.enable_padding(length=8)
    return tokenizer, {"unk_token": "[UNK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}


KINDS = {f.__name__: f for f in (gpt2, llama3, llama2, unigram, wordpiece)}


def save(folder, kind, **config):
    """The files of a tokenizer; with what is given in its tokenizer_config.json."""
    tokenizer, names = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", **names, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def _train(tokenizer, trainer, size, special, alphabet=(), **given):
    trainer = trainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=list(alphabet),
        show_progress=False,
        **given,
    )
    tokenizer.train_from_iterator(_LINES, trainer)


def _without_special(tokenizer, words, **model):
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] not in words]
    content["model"] |= model
    return Tokenizer.from_str(json.dumps(content))


def _start_with(tokenizer, word):
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{word} $A", special_tokens=[(word, tokenizer.token_to_id(word))]
    )


def _sentencepiece_decoder():
    return decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
