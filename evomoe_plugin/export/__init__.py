"""Models for other tools: weights, configuration, tokenizer and the code that loads them.

`modeling_evomoe.py` and `tokenization_evomoe.py` are written beside the weights. They stand alone:
nothing of ours and nothing of fairseq is imported there.
"""
