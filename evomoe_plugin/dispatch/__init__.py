"""Dispatch: bring token rows to their experts and the results back."""

from evomoe_plugin.dispatch.local import LocalDispatcher

__all__ = ["LocalDispatcher"]
