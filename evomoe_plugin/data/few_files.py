"""Data sets made from a few named files, in one go: parallel text, GLUE."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from evomoe_plugin.checkpoint.atomic_files import sha256
from evomoe_plugin.data.card import DataCard, options_difference
from evomoe_plugin.data.folder import OutputFolder
from evomoe_plugin.data.pipeline import explained, versions
from evomoe_plugin.data.progress import Progress


class Options(Protocol):
    """Of a kind of data set."""

    @property
    def out(self) -> str: ...

    @property
    def overwrite(self) -> bool: ...

    def recorded(self) -> dict[str, Any]:
        """The options that change the result, as JSON values."""
        ...


def prepare_files(
    options: Options,
    files: Iterable[tuple[str | None, Path]],
    card_type: type[DataCard],
    write: Callable[[OutputFolder], dict[str, Any]],
    progress: Progress,
) -> DataCard:
    """Write `options.out` and return its card; if it exists already, only return its card.

    In any case `options.out` is a complete data set, the old or the new one, or does not exist.

    Args:
        files: to read, with the split that each gives, if it gives one.
        card_type: of the card.
        write: writes the data set to the folder's `data`, and returns the fields of the card but
            for those of options, inputs, files and versions.
    Raises:
        OptionError: bad input, or another data set is there.
        RunFailed: the disk is full.
    """
    folder, recorded = OutputFolder(options.out), options.recorded()
    with explained(options.out):
        inputs = [
            {
                "name": path.name,
                "split": split,
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
            for split, path in files
        ]

        def difference(card: DataCard) -> str | None:
            changed = None if card.inputs == inputs else "its files were others"
            return options_difference(card.options, recorded) or changed

        with folder.locked():
            known = folder.prepared(options.overwrite, difference)
            if known is not None:
                progress.say(f"already prepared: {options.out}")
                return card_type(**vars(known))
            try:
                folder.start()
                card = card_type(
                    **write(folder),
                    options=recorded,
                    inputs=inputs,
                    files_not_read=0,
                    files=_written(folder.data),
                    versions=versions(),
                )
                card.save(folder.data)
                folder.publish()
            except BaseException:
                folder.discard()
                raise
    return card


def _written(data: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of each file."""
    return {
        file.relative_to(data).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(data.rglob("*"))
        if file.is_file()
    }
