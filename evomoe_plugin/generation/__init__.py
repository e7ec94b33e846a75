"""A trained model at work: loading it with its data's tokenizer, and continuing prompts."""

from evomoe_plugin.generation.generate import Continuation, Generation, GenerationOptions, generate
from evomoe_plugin.generation.loading import TrainedModel, load_trained_model

__all__ = [
    "Continuation", "Generation", "GenerationOptions", "TrainedModel", "generate",
    "load_trained_model",
]
