"""The perplexity of a language model, on one rank or several."""
