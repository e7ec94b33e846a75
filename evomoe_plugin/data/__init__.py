"""Text made ready for `--task language_modeling`: `prepare` does it, a data card records it."""

from evomoe_plugin.data.card import DataCard
from evomoe_plugin.data.options import PrepareOptions
from evomoe_plugin.data.pipeline import prepare
from evomoe_plugin.data.tokenizers import Tokenizer, load_tokenizer

__all__ = ["DataCard", "PrepareOptions", "Tokenizer", "load_tokenizer", "prepare"]
