"""Export models to transformers: weights, configuration, tokenizer and modeling code.

`remote` has the code that is written next to the weights.
"""
