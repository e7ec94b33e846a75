"""Warnings of fairscale and Hydra that every command of fairseq prints."""

import warnings

from evomoe_plugin.patches.patch import Patch, always
from evomoe_plugin.quiet_imports import ignore_warnings


def apply() -> None:
    ignore_warnings()
    # Not in `IGNORED`, which holds for every program with torch: fairseq always pins memory, and
    # its attention gives masks of two types.
    for message, module in (
        ("'pin_memory' argument is set as true but no accelerator", r"torch\.utils\.data\."),
        ("Support for mismatched key_padding_mask and attn_mask", r"torch\.nn\.functional"),
    ):
        warnings.filterwarnings("ignore", message, module=module, append=True)


PATCH = Patch(
    name="quiet-imports",
    broken="every command prints FutureWarnings of fairscale, and fairseq-hydra-train warns of its "
    "own configuration",
    upstream="fairscale/experimental/nn/offload.py; fairseq_cli/hydra_train.py and fairseq/config",
    remove_when="fairscale uses torch.amp, and fairseq follows Hydra 1.1",
    needed=always("warnings that no user can do anything about"),
    apply=apply,
)
