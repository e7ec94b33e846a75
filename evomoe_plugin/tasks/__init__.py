"""Tasks beside fairseq's `language_modeling`."""

from evomoe_plugin.tasks import language_modeling_sft  # noqa: F401
