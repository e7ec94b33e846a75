"""What the benchmarks of speed share: cases, contenders, clocks, reports."""
