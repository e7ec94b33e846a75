"""Have fairseq's tasks read dictionaries with a tokenizer's own ids."""

from fairseq.tasks import language_modeling, masked_lm, sentence_prediction

from evomoe_plugin.data.dictionary import TokenizerDictionary

# The tasks look up the class by this name; it also loads fairseq's own dictionaries.
for _task in (language_modeling, masked_lm, sentence_prediction):
    _task.Dictionary = TokenizerDictionary
