"""The data card: contents, inputs and options of a prepared folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evomoe_plugin.checkpoint.atomic_files import write_atomically

CARD = "DATA_CARD.json"
CARD_TEXT = "DATA_CARD.md"
FORMAT = 1


@dataclass(frozen=True)
class DataCard:
    """The record of a prepared folder. Equal inputs and options give equal cards."""

    options: dict[str, Any]
    """Those of `evomoe prepare` that change the result."""
    tokenizer: dict[str, Any]
    """Kind, rows of the dictionary, lossless, flags; special token ids."""
    splits: dict[str, dict[str, int]]
    """Documents, items, tokens (eos included), bytes of text, …"""
    empty_documents: int
    """Documents without text, which are left out."""
    inputs: list[dict[str, Any]]
    """Of every file read: name, split, bytes, sha256, and in each split its number of items, which
    are in the order of the files."""
    files_not_read: int
    """Files left out because --max-bytes was reached."""
    files: dict[str, dict[str, Any]]
    """Bytes, sha256 of every file written."""
    versions: dict[str, str]
    """Of the packages that were used."""
    format: int = FORMAT
    """Of the card."""

    def save(self, folder: Path) -> None:
        """Write the card into a folder, as JSON and as Markdown."""
        write_atomically(folder / CARD_TEXT, self.as_markdown())
        write_atomically(folder / CARD, json.dumps(asdict(self), indent=1, ensure_ascii=False))

    @classmethod
    def load(cls, folder: Path) -> DataCard | None:
        """The card of a folder; None without a card of this format version."""
        try:
            values = json.loads((folder / CARD).read_text(encoding="utf-8"))
            return cls(**values) if values.get("format") == FORMAT else None
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, AttributeError):
            return None

    def damage(self, folder: Path) -> str | None:
        """The first file of the folder whose size differs from the card."""
        sizes = {
            path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*")
        }
        return next(
            (name for name, file in self.files.items() if sizes.get(name) != file["bytes"]), None
        )

    @property
    def usage(self) -> str:
        """Commands that use the folder."""
        return f"""\
    fairseq-train DATA --task language_modeling --user-dir evomoe_plugin --sample-break-mode none …
    fairseq-eval-lm DATA --task language_modeling --user-dir evomoe_plugin --path CHECKPOINT
    fairseq-interactive DATA --task language_modeling --user-dir evomoe_plugin --path CHECKPOINT \\
        {" ".join(self.tokenizer["flags"])}"""

    @property
    def loader(self) -> str:
        """The call that loads the tokenizer."""
        return "load_tokenizer(DATA)"

    def as_markdown(self) -> str:
        """The card for readers."""
        splits = "\n".join(
            f"| {name} | {s['documents']:,} | {s['tokens']:,} | {s['bytes']:,} "
            f"| {s['bytes'] / max(s['tokens'], 1):.2f} | {s['unknown_tokens']:,} |"
            for name, s in self.splits.items()
        )
        options = _rows(
            (f"`--{name.replace('_', '-')}`", value)
            for name, value in self.options.items()
            if name != "source"
        )
        inputs = _rows(
            (i["name"], f"{i['bytes']:,}", f"`{i['sha256'][:16]}`") for i in self.inputs[:20]
        )
        if (more := len(self.inputs) - 20) > 0:
            inputs += f"\n\n… and {more:,} more, listed in {CARD}."
        if self.files_not_read:
            inputs += (
                f"\n\n{self.files_not_read:,} further files were not read: "
                "`--max-bytes` was reached."
            )
        files = _rows(
            (name, f"{f['bytes']:,}", f"`{f['sha256']}`") for name, f in self.files.items()
        )
        exact = (
            "Decoding restores the text exactly."
            if self.tokenizer["lossless"]
            else "The tokenizer normalises: decoding does not restore the text exactly."
        )
        special = ", ".join(f"{name} {i}" for name, i in self.tokenizer.get("special", {}).items())
        ids = f" Token ids are its own; special tokens: {special}." if special else ""
        return f"""\
# Data card

{self.options["source"] or "Not stated (`--source` records origin and licence)."}

| Split | Documents | Tokens (one end-of-sentence per document) | Bytes of text | Bytes per token \
| Unknown tokens |
|---|---|---|---|---|---|
{splits}

{self.empty_documents:,} empty documents were skipped.

## Use

DATA is this folder:

{self.usage}

Tokenizer: {self.tokenizer["kind"]}; the dictionary has {self.tokenizer["rows"]:,} entries. \
{exact}{ids} `evomoe_plugin.data.{self.loader}` encodes and decodes.

## Options

| Option | Value |
|---|---|
{options}

{", ".join(f"{name} {version}" for name, version in self.versions.items())}

## Inputs

| File | Bytes | SHA-256 |
|---|---|---|
{inputs}

## Files

| File | Bytes | SHA-256 |
|---|---|---|
{files}
"""


def _rows(rows: Iterable[Iterable[Any]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def options_difference(recorded: dict[str, Any], options: dict[str, Any]) -> str | None:
    """Describe the first option that differs."""
    for name in sorted(recorded.keys() | options.keys()):
        before, now = recorded.get(name), options.get(name)
        if before != now:
            return f"--{name.replace('_', '-')} was {before}, and is now {now}"
    return None
