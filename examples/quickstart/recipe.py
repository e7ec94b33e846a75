"""Model, data and length of the quickstart's run."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass

UPDATES = 1000
QUICK_UPDATES = 12
EXPERTS = 8

# The standard library without tests, character tables and additions of distributions.
STANDARD_LIBRARY_EXCLUDES = (
    "site-packages",
    "dist-packages",
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "pydoc_data",
    "ensurepip",
    "config-*",
)


@dataclass(frozen=True)
class Recipe:
    """A configuration of the quickstart.

    Options are the commands' own flags; a flag without a value has None.
    """

    updates: int = UPDATES
    quick: bool = False
    text: tuple[str, ...] = ()
    """Files and folders; default: the source of the Python standard library."""

    @property
    def asked(self) -> dict[str, object]:
        """The user's choices, by option of the quickstart."""
        return {
            "--updates": self.updates,
            "--quick": self.quick,
            "--text": list(self.text) or "the Python standard library",
        }

    @property
    def annealing(self) -> int:
        """Length of the annealing in updates."""
        return self.updates * 2 // 5

    @property
    def inputs(self) -> list[str]:
        """Inputs of `evomoe prepare`."""
        return list(self.text) or [sysconfig.get_paths()["stdlib"]]

    @property
    def prepare(self) -> list[tuple[str, str | None]]:
        """Options of `evomoe prepare`: enough text that little of it is repeated."""
        reading = [("--text-suffix", ".py"), ("--encoding-errors", "replace")]
        if not self.text:
            reading += [("--exclude", name) for name in STANDARD_LIBRARY_EXCLUDES]
            reading += [("--source", "Python standard library (PSF licence)")]
        return [
            *reading,
            ("--max-bytes", "300K" if self.quick else "8M"),
            ("--vocab-size", "512" if self.quick else "2048"),
            ("--valid-fraction", "0.05" if self.quick else "0.02"),
            ("--test-fraction", "0.05" if self.quick else "0.02"),
        ]

    def given(self, option: str) -> tuple[str, ...]:
        """The values of a repeatable option of `evomoe prepare`."""
        return tuple(value for name, value in self.prepare if name == option)

    @property
    def train(self) -> list[tuple[str, str | None]]:
        """Options of `fairseq-train` that are the same for all updates.

        Schedules are given in updates, not as a share of --max-update: the first update is trained
        by a separate command, and must be the same.
        """
        width, ffn_dim, expert_ffn_dim = ("32",) * 3 if self.quick else ("128", "256", "1024")
        tokens, batch = self._batch
        interval = max(1, self.updates // 40)
        return [
            ("--user-dir", "evomoe_plugin"),
            ("--task", "language_modeling"),
            ("--cpu", None),
            ("--arch", "transformer_lm_gpttiny_moe"),
            ("--share-decoder-input-output-embed", None),
            ("--decoder-embed-dim", width),
            ("--decoder-ffn-embed-dim", ffn_dim),
            ("--moe-expert-ffn-dim", expert_ffn_dim),
            ("--moe-expert-count", str(EXPERTS)),
            ("--moe-freq", "2"),
            ("--dropout", "0"),
            ("--attention-dropout", "0"),
            # With an exponential schedule the experts per token fall evenly. After annealing the
            # sparse model is trained for the rest of the run.
            ("--moe-temperature-start", "2"),
            ("--moe-temperature-end", "0.1"),
            ("--moe-temperature-schedule", "exp"),
            ("--moe-temperature-updates", str(self.annealing)),
            ("--moe-hard-updates", str(self.annealing)),
            ("--criterion", "moe_cross_entropy"),
            ("--moe-gate-loss-wt", "0.03"),
            ("--tokens-per-sample", tokens),
            ("--batch-size", batch),
            ("--optimizer", "adam"),
            ("--adam-betas", "(0.9, 0.98)"),
            ("--clip-norm", "1.0"),
            ("--lr", "0.005"),
            ("--lr-scheduler", "polynomial_decay"),
            ("--warmup-updates", str(self.updates // 20)),
            ("--total-num-update", str(self.updates)),
            ("--seed", "1"),
            ("--num-workers", "0"),
            ("--save-interval-updates", str(4 * interval)),
            ("--keep-interval-updates", "1"),
            ("--no-epoch-checkpoints", None),
            ("--best-checkpoint-metric", "ppl"),
            ("--max-valid-steps", "10"),
            ("--log-format", "json"),
            ("--log-interval", str(interval)),
        ]

    @property
    def evaluate(self) -> list[tuple[str, str | None]]:
        """Options of `fairseq-eval-lm`."""
        tokens, batch = self._batch
        return [
            ("--user-dir", "evomoe_plugin"),
            ("--task", "language_modeling"),
            ("--cpu", None),
            ("--gen-subset", "test"),
            ("--tokens-per-sample", tokens),
            ("--batch-size", batch),
        ]

    @property
    def _batch(self) -> tuple[str, str]:
        """Tokens per sequence, and sequences per batch."""
        return ("32", "4") if self.quick else ("128", "8")


def flags(options: list[tuple[str, str | None]]) -> list[str]:
    """Options as command line words."""
    return [word for option in options for word in option if word is not None]
