"""Start runs: fairseq's `call_main`, rank processes, detection of torchrun and Slurm."""
