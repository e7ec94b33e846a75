"""`--symlink`, which the EvoMoE authors' fork of fairseq has."""

from __future__ import annotations

from fairseq.dataclass.configs import CheckpointConfig

from evomoe_plugin.compat.dataclass_fields import add_field
from evomoe_plugin.compat.mend import Mend, always


def apply() -> None:
    add_field(
        CheckpointConfig, "symlink", bool, default=False,
        help="make checkpoint_last.pt and checkpoint_best.pt relative links to the numbered "
             "file they equal, instead of copies",
    )


MEND = Mend(
    name="symlink",
    broken="the published command line ends in: unrecognized arguments: --symlink",
    upstream="fairseq/dataclass/configs.py: CheckpointConfig; the fork's checkpoint_utils",
    remove_when="fairseq has the option",
    needed=always("--symlink, checkpoint.symlink"),
    apply=apply,
)
