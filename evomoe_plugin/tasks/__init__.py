"""Fairseq tasks of this package."""

from evomoe_plugin.tasks import language_modeling_sft  # noqa: F401
