"""Building a model as a checkpoint's own configuration says, which may say anything."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from evomoe_plugin.config.errors import OptionError, RunFailed


@contextlib.contextmanager
def report_config_faults(option: str, path: str) -> Iterator[None]:
    """Inside, whatever goes wrong is the file's fault, and ends in one line that names it.

    fairseq and omegaconf meet a value of the wrong type or size wherever they first use it, and
    raise what comes up there.

    Args:
        option: what the user named the file with.
        path: the file.
    Raises:
        OptionError: with what was raised; errors that explain themselves stay as they are.
    """
    try:
        yield
    except (OptionError, RunFailed, OSError):
        raise
    except Exception as error:
        told = " ".join(f"{type(error).__name__}: {error}".split())
        raise OptionError(option, path, "no model can be built from the options and weights that "
                                        f"it holds ({told[:200]})") from error
