"""Load a trained model with its tokenizer, and continue prompts."""
