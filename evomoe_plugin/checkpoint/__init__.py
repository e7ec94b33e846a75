"""The checkpoint format: save, load, reshard, inspect, verify, import."""
