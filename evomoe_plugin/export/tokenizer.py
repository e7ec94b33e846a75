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
from evomoe_plugin.generation.loading import TrainedModel

_TOKENIZATION = "tokenization_evomoe.py"


def runs_in_code(trained: TrainedModel) -> bool:
    """Whether the exported tokenizer is a class of this package: no tokenizer.json gives the ids
    of a SentencePiece model in every text."""
    return isinstance(trained.codec.tokenizer, SentencePieceTokenizer)


def write_tokenizer(trained: TrainedModel, folder: Path) -> None:
    """Write the files that `AutoTokenizer.from_pretrained(folder, trust_remote_code=True)` reads.

    A tokenizer.json is written as it is, with the special tokens that it lacks. Otherwise texts
    start with the start token of training: SentencePiece models run in their own small tokenizer
    class, so that ids are exactly the same; GPT-2's BPE and plain words become a `tokenizer.json`.
    """
    dictionary, tokenizer = trained.dictionary, trained.codec.tokenizer
    if isinstance(tokenizer, HuggingFaceTokenizer):
        _write_huggingface(trained, tokenizer, folder)
        return
    start = dictionary[trained.start]
    config: dict[str, Any] = {
        "bos_token": start,
        "eos_token": dictionary[dictionary.eos()],
        "pad_token": dictionary[dictionary.pad()],
        "unk_token": dictionary[dictionary.unk()],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "model_max_length": trained.model.max_decoder_positions(),
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if isinstance(tokenizer, SentencePieceTokenizer):
        shutil.copyfile(trained.folder / SENTENCEPIECE_MODEL, folder / SENTENCEPIECE_MODEL)
        shutil.copyfile(Path(__file__).with_name(_TOKENIZATION), folder / _TOKENIZATION)
        write_json(folder / "vocab.json", dictionary.indices)
        config |= {
            "tokenizer_class": "EvoMoETokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_evomoe.EvoMoETokenizer", None]},
            "encoded_apart": {
                character: [tokenizer.tokens[i] for i in ids]
                for character, ids in tokenizer.encoded_apart.items()
            },
        }
    else:
        sequence = [
            {"SpecialToken": {"id": start, "type_id": 0}},
            *({"Sequence": {"id": part, "type_id": 0}} for part in "AB"),
        ]
        parts = _words(dictionary) if tokenizer is None else _gpt2(trained)
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
                    "special_tokens": {
                        start: {"id": start, "ids": [trained.start], "tokens": [start]}
                    },
                },
                **parts,
            },
        )
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / TOKENIZER_CONFIG, config)


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
