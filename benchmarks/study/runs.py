"""The declared runs, and their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from commands import program
from processes import ROOT

from study import learning_rates
from study.systems import Study, System


@dataclass(frozen=True)
class Run:
    """One training run."""

    system: System
    text: str
    lr: float
    """Peak."""
    seed: int

    @property
    def name(self) -> str:
        """Also of its folder and its result's file."""
        return f"{self.system.name}-lr{self.lr:g}-seed{self.seed}"

    def updates(self, study: Study) -> int:
        return round(study.updates * self.system.share)

    def settings(self, study: Study) -> list[str]:
        """What determines the run beside text and code: configuration and overrides."""
        return [
            f"small/{self.system.config}",
            *study.overrides,
            "common.cpu=true",
            f"common.seed={self.seed}",
            f"optimization.max_update={self.updates(study)}",
            f"optimization.lr=[{self.lr:g}]",
            f"lr_scheduler.warmup_updates={study.warmup}",
            *self.system.overrides,
        ]

    def command(self, study: Study, data: Path, folder: Path) -> list[str]:
        """The command; repeated, it goes on from its last checkpoint."""
        config, *overrides = self.settings(study)
        never = 10**6  # not at the end of epochs: each evaluation costs time
        return [
            program("fairseq-hydra-train"),
            "--config-dir",
            str(ROOT / "hydra_configs"),
            "--config-name",
            config,
            f"task.data={data}",
            f"hydra.run.dir={folder}",
            "common.log_format=json",
            f"common.log_interval={study.log_interval}",
            "dataset.valid_subset='valid,test'",
            f"dataset.validate_interval={never}",
            f"dataset.validate_interval_updates={study.evaluate_interval}",
            f"checkpoint.save_interval={never}",
            f"checkpoint.save_interval_updates={study.save_interval}",
            "checkpoint.keep_interval_updates=1",
            *overrides,
        ]


Perplexities = Mapping[str, Mapping[float, float]]
"""Family -> learning rate -> final validation perplexity of the representative, infinite if it
diverged."""


def grid_run(study: Study, family: str, lr: float) -> Run:
    """The run that measures a learning rate of a family."""
    return Run(study.system(study.representatives[family]), study.grid_text, lr, seed=1)


def ready(study: Study, grid: Perplexities) -> list[Run]:
    """The runs whose learning rate is known, in the order in which they are to be trained."""
    chosen, runs = {}, []
    for family in study.representatives:
        tried = grid.get(family, {})
        rates = learning_rates.wanted(study.grid, tried)
        runs += [grid_run(study, family, lr) for lr in sorted({*study.grid, *rates, *tried})]
        if not rates:
            chosen[family] = learning_rates.choose(tried).lr
    ranked = sorted(
        (
            (system.importance + seed - 1, study.texts.index(text), i, seed)
            for i, system in enumerate(study.systems)
            if system.family in chosen
            for seed in range(1, system.seeds + 1)
            for text in study.texts
        ),
    )
    for _, text, i, seed in ranked:
        system = study.systems[i]
        runs.append(Run(system, study.texts[text], chosen[system.family], seed))
    return list(dict.fromkeys(runs))


def undecided(study: Study, grid: Perplexities) -> list[tuple[System, str, int]]:
    """System, text and seed of the runs whose learning rate is not chosen yet."""
    waiting = {
        family: name
        for family, name in study.representatives.items()
        if learning_rates.wanted(study.grid, grid.get(family, {}))
    }
    return [
        (system, text, seed)
        for system in study.systems
        if system.family in waiting
        for text in study.texts
        for seed in range(1, system.seeds + 1)
        # That one is a run of the grid.
        if (system.name, text, seed) != (waiting[system.family], study.grid_text, 1)
    ]


def families_of(study: Study, names: Iterable[str]) -> set[str]:
    """The families of the named systems."""
    return {study.system(name).family for name in names}
