"""One HTML page of runs and of the routing of checkpoints (`evomoe report`)."""
