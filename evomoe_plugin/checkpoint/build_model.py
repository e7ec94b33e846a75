"""Build a model from an untrusted checkpoint config; report failures in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from evomoe_plugin.config.errors import OptionError, RunFailed


@contextlib.contextmanager
def report_config_faults(option: str, path: str) -> Iterator[None]:
    """Inside, any exception is the file's fault and becomes a one-line error that names it.

    fairseq and omegaconf raise arbitrary exceptions where they first use a wrong value.

    Args:
        option: the option that named the file.
        path: the file.
    Raises:
        OptionError: wraps the exception; one-line errors and OSError pass unchanged.
    """
    try:
        yield
    except (OptionError, RunFailed, OSError):
        raise
    except Exception as error:
        raise OptionError(
            option,
            path,
            f"no model can be built from the options and weights that it holds ({describe(error)})",
        ) from error


def describe(error: Exception) -> str:
    """Kind and message of an error, in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
