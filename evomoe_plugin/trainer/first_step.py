"""Whether the run of this process has begun its first step: errors before it are of its options.

A process has one run at a time; one after another in a Hydra sweep.
"""

_has_begun = False


def begin_run() -> None:
    """A trainer is built."""
    global _has_begun
    _has_begun = False


def begin_step() -> None:
    """It begins a step."""
    global _has_begun
    _has_begun = True


def has_begun() -> bool:
    """Whether it has begun one."""
    return _has_begun
