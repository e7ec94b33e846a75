"""Hydra finds this by the name of its folder; see `plugin`."""

from hydra_plugins.evomoe_searchpath.plugin import EvoMoESearchPath as EvoMoESearchPath
