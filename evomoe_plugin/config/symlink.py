"""`--symlink`, which the EvoMoE authors' fork of fairseq has."""

from __future__ import annotations

from fairseq.dataclass.configs import CheckpointConfig

from evomoe_plugin.config.dataclass_fields import add_field
from evomoe_plugin.patches.patch import Patch, always


def apply() -> None:
    add_field(
        CheckpointConfig, "symlink", bool, default=False,
        help="make checkpoint_last.pt and checkpoint_best.pt relative links to the numbered "
             "file they equal, instead of copies",
    )


PATCH = Patch(
    name="symlink",
    broken="the published command line ends in: unrecognized arguments: --symlink",
    upstream="fairseq/dataclass/configs.py: CheckpointConfig; the fork's checkpoint_utils",
    remove_when="fairseq has the option",
    needed=always("--symlink, checkpoint.symlink"),
    apply=apply,
)
