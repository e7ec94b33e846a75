"""`evomoe report`: a page of runs and of the routing of checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from evomoe_plugin.cli.flags import add_data, flag


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "logs",
        nargs="*",
        metavar="RUN",
        help="the output of fairseq-train --log-format json, saved to a file, or the folder with "
        "it; several are compared",
    )
    flag(parser, "--checkpoint CKPT", [], "route a sample through this checkpoint; repeatable")
    add_data(parser)
    flag(parser, "--gen-subset SPLIT", "valid", "split that the sample is from")
    flag(parser, "--tokens N", 16384, "tokens of the sample")
    flag(parser, "--title TEXT", "Training and routing", "heading of the page")
    flag(parser, "--out FILE.html", str, "the page to write", required=True)


def run(args: argparse.Namespace) -> int:
    from evomoe_plugin.checkpoint.atomic_files import write_atomically
    from evomoe_plugin.cli.plot import names
    from evomoe_plugin.config.errors import OptionError
    from evomoe_plugin.metrics import read_log
    from evomoe_plugin.report import page

    if not args.logs and not args.checkpoint:
        raise OptionError("checkpoint", "(not given)", "give it, or a training log, or both")
    if args.tokens < 1:
        raise OptionError("tokens", args.tokens, "give 1 or more")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise OptionError("out", out, f"there is no folder {out.parent}")
    logs = [read_log(log_of(run)) for run in args.logs]
    for log, name in zip(logs, names(args.logs), strict=True):
        log.name = name
    samples = []
    if args.checkpoint:
        import evomoe_plugin

        evomoe_plugin.register()
        from evomoe_plugin.generation.loading import OF_TEXT, load_trained_model
        from evomoe_plugin.report.routed_sample import route_samples

        for path, name in zip(args.checkpoint, names(args.checkpoint), strict=True):
            trained = load_trained_model("checkpoint", path, args.data, others=OF_TEXT)
            samples += route_samples(trained, name, args.gen_subset, args.tokens)
    write_atomically(out, page.render(logs, samples, args.title))
    print(f"{out}: {len(logs)} runs, {len(args.checkpoint)} checkpoints")
    return 0


def log_of(run: str) -> Path:
    """The log of a run, given itself or by its folder.

    Raises:
        OptionError: the folder has no log, or several.
    """
    from evomoe_plugin.config.errors import OptionError

    folder = Path(run)
    if not folder.is_dir():
        return folder
    found = sorted(folder.glob("*.log"))
    if len(found) != 1:
        listed = ", ".join(path.name for path in found) or "no .log file"
        raise OptionError("RUN", run, f"has {listed}: give the file with the training log")
    return found[0]
