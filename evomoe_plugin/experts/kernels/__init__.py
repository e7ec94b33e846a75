"""Grouped expert FFN kernels, one folder per device type."""
