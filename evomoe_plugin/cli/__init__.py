"""The `evomoe` command. A verb is a module here: `add_arguments(parser)` and `run(args)`.

No verb imports torch or fairseq before it needs them; `evomoe VERB --help` rarely does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import evomoe_plugin
from evomoe_plugin.config.terminal import show_any_text

# Verb to its line of help.
VERBS = {
    "doctor": "show versions, devices, fast paths and patches, and what is wrong, with the fix",
    "prepare": "turn .txt, .jsonl and .parquet files into a data set to train on",
    "plot": "draw loss, temperature, experts per token and step time of a run from its log",
    "report": "write a page of runs, and of where a checkpoint routes which tokens",
    "upcycle": "make an MoE checkpoint from a dense one or from a Hugging Face folder",
    "import-hf": "turn a Hugging Face folder, dense or with experts, into a fairseq checkpoint",
    "generate": "continue prompts with a checkpoint",
    "export": "write a checkpoint as safetensors, for transformers and what builds on it",
    "checkpoint": "inspect and verify checkpoints, and change how their experts are stored",
}
# Verbs that accept the gates and architectures of a user's own package.
TAKE_USER_DIR = ("upcycle", "generate", "export", "report")
# Verbs that work without fairseq, or import it themselves once they need it.
_LIGHT = ("doctor", "prepare", "plot", "report")

# Modules of the extra `fairseq`, without which the package is the layer in plain PyTorch.
_OF_EXTRA = set(
    "fairseq fairscale hydra iopath jinja2 omegaconf packaging pyarrow rich safetensors "
    "sentencepiece tokenizers".split()
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status. Errors that users can fix take one line."""
    argv = sys.argv[1:] if argv is None else argv
    show_any_text()
    try:
        status = _run(argv)
        sys.stdout.flush()  # notice a closed pipe here, not at the interpreter's exit
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a shell reports a command that SIGPIPE ended
    except Exception as error:
        line = _one_line(error)
        if line is None:
            raise
        message, status = line
        print(f"error: {message}", file=sys.stderr)
    return status


def _run(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="evomoe",
        description="Tools beside fairseq's own commands, which load the models of "
        "this package with --user-dir evomoe_plugin.",
    )
    parser.add_argument(
        "--version", action="version", version=f"evomoe_plugin {evomoe_plugin.__version__}"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, help in VERBS.items():
        subparser = verbs.add_parser(name, help=help, description=help)
        if name == chosen:
            verb = import_module(f"evomoe_plugin.cli.{name.replace('-', '_')}")
            if name in TAKE_USER_DIR:
                from evomoe_plugin.cli.user_dir import import_user_dir

                import_user_dir(subparser, argv)
            verb.add_arguments(subparser)
            subparser.set_defaults(run=verb.run)
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help(sys.stderr)
        return 2
    if args.verb not in _LIGHT:
        evomoe_plugin.register()
    return args.run(args)


def _one_line(error: Exception) -> tuple[str, int] | None:
    """Message and exit status of an error that needs no traceback, else None."""
    # `OptionError` and `RunFailed` by their attribute: their module may not be importable here.
    status = getattr(error, "exit_status", None)
    if status is not None:
        return str(error), status
    if isinstance(error, ModuleNotFoundError) and error.name in _OF_EXTRA:
        return f"{error.name} is not installed: pip install 'evomoe_plugin[fairseq]'", 1
    if evomoe_plugin.fairseq_error is not None:
        return (
            f"fairseq cannot be imported ({evomoe_plugin.fairseq_error}); "
            "run `evomoe doctor` for the fix",
            1,
        )
    if isinstance(error, OSError):
        return str(error), 1
    return None
