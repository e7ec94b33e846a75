"""`np.compat.long`, which numpy 2 removed."""

from types import SimpleNamespace

import numpy as np

from evomoe_plugin.patches.patch import Patch, replacing


def needed() -> str | None:
    return None if hasattr(np, "compat") else f"numpy {np.__version__} has no np.compat"


PATCH = Patch(
    name="numpy-compat",
    broken="--sample-break-mode eos, fairseq-generate and fairseq-interactive end in "
    "AttributeError: module 'numpy' has no attribute 'compat'",
    upstream="fairseq/data/token_block_dataset.py and language_pair_dataset.py",
    remove_when="fairseq no longer names np.compat",
    needed=needed,
    apply=replacing(np, compat=SimpleNamespace(long=int)),
)
