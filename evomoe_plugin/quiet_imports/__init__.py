"""Ignore warnings of fairseq, fairscale and Hydra that their users cannot do anything about.

This file is also installed as the top-level package `evomoe_quiet_imports`, an entry point of
`torch.backends`: torch calls those at the end of its own import. `fairseq-train` imports fairscale
before `--user-dir`, and nothing of ours could run earlier. Only the standard library may be
imported here, not `evomoe_plugin`: fairseq wants to import that itself.
"""

import logging
import warnings

# Beginning of the message, and the module that is blamed; as regular expressions.
IGNORED = (
    (r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated", r"(fairscale|fairseq)\."),
    (r"TypedStorage is deprecated", r"fairscale\."),
    (r"`broadcast_buffers` is deprecated", r"(fairseq|evomoe_plugin\.patches)\."),
    (r"\s*The version_base parameter is not specified", r"fairseq_cli\.|hydra\.experimental\."),
    (r"hydra\.experimental\.(initialize|compose)\(\) is no longer", r"hydra\.experimental\."),
    (r"\s*The strict flag in the compose API is deprecated", r"hydra\.compose"),
    (r"In 'config': Usage of deprecated keyword in package header", r"hydra\."),
    (r"\s*'config' is validated against ConfigStore schema with the same name", ""),
)


def ignore_warnings() -> None:
    """Ignore these, unless `-W` or PYTHONWARNINGS says otherwise.

    And that a task of fairseq asks every command to install tensorboardX, when it is imported.
    """
    logging.getLogger("fairseq.tasks.text_to_speech").setLevel(logging.WARNING)
    for message, module in IGNORED:
        warnings.filterwarnings("ignore", message, module=module, append=True)
