"""Weights of linear layers in the order in which a CPU multiplies by them, kept for as long as a loop lasts.

In:  linear layers or 1x1 convolutions, the rows of their inputs, how often each will be called.
Out: `product` multiplies tokens (...,C) -> (...,D) by the packed weight of a layer that has one.

A matrix product of a few hundred rows spends part of its time on reordering the weights, anew in every call, and
denoising calls the same layers tens of times. What it saves is measured in docs/results.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARE = 4  # that many times what is packed must be free
ENOUGH = 2048  # rows times calls; packing takes about as long as is gained at half of that
CONTROLS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


@dataclass(frozen=True)
class Packed:
    """A weight (D,C) in the order of the library that multiplies by it, for inputs of `rows` rows."""

    weight: Tensor
    rows: int

    @classmethod
    def of(cls, weight: Tensor, rows: int) -> Packed:
        """Pack a weight (D,C), in as much memory again."""
        single = weight.dtype == torch.float32
        pack = torch.ops.mkl._mkl_reorder_linear_weight if single else torch.ops.mkldnn._reorder_linear_weight
        return cls(pack(weight.detach().contiguous(), rows), rows)

    def times(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Multiply (...,C) by it; `weight` is the plain one, which MKL takes for another number of rows."""
        result: Tensor
        if weight.dtype == torch.float32:
            result = torch.ops.mkl._mkl_linear(hidden, self.weight, weight, bias, self.rows)
        else:
            result = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, bias, "none", [], "")
        return result


def product(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a linear layer or a 1x1 convolution to (...,C), by its packed weight while it has one."""
    packed: Packed | None = getattr(layer, "packed", None)
    if packed is not None and not torch.is_grad_enabled():
        return packed.times(hidden, matrix(layer), cast(Any, layer).bias)
    if type(layer) is nn.Conv2d:
        return F.linear(hidden, matrix(layer), layer.bias)
    result: Tensor = layer(hidden)
    return result


def matrix(layer: nn.Module) -> Tensor:
    """Return the weight (D,C) of a linear layer or a 1x1 convolution."""
    return cast(Tensor, layer.weight).flatten(1)


@contextlib.contextmanager
def packing(layers: Iterable[nn.Module], rows: int, calls: int) -> Iterator[None]:
    """Keep the weights of layers packed for `rows` rows inside, if `calls` of them make that worth it.

    Takes plain layers on a CPU in float32 or bfloat16, as far as this build of torch can pack them; all others stay as
    they are. So do all where their weights would take more than a quarter of the memory that is left. The weights must
    not change meanwhile.
    """
    chosen = [layer for layer in layers if rows * calls >= ENOUGH and can_pack(layer)]
    if chosen and SHARE * sum(matrix(layer).nbytes for layer in chosen) > spare_memory():
        chosen = []
    try:
        for layer in chosen:
            vars(layer)["packed"] = Packed.of(matrix(layer), rows)
        yield
    finally:
        for layer in chosen:
            vars(layer).pop("packed", None)


def spare_memory() -> int:
    """Return how many bytes of memory are free, as Linux and its control groups tell; elsewhere a guess of 4 GiB."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30
    group = Path("/sys/fs/cgroup")
    for limit, used in CONTROLS:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            free = min(free, int((group / limit).read_text()) - int((group / used).read_text()))
    return free


def can_pack(layer: nn.Module) -> bool:
    """Tell whether a layer is a plain linear one or 1x1 convolution whose weight can be packed here."""
    if type(layer) is nn.Conv2d:
        plain = layer.kernel_size == (1, 1) and layer.groups == 1 and layer.stride == (1, 1)
    else:
        plain = type(layer) is nn.Linear
    if not plain or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    weight = layer.weight
    if not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter) or weight.device.type != "cpu":
        return False
    if weight.dtype == torch.float32:
        return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return weight.dtype == torch.bfloat16 and known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
