"""Train a small MoE language model from dense to sparse, and evaluate it.

From the clone's root: `make quickstart`, or `.venv/bin/python examples/quickstart/run.py`. Every
step is a command that is printed before it runs. A second run continues where the first stopped.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", category=FutureWarning)  # fairscale's, of today's torch

from commands import ROOT, Refused, StepFailed, program, run, shown  # noqa: E402
from folder import RunFolder  # noqa: E402
from recipe import EXPERTS, QUICK_UPDATES, UPDATES, Recipe, flags  # noqa: E402
from rich.console import Console  # noqa: E402

from evomoe_plugin.config.errors import OptionError  # noqa: E402
from evomoe_plugin.data import DataCard  # noqa: E402
from evomoe_plugin.metrics import TrainingLog, read_log, seconds_per_update  # noqa: E402
from evomoe_plugin.metrics.log import parse_log  # noqa: E402
from evomoe_plugin.metrics.table import closing_table, course_table  # noqa: E402

REFUSED, FAILED, INTERRUPTED = 2, 1, 130


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    folder = RunFolder(Path(args.dir).resolve())
    updates = args.updates or (QUICK_UPDATES if args.quick else UPDATES)
    text = tuple(str(Path(path).resolve()) for path in args.text or ())
    recipe = Recipe(updates=updates, quick=args.quick, text=text)
    # Also interrupt the running command on these signals.
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.default_int_handler)
    try:
        with folder.locked() as lock:
            if args.fresh:
                folder.clear()
            folder.claim(recipe)
            Quickstart(recipe, folder, lock).run()
    except (Refused, OptionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    except StepFailed as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\ninterrupted: run it again to continue", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: {error.filename or args.dir}: {error.strerror}", file=sys.stderr)
        return FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Prepare a text, train a small MoE language model on it from dense to hard "
        "top-1 routing, and evaluate it before and after: about 5 minutes on 2 cores.",
    )
    parser.add_argument(
        "--dir",
        default=ROOT / "quickstart-run",
        metavar="DIR",
        help="output folder (default: quickstart-run in the clone)",
    )
    parser.add_argument(
        "--text",
        action="append",
        metavar="PATH",
        help="train on this file or folder of .txt, .py, .jsonl or .parquet files "
        "instead of the Python standard library; repeatable",
    )
    parser.add_argument(
        "--updates",
        type=_count,
        metavar="N",
        help=f"length of the run; the schedules follow (default: {UPDATES})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"run all steps with a toy model, {QUICK_UPDATES} updates unless --updates is given",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="delete the files of an earlier quickstart in DIR, and start over",
    )
    return parser


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 4:
        raise argparse.ArgumentTypeError(f"{text}: give 4 updates or more")
    return count


class Quickstart:
    """The steps; each is skipped if its result exists."""

    def __init__(self, recipe: Recipe, folder: RunFolder, lock: int):
        self.recipe, self.folder, self.lock = recipe, folder, lock
        self.data, self.checkpoints = shown(folder.data), shown(folder.checkpoints)

    def run(self) -> None:
        trained = self.folder.trained_updates()
        finished = trained >= self.recipe.updates
        if finished:
            print(
                f"{shown(self.folder.path)} has a finished run: nothing is retrained. "
                "(--fresh retrains.)"
            )
        elif trained:
            print(
                f"{shown(self.folder.path)} has a run that was interrupted after "
                f"{trained:,} of {self.recipe.updates:,} updates: resuming."
            )
        self.prepare()
        if not self.folder.first.exists():
            self.train_first()
        if not finished:
            self.train()
        before = self.evaluate(self.folder.first, self.folder.first_log, "before")
        after = self.evaluate(self.folder.last, self.folder.last_log, "after")
        self.draw()
        self.report(before, after)

    def prepare(self) -> None:
        if DataCard.load(self.folder.data) is not None:
            return
        self._say("Preparing the text: documents, a tokenizer, fairseq's binary files")
        command = [
            program("evomoe"),
            "prepare",
            *map(shown, self.recipe.inputs),
            "--out",
            self.data,
            *flags(self.recipe.prepare),
        ]
        run(command, self.folder.prepare_log, _echo, keep_open=self.lock)

    def train_first(self) -> None:
        if self.folder.trained_updates() == 0:
            self._say("Training one update, for comparison")
            self._train(
                1,
                show=f"{program('fairseq-train')} {self.data} … --max-update 1   "
                "(the other options are those of the next command)",
            )
        # Copied under another name, so that checkpoint_first.pt is always complete.
        part = self.folder.first.with_suffix(".part")
        shutil.copyfile(self.folder.last, part)
        part.rename(self.folder.first)

    def train(self) -> None:
        self._say(
            f"Training to update {self.recipe.updates:,}: all {EXPERTS} experts per token at "
            f"first, one from update {self.recipe.annealing:,} on"
        )
        self.folder.train_log.touch()
        with open(self.folder.train_log, errors="replace") as lines:
            progress = Progress(parse_log(lines))
        self._train(self.recipe.updates, on_line=progress)

    def _train(self, updates: int, **options) -> None:
        command = [
            program("fairseq-train"),
            self.data,
            *flags(self.recipe.train),
            "--save-dir",
            self.checkpoints,
            "--max-update",
            str(updates),
        ]
        run(command, self.folder.train_log, append=True, keep_open=self.lock, **options)

    def evaluate(self, checkpoint: Path, log: Path, when: str) -> float:
        """Perplexity on the test split."""
        perplexity = _perplexity(log)
        if perplexity is None:
            self._say(f"Evaluating on the test split, {when} training")
            command = [
                program("fairseq-eval-lm"),
                self.data,
                *flags(self.recipe.evaluate),
                "--path",
                shown(checkpoint),
            ]
            run(command, log, keep_open=self.lock)
            perplexity = _perplexity(log)
            if perplexity is None:
                raise StepFailed(command, log, "ended without a perplexity")
            print(f"  perplexity {perplexity:,.1f}")
        return perplexity

    def draw(self) -> None:
        if self.folder.picture.exists():
            return
        self._say("Plotting the run")
        run(
            [
                program("evomoe"),
                "plot",
                shown(self.folder.train_log),
                "--out",
                shown(self.folder.picture),
            ],
            self.folder.plot_log,
            keep_open=self.lock,
        )

    def report(self, before: float, after: float) -> None:
        log = read_log(self.folder.train_log)
        console = Console()
        console.print()
        console.print(
            closing_table(
                log,
                {
                    "test perplexity": (f"{before:,.1f}", f"{after:,.1f}"),
                    "evaluated after update": ("1", f"{self.recipe.updates:,}"),
                },
            )
        )
        console.print(course_table(log))
        for name, path in [
            ("checkpoint", self.folder.last),
            ("picture", self.folder.picture),
            ("log", self.folder.train_log),
            ("data card", self.folder.data / "DATA_CARD.md"),
        ]:
            print(f"  {name:<12}{shown(path)}")

    @staticmethod
    def _say(text: str) -> None:
        print(f"\n── {text}", flush=True)


class Progress:
    """Print one line per interval of the training log."""

    def __init__(self, log: TrainingLog):
        self.log = log
        self._headed = False

    def __call__(self, line: str) -> None:
        record = self.log.add(line)
        if record is None:
            return
        if not self._headed:
            print("   update  perplexity  temperature  experts/token  seconds/update")
            self._headed = True
        values = record.values
        print(
            f"  {record.update:7,}  {values['ppl']:10,.1f}  {values['temperature']:11.3f}  "
            f"{values['experts_per_token']:13.2f}  {seconds_per_update(self.log)[1][-1]:14.2f}",
            flush=True,
        )


def _echo(line: str) -> None:
    """Print a line of `evomoe prepare`, except its advice on the next step."""
    if not line.startswith("next:"):
        print(f"  {line}", end="", flush=True)


def _perplexity(log: Path) -> float | None:
    """The perplexity in a log of fairseq-eval-lm, if it finished."""
    if not log.exists():
        return None
    found = re.findall(r"Perplexity: (\S+)$", log.read_text(errors="replace"), re.MULTILINE)
    return float(found[-1]) if found else None


if __name__ == "__main__":
    sys.exit(main())
