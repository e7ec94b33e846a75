"""`--patience`: fairseq's, with a state that checkpoints hold."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


class EarlyStopping:
    """Counts validations since the best one.

    Attributes:
        best: the best value of `--best-checkpoint-metric`; None before the first validation.
        worse: validations since then.
    """

    def __init__(self) -> None:
        self.restore({})

    def restore(self, state: dict[str, Any]) -> None:
        """Set the state; an empty one is that of a new run."""
        self.best: float | None = state.get("best")
        self.worse: int = state.get("worse", 0)

    def state_dict(self) -> dict[str, Any]:
        """As `restore` takes it."""
        return {"best": self.best, "worse": self.worse}

    def is_over(self, cfg: Any) -> bool:
        """Whether the run has ended; `cfg` is fairseq's `CheckpointConfig`."""
        return 0 < cfg.patience <= self.worse

    def should_stop(self, cfg: Any, value: float | None) -> bool:
        """In place of `should_stop_early` of fairseq_cli.train, after each validation.

        Args:
            cfg: fairseq's configuration.
            value: of `--best-checkpoint-metric`; None where nothing was validated.
        """
        if value is None or cfg.checkpoint.patience <= 0:
            return False
        sign = -1 if cfg.checkpoint.maximize_best_checkpoint_metric else 1
        if self.best is None or sign * value < sign * self.best:
            self.best, self.worse = value, 0
            return False
        self.worse += 1
        if self.is_over(cfg.checkpoint):
            logger.info(
                "early stop since valid performance hasn't improved for last %d runs",
                cfg.checkpoint.patience,
            )
        return self.is_over(cfg.checkpoint)


# Of the run of this process.
STATE = EarlyStopping()
