"""A trained model at work: loading it with its data's tokenizer, and continuing prompts."""
