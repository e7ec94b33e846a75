"""Code that is written next to exported weights and tokenizers.

It imports neither this package nor fairseq: torch and transformers alone run it there.
"""
