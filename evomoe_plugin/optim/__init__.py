"""Optimizers and schedules of the learning rate, registered with fairseq on import."""

from evomoe_plugin.optim.fused_adamw import FusedAdamW as FusedAdamW
from evomoe_plugin.optim.muon import Muon as Muon
from evomoe_plugin.optim.wsd_schedule import WSDSchedule as WSDSchedule
