"""Prepare text for `--task language_modeling`; a data card records how."""

from evomoe_plugin.data.card import DataCard
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.pipeline import prepare
from evomoe_plugin.data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["DataCard", "PrepareOptions", "Tokenizer", "load_tokenizer", "prepare"]
