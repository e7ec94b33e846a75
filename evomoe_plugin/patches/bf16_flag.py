"""`--bf16` on the command line, which fairseq takes as `--tpu`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from fairseq import options

from evomoe_plugin.patches.patch import Patch, always, wrapping

_FLAGS = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
for _flag in ("fp16", "memory-efficient-fp16", "bf16", "memory-efficient-bf16", "tpu"):
    _FLAGS.add_argument(f"--{_flag}", action="store_true")


def _parse_args_and_arch(
    upstream: Callable,
    parser: argparse.ArgumentParser,
    input_args: list[str] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    given, _ = _FLAGS.parse_known_args(input_args)
    if (given.fp16 or given.memory_efficient_fp16) and (given.bf16 or given.memory_efficient_bf16):
        parser.error("--fp16 does not go with --bf16: give one of them")
    parsed = upstream(parser, input_args, *args, **kwargs)
    # Upstream returns (known, rest) when it was asked to leave unknown arguments.
    namespace = parsed[0] if isinstance(parsed, tuple) else parsed
    evaluates = hasattr(namespace, "model_overrides")
    if evaluates and (given.bf16 or given.memory_efficient_bf16):
        parser.error("--bf16: fairseq evaluates in fp32, or with --fp16: leave it out")
    if hasattr(namespace, "tpu"):
        namespace.tpu = given.tpu
    return parsed


PATCH = Patch(
    name="bf16-flag",
    broken="--bf16 ends in ModuleNotFoundError: torch_xla; through Hydra it works; commands that "
    "evaluate ignore it",
    upstream="fairseq/options.py: parse_args_and_arch sets tpu wherever bf16 is set; "
    "fairseq_cli/eval_lm.py and others look at fp16 alone",
    remove_when="fairseq leaves --tpu to the user",
    needed=always("--bf16 is not --tpu"),
    apply=wrapping(options, parse_args_and_arch=_parse_args_and_arch),
)
