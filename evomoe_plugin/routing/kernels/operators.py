"""Launches of Triton kernels as operators that torch.compile need not look into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch


def operator(
    fake: Callable[..., Any], tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable], Callable]:
    """Decorator: inside of torch.compile, a function of tensors is one operator of the namespace
    `evomoe`; elsewhere, it is called as it is, without what a dispatch costs. Its first argument
    is a tensor of the GPU to launch on.

    Args:
        fake: of the same arguments, gives results of the right shapes and dtypes.
        tags: what the compiler must know of it, as that it draws random numbers.
    """

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def launch(*args: Any) -> Any:
            with torch.cuda.device_of(args[0]):
                return function(*args)

        name = f"evomoe::{function.__module__.rsplit('.', 1)[-1]}_{function.__name__.strip('_')}"
        schema = torch.library.infer_schema(function, mutates_args=())
        made = torch.library.custom_op(name, launch, mutates_args=(), schema=schema, tags=tags)
        made.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return (made if torch.compiler.is_compiling() else launch)(*args)

        return call

    return decorate
