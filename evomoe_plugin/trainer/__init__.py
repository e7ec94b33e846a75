"""The trainer: loading, saving, updates, fp32 masters and gradients of sharded experts."""
