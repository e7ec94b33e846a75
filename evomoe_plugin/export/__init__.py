"""Export models to transformers: weights, configuration, tokenizer and modeling code.

`modeling_evomoe.py` and `tokenization_evomoe.py` are written next to the weights. They import
neither this package nor fairseq.
"""
