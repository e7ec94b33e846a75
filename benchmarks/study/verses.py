"""The verses of the Bible in Spanish and English, as parallel text.

Reina-Valera 1909 and the King James Version, both in the public domain (the latter not in the
United Kingdom), from Debian's packages of modules for SWORD. Both number verses alike, so that the
n-th entry of one module is the translation of the n-th of the other.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from evomoe_plugin.checkpoint.atomic_files import sha256, write_atomically

SOURCE = "Reina-Valera 1909 and King James Version (public domain), from Debian's sword-text-*"
# Suffix -> package, version, SHA-256, module.
PACKAGES = {
    "es": (
        "sword-text-sparv",
        "2.60-1",
        "5c87f9b2bc97457e8a872f5bae7ea7ce59cb3de1dcee73e4d4740451863694cf",
        "spaRV1909eb",
    ),
    "en": (
        "sword-text-kjv",
        "14.3-1",
        "9f463f28ce665f6f528fc723179722bced880a4c5485f7a41bf742838315de57",
        "engKJV2006eb",
    ),
}


def parallel_files(folder: Path) -> list[Path]:
    """Write verses.es and verses.en, a verse a line, if missing.

    Raises:
        SystemExit: the packages cannot be downloaded.
    """
    paths = [folder / f"verses.{language}" for language in PACKAGES]
    if not all(path.exists() for path in paths):
        texts = [list(_verses(folder, *package)) for package in PACKAGES.values()]
        pairs = [pair for pair in zip(*texts, strict=True) if all(pair)]
        for path, lines in zip(paths, zip(*pairs, strict=True), strict=True):
            write_atomically(path, "\n".join(lines) + "\n")
    return paths


def _verses(folder: Path, package: str, version: str, digest: str, module: str) -> Iterator[str]:
    deb = folder / f"{package}_{version}_all.deb"
    if not deb.exists():
        command = ["apt-get", "download", f"{package}={version}"]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if ended.returncode:
            reason = ended.stderr.strip().splitlines()[-1:] or ["no package"]
            sys.exit(
                f"error: cannot download {package} {version} ({reason[0]}); put {deb.name}, of "
                f"Debian 12, into {folder}"
            )
    if sha256(deb) != digest:
        sys.exit(f"error: {deb} is not {package} {version}: its SHA-256 is not {digest}")
    with tempfile.TemporaryDirectory() as unpacked:
        subprocess.run(["dpkg-deb", "-x", deb, unpacked], check=True)
        text = Path(unpacked, "usr/share/sword/modules/texts/ztext", module)
        for testament in ("ot", "nt"):
            yield from read_entries(text / testament)


def read_entries(path: Path) -> Iterator[str]:
    """The entries of a testament in SWORD's format zText, without markup; '' for a missing one.

    Args:
        path: of the files `.bzs`, `.bzv` and `.bzz`: places of the compressed blocks, places of
            the entries in the blocks, and the blocks.
    """
    blocks, entries, data = (
        path.with_suffix(suffix).read_bytes() for suffix in (".bzs", ".bzv", ".bzz")
    )
    number, block = -1, b""
    for wanted, start, size in struct.iter_unpack("<IIH", entries):
        if size and wanted != number:
            offset, compressed, _ = struct.unpack_from("<III", blocks, 12 * wanted)
            number, block = wanted, zlib.decompress(data[offset : offset + compressed])
        yield without_markup(block[start : start + size].decode()) if size else ""


def without_markup(osis: str) -> str:
    """The text of a verse in OSIS, without notes and headings."""
    text = re.sub(r"<(note|title)\b.*?</\1>", "", osis, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", text).split())
