"""MoE language models whose sparsity is learned, as a plugin of stock fairseq.

`--user-dir evomoe_plugin` imports this package after fairseq, which registers its models,
criterions, tasks and optimizers. A program that imports it before fairseq calls `register()`.

`MoELayer` is the layer for models in plain PyTorch, without fairseq.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomoe_plugin.config.errors import OptionError
    from evomoe_plugin.routing.noise import sequence_keys
    from evomoe_plugin.standalone import MoELayer, MoEOutput

__all__ = ["MoELayer", "MoEOutput", "OptionError", "register", "sequence_keys"]
__version__ = "0.1.0"

# Why `register` could not import fairseq, for `evomoe doctor`; None if it could or was not called.
fairseq_error: Exception | None = None


# Imported when asked for: `evomoe --help` does without torch.
_LAZY = {
    "MoELayer": "evomoe_plugin.standalone",
    "MoEOutput": "evomoe_plugin.standalone",
    "OptionError": "evomoe_plugin.config.errors",
    "sequence_keys": "evomoe_plugin.routing.noise",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def register() -> None:
    """Import fairseq, apply the patches, and register all that this package brings, once.

    Raises:
        Exception: of whatever kind importing an unsuited fairseq raises; also in `fairseq_error`.
    """
    global fairseq_error
    from evomoe_plugin.quiet_imports import ignore_warnings

    ignore_warnings()
    try:
        import fairseq  # noqa: F401
    except Exception as error:
        fairseq_error = error
        raise
    from evomoe_plugin import patches

    patches.apply_all()

    from evomoe_plugin.config.dataclass_fields import add_fields
    from evomoe_plugin.evaluation import eval_lm
    from evomoe_plugin.launch import call_main, command_line
    from evomoe_plugin.trainer import install

    add_fields()
    call_main.install()
    command_line.install()
    install.install()
    eval_lm.install()

    from evomoe_plugin import criterions, evolve, models, optim, tasks  # noqa: F401


if "fairseq" in sys.modules:
    register()
