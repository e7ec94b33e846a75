"""Checkpoint files of others: read as data only, and brought into fairseq's form."""
