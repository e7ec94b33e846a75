"""Fairseq tasks of this package, and what stock ones need to read its data sets."""

from evomoe_plugin.data import tokenizer_encoder  # noqa: F401
from evomoe_plugin.tasks import language_modeling, language_modeling_sft  # noqa: F401
