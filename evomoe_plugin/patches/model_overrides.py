"""`--model-overrides`, which ignores names that the checkpoint does not have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from fairseq import options

from evomoe_plugin.checkpoint.overrides import check_model_overrides
from evomoe_plugin.config.errors import OptionError
from evomoe_plugin.patches.patch import Patch, always, wrapping


def _parse_args_and_arch(
    upstream: Callable, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any
) -> Any:
    parsed = upstream(parser, *args, **kwargs)
    namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    if getattr(namespace, "model_overrides", None):
        try:
            check_model_overrides(namespace.model_overrides, getattr(namespace, "path", None))
        except OptionError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
    return parsed


PATCH = Patch(
    name="model-overrides",
    broken="a misspelt name in --model-overrides changes nothing, in silence; a text that is no "
    "dictionary ends in a traceback",
    upstream="fairseq/dataclass/utils.py: overwrite_args_by_name sets what it finds",
    remove_when="fairseq refuses names that it does not find",
    needed=always("an override is an option of the checkpoint"),
    apply=wrapping(options, parse_args_and_arch=_parse_args_and_arch),
)
