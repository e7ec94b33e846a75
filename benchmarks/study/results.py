"""The result of a run: one small JSON file each, so that results of several machines merge."""

from __future__ import annotations

import functools
import json
import math
import platform
import shlex
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import ROOT

from evomoe_plugin.checkpoint.atomic_files import write_atomically
from evomoe_plugin.metrics.log import TrainingLog
from evomoe_plugin.metrics.steps import training_flops
from study.runs import Perplexities, Run, ready
from study.systems import Study

RESULTS = Path(__file__).parent / "results"
CODE = ("evomoe_plugin", "hydra_configs")
"""What a run's numbers depend on, beside the environment."""

PACKAGES = ("torch", "ve-fairseq", "hydra-core", "numpy", "sentencepiece")
_TRAINING = (
    "loss",
    "inner_loss",
    "experts_per_token",
    "load_max",
    "load_cv2",
    "dead_experts",
    "gate_entropy",
    "overflow",
    "mflops_per_token",
)
# Of a sample of the validation tokens; not at the first validation, nor at the first one of an
# attempt, for what compares two.
ROUTING = ("stability", "purity", "combine_weight")

Columns = dict[str, list[float | None]]


@dataclass(frozen=True)
class Result:
    """The result of a finished run."""

    system: str
    text: str
    seed: int
    lr: float
    updates: int
    settings: list[str]
    """Those of `Run.settings`."""
    data: str
    """Fingerprint of the prepared text."""
    curve: Columns
    """At each evaluation: update, valid_ppl, test_ppl, tera_flops (training: three forward passes)
    and cpu_seconds (of training alone), both since the first update, without repeated updates;
    and those of `ROUTING` and test_bleu, where they are logged."""
    training: Columns
    """update, and the means of the logged metrics since the previous one."""
    wall_seconds: float
    cpu_seconds: float
    """Of all attempts, with start, evaluation and repeated updates; up to one interval of the log
    is missing for an attempt that was killed together with the queue."""
    attempts: list[dict[str, Any]]
    """Of each: commit, whether the code differed from it, start (UTC)."""
    command: str
    machine: dict[str, str]
    packages: dict[str, str]
    diverged: bool = False
    """It ended early, at numbers that were not finite: its perplexity is infinite."""

    @property
    def valid_perplexity(self) -> float:
        return math.inf if self.diverged else self._last("valid_ppl")

    @property
    def test_perplexity(self) -> float:
        return math.inf if self.diverged else self._last("test_ppl")

    @property
    def test_bleu(self) -> float | None:
        return self._last("test_bleu") if "test_bleu" in self.curve else None

    @property
    def tera_flops(self) -> float:
        return self._last("tera_flops")

    def _last(self, name: str) -> float:
        value = self.curve[name][-1] if self.curve[name] else None
        return math.nan if value is None else value

    def write(self, path: Path) -> None:
        """Write JSON atomically, one line per field."""
        path.parent.mkdir(parents=True, exist_ok=True)
        fields = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in asdict(self).items())
        write_atomically(path, "{\n" + ",\n".join(fields) + "\n}\n")


def path_of(run: Run, results: Path) -> Path:
    return results / run.text / f"{run.name}.json"


def read(path: Path) -> Result | None:
    """The result in a file; None if there is no file."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return None


@functools.cache
def _read(path: Path, _: int) -> Result:
    return Result(**json.loads(path.read_text()))


def current(run: Run, study: Study, results: Path) -> Result | None:
    """The result of a run as it is declared now; None if missing, or of other settings."""
    result = read(path_of(run, results))
    return result if result is not None and result.settings == run.settings(study) else None


def all_current(study: Study, results: Path) -> list[Result]:
    """The results so far of all declared runs, in the order of the queue."""
    declared = ready(study, grid_perplexities(study, results))
    found = (current(run, study, results) for run in declared)
    return [result for result in found if result is not None]


def grid_perplexities(study: Study, results: Path) -> Perplexities:
    """Final validation perplexities by family and learning rate, from the results so far."""
    steps = [study.grid[0] / 2, *study.grid, study.grid[-1] * 2]
    found: dict[str, dict[float, float]] = {}
    for family, name in study.representatives.items():
        found[family] = {}
        for lr in steps:
            run = Run(study.system(name), study.grid_text, lr, seed=1)
            result = current(run, study, results)
            if result is not None:
                found[family][lr] = result.valid_perplexity
    return found


def collect(
    run: Run,
    study: Study,
    log: TrainingLog,
    costs: list[dict[str, Any]],
    data: str,
    command: list[str],
    diverged: bool = False,
) -> Result | None:
    """The result in the log of a run; None if the run has neither finished nor diverged.

    Args:
        costs: records of `attempt.Attempt`.
    """
    updates = run.updates(study)
    valid, test = (dict(zip(*log.series("ppl", s), strict=True)) for s in ("valid", "test"))
    ended = log.intervals and log.intervals[-1].update == updates and updates in test
    if not (ended or diverged):
        return None
    flops, cpu = training_flops(log), _cumulated_cpu(costs)
    evaluated = sorted(valid.keys() & test.keys() & flops.keys())
    names = [stack + n for stack in log.stacks for n in _TRAINING if log.series(stack + n)[0]]
    more = {name: dict(zip(*log.series(name, "valid"), strict=True)) for name in ROUTING}
    more["test_bleu"] = dict(zip(*log.series("bleu", "test"), strict=True))
    last = {cost["attempt"]: cost for cost in costs}
    return Result(
        system=run.system.name,
        text=run.text,
        seed=run.seed,
        lr=run.lr,
        updates=updates,
        settings=run.settings(study),
        data=data,
        curve={
            "update": evaluated,
            "valid_ppl": [_finite(valid[u]) for u in evaluated],
            "test_ppl": [_finite(test[u]) for u in evaluated],
            "tera_flops": [round(flops[u] / 1e12, 4) for u in evaluated],
            "cpu_seconds": [round(cpu[u], 2) if u in cpu else None for u in evaluated],
            **{name: [at.get(u) for u in evaluated] for name, at in more.items() if at},
        },
        training={
            "update": [record.update for record in log.intervals],
            **{n: [_finite(r.values.get(n)) for r in log.intervals] for n in names},
        },
        wall_seconds=round(sum(cost["wall"] for cost in last.values()), 1),
        cpu_seconds=round(sum(cost["cpu"] for cost in last.values()), 1),
        attempts=[cost["code"] for cost in costs if "code" in cost],
        command=shlex.join(command),
        machine=machine(),
        packages=packages(),
        diverged=diverged,
    )


def _finite(value: float | None) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _cumulated_cpu(costs: list[dict[str, Any]]) -> dict[int, float]:
    """CPU seconds of training by update; without updates after one that was not measured."""
    # Later attempts repeat the updates after their checkpoint.
    seconds = {cost["update"]: cost for cost in costs if "update" in cost}
    total, before, found = 0.0, 0, {}
    for update, cost in sorted(seconds.items()):
        if cost["after"] != before:
            break
        total += cost["train_cpu"]
        before = update
        found[update] = total
    return found


@functools.cache
def machine() -> dict[str, str]:
    from speed.machine import cpu  # imports torch

    return {"cpu": cpu(), "python": platform.python_version(), "system": platform.platform()}


@functools.cache
def packages() -> dict[str, str]:
    from speed.machine import version

    return {name: version(name) for name in PACKAGES}


def code_state() -> dict[str, Any]:
    """The clone's commit, and whether the code that runs depend on differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", *CODE)),
    }
