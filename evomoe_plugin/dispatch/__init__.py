"""Dispatch: bring token rows to their experts and the results back."""

from evomoe_plugin.dispatch.local import Dispatched, LocalDispatcher

__all__ = ["Dispatched", "LocalDispatcher"]
