"""`np.compat.long`, which numpy 2 removed."""

from types import SimpleNamespace

import numpy as np

from evomoe_plugin.patches.patch import Patch


def needed() -> str | None:
    if int(np.__version__.split(".")[0]) >= 2:
        return f"numpy {np.__version__} has no np.compat"
    return None


def apply() -> None:
    if not hasattr(np, "compat"):
        np.compat = SimpleNamespace(long=int)


PATCH = Patch(
    name="numpy-compat",
    broken="--sample-break-mode eos, fairseq-generate and fairseq-interactive end in "
           "AttributeError: module 'numpy' has no attribute 'compat'",
    upstream="fairseq/data/token_block_dataset.py and language_pair_dataset.py",
    remove_when="fairseq no longer names np.compat",
    needed=needed,
    apply=apply,
)
