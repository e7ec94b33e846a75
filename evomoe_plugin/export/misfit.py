"""An option that a class of transformers cannot express."""

from __future__ import annotations

from typing import Any


class Misfit(Exception):
    """An option of a model for which a class has no place.

    Args:
        option: by its name in the configuration.
        value: that the model has.
        why: what transformers said about it, if anything.
    """

    def __init__(self, option: str, value: Any, why: str = ""):
        super().__init__(f"--{option.replace('_', '-')} {value}" + (f" ({why})" if why else ""))
        self.option = option
