"""Chunked grouped FFN; also the generic path on devices without a grouped matmul."""
