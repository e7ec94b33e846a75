"""Tokenizer files for transformers, with the token ids of fairseq's dictionary."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fairseq.data import Dictionary

from evomoe_plugin.data.huggingface_tokenizer import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    HuggingFaceTokenizer,
)
from evomoe_plugin.data.tokenizers import (
    GPT2_ENCODER,
    GPT2_MERGES,
    SENTENCEPIECE_MODEL,
    TOKENIZER_JSON,
    SentencePieceTokenizer,
)
from evomoe_plugin.export.sentencepiece_json import (
    Inexpressible,
    first_difference,
    sentencepiece_parts,
)
from evomoe_plugin.generation.loading import TrainedModel

_TOKENIZATION = Path(__file__).with_name("remote") / "tokenization_evomoe.py"


def write_tokenizer(trained: TrainedModel, folder: Path) -> str | None:
    """Write the files that `AutoTokenizer.from_pretrained(folder)` reads.

    A tokenizer.json is written as it is, with the special tokens that it lacks. Other tokenizers
    become one, and start texts with the start token of training. A SentencePiece model whose
    tokenizer.json would give other ids runs in a small tokenizer class instead.

    Returns:
        Why `AutoTokenizer` needs `trust_remote_code=True`; None: it does not.
    """
    dictionary, tokenizer = trained.dictionary, trained.codec.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _write_huggingface(trained, tokenizer, folder)
        return None
    why, added = None, {}
    if isinstance(tokenizer, SentencePieceTokenizer):
        model = trained.folder / SENTENCEPIECE_MODEL
        try:
            _write_json_tokenizer(
                trained, folder, sentencepiece_parts(model, tokenizer, dictionary)
            )
            text = first_difference(folder / TOKENIZER_JSON, tokenizer, dictionary)
            why = text and f"its tokenizer.json would read {text!r} differently"
        except Inexpressible as reason:
            why = str(reason)
        if why is not None:
            (folder / TOKENIZER_JSON).unlink(missing_ok=True)
            added = _write_code(trained, tokenizer, folder)
    else:
        parts = _words(dictionary) if tokenizer is None else _gpt2(trained)
        _write_json_tokenizer(trained, folder, parts)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": dictionary[trained.start],
        "eos_token": dictionary[dictionary.eos()],
        "pad_token": dictionary[dictionary.pad()],
        "unk_token": dictionary[dictionary.unk()],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": trained.model.max_decoder_positions(),
        "model_input_names": ["input_ids", "attention_mask"],
    }
    write_json(folder / TOKENIZER_CONFIG, {**config, **added})
    return why


def _write_code(
    trained: TrainedModel, tokenizer: SentencePieceTokenizer, folder: Path
) -> dict[str, Any]:
    """Write the files of `tokenization_evomoe`; what its configuration adds."""
    shutil.copyfile(trained.folder / SENTENCEPIECE_MODEL, folder / SENTENCEPIECE_MODEL)
    shutil.copyfile(_TOKENIZATION, folder / _TOKENIZATION.name)
    write_json(folder / "vocab.json", trained.dictionary.indices)
    return {
        "tokenizer_class": "EvoMoETokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_evomoe.EvoMoETokenizer", None]},
        "encoded_apart": {
            character: [tokenizer.tokens[i] for i in ids]
            for character, ids in tokenizer.encoded_apart.items()
        },
    }


def _write_json_tokenizer(trained: TrainedModel, folder: Path, parts: dict[str, Any]) -> None:
    """Write a tokenizer.json that starts texts with the start token.

    Args:
        parts: its model and what goes with it.
    """
    dictionary = trained.dictionary
    start = dictionary[trained.start]
    sequence = [
        {"SpecialToken": {"id": start, "type_id": 0}},
        *({"Sequence": {"id": part, "type_id": 0}} for part in "AB"),
    ]
    write_json(
        folder / TOKENIZER_JSON,
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "normalizer": None,
            "added_tokens": [
                {
                    "id": i,
                    "content": dictionary[i],
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for i in range(dictionary.nspecial)
            ],
            "post_processor": {
                "type": "TemplateProcessing",
                "single": sequence[:2],
                "pair": sequence,
                "special_tokens": {start: {"id": start, "ids": [trained.start], "tokens": [start]}},
            },
            **parts,
        },
    )


def _write_huggingface(
    trained: TrainedModel, tokenizer: HuggingFaceTokenizer, folder: Path
) -> None:
    from tokenizers import AddedToken, Tokenizer

    library = Tokenizer.from_file(str(trained.folder / TOKENIZER_JSON))
    # The library counts on, so this gives the ids of training unless its own have gaps.
    for token in sorted(set(tokenizer.special.values())):
        if token.id >= len(tokenizer.tokens):
            library.add_special_tokens([AddedToken(token.word, special=True, normalized=False)])
    library.save(str(folder / TOKENIZER_JSON))
    if (template := trained.codec.chat_template()) is not None:
        (folder / CHAT_TEMPLATE).write_text(template.source, encoding="utf-8")
    config = {"clean_up_tokenization_spaces": False, **tokenizer.config, **tokenizer.names}
    for name, token in tokenizer.special.items():
        is_used = token.id < len(tokenizer.tokens) or name in ("eos", "pad")
        if is_used and library.token_to_id(token.word) == token.id:
            config[f"{name}_token"] = token.word
        else:
            config.pop(f"{name}_token", None)
    # The class that runs tokenizer.json as it is; others make their own of its vocabulary.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_max_length"] = trained.model.max_decoder_positions()
    for name in ("auto_map", "chat_template"):
        config.pop(name, None)
    write_json(folder / TOKENIZER_CONFIG, config)


def _gpt2(trained: TrainedModel) -> dict[str, Any]:
    encoder = json.loads((trained.folder / GPT2_ENCODER).read_text(encoding="utf-8"))
    merges = (trained.folder / GPT2_MERGES).read_text(encoding="utf-8").split("\n")[1:-1]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    dictionary = trained.dictionary
    vocabulary = {token: dictionary.index(str(i)) for token, i in encoder.items()}
    # No merge produces the special tokens, but they must be listed here to keep their ids.
    vocabulary |= {dictionary[i]: i for i in range(dictionary.nspecial)}
    return {
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [merge.split() for merge in merges],
        },
    }


def _words(dictionary: Dictionary) -> dict[str, Any]:
    return {
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": dictionary.indices,
            "unk_token": dictionary[dictionary.unk()],
        },
    }


def write_json(path: Path, content: Any) -> None:
    """Write `content` for a person to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
