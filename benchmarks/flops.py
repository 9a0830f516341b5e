"""Counting of floating-point operations that knows products by packed weights, too."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _mkl(tokens: Sequence[int], packed: Any, weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(tokens) * weight[0]


def _onednn(tokens: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(tokens) * weight[0]


def counter() -> FlopCounterMode:
    """Return a context in which the operations of this thread are counted."""
    known: dict[Any, Any] = {}
    if hasattr(torch.ops.mkl, "_mkl_linear"):
        known[torch.ops.mkl._mkl_linear] = _mkl
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        known[torch.ops.mkldnn._linear_pointwise] = _onednn
    return FlopCounterMode(display=False, custom_mapping=known)
