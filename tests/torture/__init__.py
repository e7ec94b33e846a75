"""A campaign against whatever goes wrong without a word (README.md)."""
