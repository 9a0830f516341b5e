"""Counting: floating-point operations, products by packed weights among them, and memory at its peak."""

import math
from collections.abc import Sequence
from pathlib import Path
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


def peak_gib() -> float | None:
    """Return the peak resident memory of this process (since `forget_peak`), GiB; None where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
