"""Metrics of a run, from fairseq's JSON log: parsing, plots and tables."""

from evomoe_plugin.metrics.log import ExpertRecord, Record, TrainingLog, parse_log, read_log
from evomoe_plugin.metrics.phases import Phase, dense_start, one_expert_start, sparse_end
from evomoe_plugin.metrics.steps import seconds_per_update

__all__ = [
    "ExpertRecord",
    "Phase",
    "Record",
    "TrainingLog",
    "dense_start",
    "one_expert_start",
    "parse_log",
    "read_log",
    "seconds_per_update",
    "sparse_end",
]
