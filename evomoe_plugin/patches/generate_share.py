"""fairseq-generate, which generates for the share of one rank that nobody asked for."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fairseq import options

from evomoe_plugin.patches.patch import Patch, always, wrapping

_RANK = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_RANK.add_argument("--distributed-rank")


def _parse_args_and_arch(
    upstream: Callable,
    parser: argparse.ArgumentParser,
    input_args: list[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    parsed = upstream(parser, input_args, *args, **kwargs)
    namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    ranks = getattr(namespace, "distributed_world_size", 1)
    rank = _RANK.parse_known_args(input_args)[0].distributed_rank
    generates = hasattr(namespace, "score_reference")
    if generates and ranks > 1 and rank is None:
        parser.error(
            f"--distributed-world-size {ranks}: no ranks are started, only the share of rank 0 "
            "would be generated: give 1, or start one command for each --distributed-rank"
        )
    return parsed


PATCH = Patch(
    name="generate-share",
    broken="fairseq-generate --distributed-world-size 2 generates for half of the data, and "
    "succeeds",
    upstream="fairseq_cli/generate.py: takes a rank's share, and starts no ranks",
    remove_when="fairseq-generate calls distributed_utils.call_main",
    needed=always("no sample is left out"),
    apply=wrapping(options, parse_args_and_arch=_parse_args_and_arch),
)
