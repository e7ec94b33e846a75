"""Where there is padding, as far as the host knows it without a look at the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_KNOWN = WeakTensorKeyDictionary()


@dataclass(frozen=True)
class Padding:
    """Of tokens [batch, length]."""

    count: int
    is_first: bool
    """Whether there is padding before a token."""


def padding_of(tokens_BT: Tensor, padding_idx: int) -> Padding:
    """The padding in these tokens; on a GPU the host waits, unless `remember` was called."""
    if tokens_BT in _KNOWN:
        return _KNOWN[tokens_BT]
    mask_BT = tokens_BT.eq(padding_idx)
    count = int(mask_BT.sum())
    is_first = bool(count) and bool((mask_BT[:, :-1] & ~mask_BT[:, 1:]).any())
    return Padding(count, is_first)


def remember(tokens_BT: Tensor, padding: Padding) -> None:
    """State the padding of these tokens."""
    _KNOWN[tokens_BT] = padding
