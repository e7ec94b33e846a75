"""The trainer: loading, saving, updates, and gradients of sharded experts."""
