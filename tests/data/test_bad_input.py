"""Bad input: one line with option, value and remedy, and nothing left behind."""

import json
import os

import pytest

from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.data import prepare
from tests.data.texts import options_for

OPTIONS = {
    "documents_by": ({"documents_by": "page"}, "--documents-by page: choose from file, line"),
    "encoding_errors": ({"encoding_errors": "x"}, "--encoding-errors x: choose from strict"),
    "start": ({"document_start": "("}, r"--document-start \(: not a regular expression"),
    "start twice": ({"document_start": "a", "documents_by": "line"}, "cannot be combined with"),
    "suffix": ({"text_suffix": ("py",)}, "--text-suffix 'py': a suffix such as .py"),
    "valid": ({"valid_fraction": 0.0}, "--valid-fraction 0.0: a number between 0 and 1"),
    "test": ({"test_fraction": 1.5}, "--test-fraction 1.5: a number between 0 and 1"),
    "nan": ({"test_fraction": float("nan")}, "--test-fraction nan: a number between"),
    "sum": ({"valid_fraction": 0.5, "test_fraction": 0.5}, "their sum must be below 1"),
    "max_bytes": ({"max_bytes": 0}, "--max-bytes 0: a positive number"),
    "workers": ({"workers": 0}, "--workers 0: a positive number"),
    "many workers": ({"workers": 10**6}, "--workers 1000000: at most 1,024"),
    "root": ({"out": "/"}, "--out /: is the root of the disk"),
    "vocab_size": ({"vocab_size": -5}, "--vocab-size -5: a positive number"),
    "sample": ({"sample_bytes": 0}, "--sample-bytes 0: a positive number"),
    "out": ({"out": ""}, "--out '': name the folder"),
    "tokenizers": ({"sentencepiece_model": "a", "gpt2_bpe": ("b", "c")}, "not both"),
    "rows": ({"rows": "x"}, "--rows x: choose from text, chat"),
    "no model": ({"sentencepiece_model": "no.model"}, "--sentencepiece-model no.model: no such"),
    "no bpe": ({"gpt2_bpe": ("no.json", "no.bpe")}, "--gpt2-bpe no.json: no such file"),
    "no valid": ({"valid": ("no.txt",)}, "valid no.txt: no such file or folder"),
    "large": ({"vocab_size": 9000}, r"--vocab-size 9000: the training text supports at most \d+"),
    "small": ({"vocab_size": 261}, r"--vocab-size 261: .* need at least \d+; choose more"),
    "tiny": ({"vocab_size": 260}, "--vocab-size 260: choose more than 260: 256 bytes"),
}


def refuse(tmp_path, quiet, message, *inputs, **given):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(OptionError, match=message) as error:
        prepare(options_for(tmp_path, *inputs, **given), quiet)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("case", OPTIONS)
def test_options(tmp_path, folder, quiet, case):
    given, message = OPTIONS[case]
    refuse(tmp_path, quiet, message, folder, **given)


def test_vocab_size_with_a_given_tokenizer(tmp_path, folder, quiet, trained):
    options = options_for(tmp_path, folder)
    given = {**vars(options), "sentencepiece_model": str(trained / "sentencepiece.model")}
    with pytest.raises(OptionError, match="--vocab-size 400: only valid if a tokenizer is trained"):
        prepare(type(options)(**given), quiet)


@pytest.mark.parametrize("size", ["largest", "smallest"])
def test_the_vocab_size_that_is_named_works(tmp_path, folder, quiet, size):
    with pytest.raises(OptionError) as error:
        prepare(options_for(tmp_path, folder, vocab_size=9000 if size == "largest" else 261), quiet)
    named = int("".join(filter(str.isdigit, str(error.value).split(":")[1])))
    card = prepare(options_for(tmp_path, folder, vocab_size=named), quiet)
    assert card.tokenizer["rows"] == -(-named // 8) * 8


INPUTS = {
    "missing": ({}, "INPUT .*given: no such file or folder"),
    "empty folder": ({"given": None}, r"contains no files; supported are .jsonl, .parquet, .txt"),
    "suffixes": (
        {"given/a.py": "x", "given/b.py": "x", "given/README": "x"},
        r"contains 2 .py, 1 without suffix; .* --text-suffix .py reads them",
    ),
    "hidden": ({"given/.a.txt": "x", "given/.git/b.txt": "x"}, "contains no files"),
    "prepared": (
        {"given/DATA/dict.txt": "x", "given/DATA/DATA_CARD.json": "{}"},
        "contains no files",
    ),
    "no text": ({"given/a.txt": "", "given/b.txt": " \n\n"}, "INPUT .*given: contains no text"),
    "one document": (
        {"given/a.txt": "a b c"},
        r"too few distinct documents \(1\) for train, "
        "valid, test; --documents-by blank-line",
    ),
    "one text": ({f"given/{n}.txt": "all the same" for n in range(9)}, "too few distinct"),
    "no field": ({"given/a.jsonl": json.dumps({"body": "x"})}, "--text-field text: no such field"),
    "no .json of a folder": ({"given/a.json": "[]"}, "contains 1 .json; supported are .jsonl, .pa"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs(tmp_path, quiet, case):
    files, message = INPUTS[case]
    for name, text in files.items():
        path = tmp_path / name
        if text is None:
            path.mkdir()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    refuse(tmp_path, quiet, message, tmp_path / "given")


def test_rows_that_are_no_chats(tmp_path, quiet):
    (tmp_path / "a.json").write_text('[{"instruction": "a", "output": "b"}, {"text": "c"}]')
    message = r'INPUT .*a.json, record 2: has no prompt; each must be {"prompt"'
    refuse(tmp_path, quiet, message, tmp_path / "a.json", rows="chat")


def test_a_file_of_another_kind(tmp_path, quiet):
    (tmp_path / "a.gz").write_text("x")
    refuse(tmp_path, quiet, r"a.gz: contains 1 .gz; .*unpack compressed files", tmp_path / "a.gz")


def test_held_out_files(tmp_path, folder, quiet):
    every = tuple(str(path) for path in sorted(folder.iterdir()))
    refuse(tmp_path, quiet, "none is left for training", folder, valid=every)
    refuse(
        tmp_path,
        quiet,
        "the same file is given to --valid",
        folder,
        valid=every[:1],
        test=every[:1],
    )
    (folder / "zz.txt").write_text("\n")
    refuse(
        tmp_path, quiet, "test .*zz.txt: contains no text", folder, test=(str(folder / "zz.txt"),)
    )


def test_a_fraction_that_takes_nothing_of_many(tmp_path, quiet):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"document {n}\n" for n in range(10_500)))
    refuse(
        tmp_path,
        quiet,
        r"--valid-fraction 1e-12: none of 10500 documents fell into valid",
        text,
        documents_by="line",
        valid_fraction=1e-12,
    )


def test_out_that_is_not_ours(tmp_path, folder, quiet):
    (tmp_path / "out").write_text("a file")
    refuse(tmp_path, quiet, "--out .*out: is a file", folder, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        refuse(
            tmp_path,
            quiet,
            "is not empty, and was not written by evomoe prepare",
            folder,
            out=str(tmp_path / "full"),
            overwrite=overwrite,
        )
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years of work"
