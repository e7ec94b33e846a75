"""Grouped FFN on CUDA: torch's `grouped_mm` and a Triton kernel for the weighted sum."""
