"""Options: their dataclasses, checks, errors, and how fairseq and Hydra learn of them."""
