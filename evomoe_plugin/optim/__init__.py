"""Optimizers and schedules of the learning rate, registered with fairseq on import."""

from evomoe_plugin.optim.fused_adamw import FusedAdamW, FusedAdamWConfig
from evomoe_plugin.optim.muon import Muon, MuonConfig
from evomoe_plugin.optim.wsd_schedule import WSDSchedule, WSDScheduleConfig

__all__ = [
    "FusedAdamW",
    "FusedAdamWConfig",
    "Muon",
    "MuonConfig",
    "WSDSchedule",
    "WSDScheduleConfig",
]
