"""Prepack linear weights for MKL (float32) or oneDNN (bfloat16) during a sampling loop on a CPU.

In:  linear layers, the rows of their inputs, how often each will be called.
Out: a `Multiply` that applies a layer to (...,C) -> (...,D), by its packed weight where it has one.
A product of a few hundred rows spends part of its time on reordering the weights, anew in every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

SHARE = 4  # that many times what is packed must be free
ENOUGH = 2048  # rows times calls; packing takes about as long as is gained at half of that
CONTROLS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))

Multiply = Callable[[nn.Module, Tensor], Tensor]


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer as it is."""
    result: Tensor = layer(x)
    return result


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

    def times(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """Multiply (...,C) by it; MKL takes the plain weight of the layer for another number of rows."""
        result: Tensor
        if layer.weight.dtype == torch.float32:
            result = torch.ops.mkl._mkl_linear(x, self.weight, layer.weight, layer.bias, self.rows)
        else:
            result = torch.ops.mkldnn._linear_pointwise(x, self.weight, layer.bias, "none", [], "")
        return result


def pack(layers: Iterable[nn.Module], rows: int, calls: int) -> Multiply:
    """Pack the weights of layers for `rows` rows, if `calls` of them make that worth it.

    Takes plain layers on a CPU in float32 or bfloat16, as far as this build of torch can pack them; all others stay as
    they are. So do all where their weights would take more than a quarter of the memory that is left. The weights must
    not change while the result is in use.
    """
    chosen = [cast(nn.Linear, layer) for layer in layers if rows * calls >= ENOUGH and can_pack(layer)]
    if not chosen or SHARE * sum(layer.weight.nbytes for layer in chosen) > spare_memory():
        return plain
    packed: dict[nn.Module, Packed] = {layer: Packed.of(layer.weight, rows) for layer in chosen}

    def multiply(layer: nn.Module, x: Tensor) -> Tensor:
        return packed[layer].times(x, layer) if isinstance(layer, nn.Linear) and layer in packed else layer(x)

    return multiply


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
    """Tell whether a layer is a plain linear one whose weight can be packed here."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or layer.weight.device.type != "cpu":
        return False
    if layer.weight.dtype == torch.float32:
        return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return layer.weight.dtype == torch.bfloat16 and known and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
