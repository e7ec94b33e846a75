"""Have fairseq's task of language modeling read dictionaries with a tokenizer's own ids."""

from fairseq.tasks import language_modeling

from evomoe_plugin.data.dictionary import TokenizerDictionary

# The task looks up the class by this name; it also loads fairseq's own dictionaries.
language_modeling.Dictionary = TokenizerDictionary
