"""Optimizers, registered with fairseq on import."""

from evomoe_plugin.optim.fused_adamw import FusedAdamW, FusedAdamWConfig

__all__ = ["FusedAdamW", "FusedAdamWConfig"]
