"""Starting a run: fairseq's `call_main`, rank processes, torchrun and Slurm detection."""
