"""Shared code of the speed benchmarks: cases, contenders, timing, reports."""
