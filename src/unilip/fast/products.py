"""Products of linear layers, each in the way that was measured to be the fastest on this processor.

Out: a `Multiply` that applies a layer to (...,C) -> (...,D), by a packed copy of its weight where that pays; and the
processor time of a product in each way, measured at first use and kept on disk.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from unilip.fast.quantise import SMALL, settings, torchao
from unilip.files import write_json
from unilip.machine import processor, spare_memory
from unilip.method.config import UniLIPConfig

SHARE = 4  # that many times what is packed must be free
WORTH = 0.95  # another way takes at most this share of the time
ROWS, OUTPUTS, ROUNDS = 256, 2048, 4  # the most that is measured of a shape, and how often; the least time counts
WAYS = ("float32", "float32 MKL", "float32 oneDNN", "bfloat16", "bfloat16 oneDNN", "float16", "int8")
CLOCK = time.perf_counter if os.name == "nt" else time.process_time  # what else runs here counts less in the latter
REFUSALS = (RuntimeError, NotImplementedError, AttributeError, ImportError, AssertionError)  # "not here"

Multiply = Callable[[nn.Module, Tensor], Tensor]
Shape = tuple[int, int, int]  # rows, inputs, outputs
Times = dict[str, float]  # milliseconds of processor time by way; "WAY packing", of packing a weight


def plain(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a layer as it is."""
    return layer(x)


@dataclass(frozen=True)
class Packed:
    """A weight (D,C) in the order of a library, for inputs of `rows` rows; `stamp` tells what that weight held."""

    library: str
    weight: Tensor
    rows: int
    stamp: tuple[Any, ...]

    @classmethod
    def of(cls, layer: nn.Linear, library: str, rows: int) -> Packed:
        """Pack the weight of a layer, in as much memory again."""
        mkl = library == "MKL"
        pack = torch.ops.mkl._mkl_reorder_linear_weight if mkl else torch.ops.mkldnn._reorder_linear_weight
        return cls(library, pack(layer.weight.detach().contiguous(), rows), rows, stamp(layer.weight))

    def times(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """Multiply (...,C) by it; MKL takes the plain weight of the layer for another number of rows."""
        if self.library == "MKL":
            return torch.ops.mkl._mkl_linear(x, self.weight, layer.weight, layer.bias, self.rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, layer.bias, "none", [], "")


def stamp(weight: Tensor) -> tuple[Any, ...]:
    """Return what changes when a weight (D,C) does: of rows and columns the sums of its bits, as whole numbers."""
    bits = weight.detach().contiguous()
    words = bits.view(torch.int64 if bits.nbytes // len(bits) % 8 == 0 else torch.int16)
    return weight.dtype, weight.shape, *(words.sum(side).numpy().tobytes() for side in (0, 1))


class Products:
    """The packed weights of one model: made when first used, kept for all its pictures, made anew where they change."""

    def __init__(self) -> None:
        self._packed: dict[nn.Module, Packed] = {}

    def multiply(self, layers: Iterable[nn.Module], rows: int, calls: int) -> Multiply:
        """Return how to apply layers to `rows` rows, `calls` times each, in the least time, packing included.

        Takes plain layers on a CPU, and packs none where that would take over a quarter of the memory that is left. The
        choice depends on what was measured and on these numbers alone.
        """
        wanted = {cast(nn.Linear, x): library for x in layers if (library := library_of(x, rows, calls))}
        for layer, library in wanted.items():
            old = self._packed.get(layer)
            same = old and old.library == library and (old.rows == rows or library != "MKL")
            if old and not (same and old.stamp == stamp(layer.weight)):
                del self._packed[layer]
        missing = [layer for layer in wanted if layer not in self._packed]
        if SHARE * sum(layer.weight.nbytes for layer in missing) > spare_memory():
            return plain
        self._packed |= {layer: Packed.of(layer, wanted[layer], rows) for layer in missing}
        packed = {layer: self._packed[layer] for layer in wanted}

        def multiply(layer: nn.Module, x: Tensor) -> Tensor:
            return packed[layer].times(x, layer) if isinstance(layer, nn.Linear) and layer in packed else layer(x)

        return multiply if packed else plain

    def forget(self) -> None:
        self._packed.clear()


def library_of(layer: nn.Module, rows: int, calls: int) -> str:
    """Return the library that a layer's weight is to be packed for; "" for none, as for all but plain linear layers."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or layer.weight.device.type != "cpu":
        return ""
    outputs, inputs = layer.weight.shape
    return fastest(name_of(layer.weight.dtype), (rows, inputs, outputs), calls)


def fastest(kind: str, shape: Shape, calls: int) -> str:
    """Return the library for which packing pays within so many calls, or "" where the plain product is as good."""
    rows, inputs, outputs = shape
    if inputs * outputs < SMALL:
        return ""
    found = product_times(shape, tuple(way for way in WAYS if way.startswith(kind)))
    packed = {way: found[way] for way in WAYS if way.startswith(f"{kind} ") and way in found}
    if not packed or kind not in found:
        return ""
    way = min(packed, key=packed.__getitem__)
    gained = (found[kind] - found[way]) * rows / measured_shape(shape)[0] * calls
    return way.split()[1] if found[way] < WORTH * found[kind] and gained > found.get(f"{way} packing", math.inf) else ""


def shape_of(config: UniLIPConfig) -> Shape:
    """Return the product that a model does most: of the tokens of one guided picture, in its transformer."""
    width = config.dit.hidden_size
    return 2 * config.grid**2, width, 2 * int(config.dit.mlp_ratio * width)


def least(kind: str, shape: Shape) -> float:
    """Return the least time of a kind (float32, bfloat16, float16, int8) on a shape; infinite where there is none."""
    small = shape[1] * shape[2] < SMALL
    ways = tuple(way for way in WAYS if way.split()[0] == kind and not (small and " " in way))
    found = product_times(shape, ways) if ways else {}
    return min((ms for way, ms in found.items() if way in ways), default=math.inf)


def computes(dtype: torch.dtype, device: torch.device | str, shape: Shape) -> bool:
    """Whether a device multiplies faster in DTYPE than in float32; measured on a CPU."""
    if torch.device(device).type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return True
    return least(name_of(dtype), shape) < WORTH * least("float32", shape)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def measured_shape(shape: Shape) -> Shape:
    """Return the shape whose times stand for one: at most 256 rows, a power of two, and at most 2048 outputs."""
    rows, inputs, outputs = shape
    return min(ROWS, 1 << max(0, rows - 1).bit_length()), inputs, min(OUTPUTS, outputs)


_lock = threading.RLock()


def product_times(shape: Shape, ways: tuple[str, ...] | None = None, anew: bool = False) -> Times:
    """Return what a product takes in each way: of this process, from disk (by processor and torch), or measured now."""
    few, where = measured_shape(shape), f"{processor()} | torch {torch.__version__} | {torch.get_num_threads()} threads"
    with _lock:
        known = _known(where).setdefault("x".join(map(str, few)), {})
        if wanted := [way for way in ways or WAYS if anew or way not in known]:
            known |= measure(few, wanted)
            with contextlib.suppress(OSError, RuntimeError):  # no home, or none to write in
                stored = _stored()
                write_json(place(), stored | {where: stored.get(where, {}) | _known(where)})
        return dict(known)


def place() -> Path:
    """The file of times, in the folder of caches (`UNILIP_CACHE`, or ~/.cache/unilip)."""
    return Path(os.environ.get("UNILIP_CACHE") or Path.home() / ".cache" / "unilip").expanduser() / "products.json"


@functools.cache
def _known(where: str) -> dict[str, Times]:
    """The times of this process, to begin with those on disk."""
    return {name: dict(times) for name, times in _stored().get(where, {}).items()}


def _stored() -> dict[str, dict[str, Times]]:
    """What the file holds; nothing where there is none, or one that is damaged."""
    try:
        found = json.loads(place().read_text("utf-8"))
        numbers = [ms for shapes in found.values() for times in shapes.values() for ms in times.values()]
        good = all(type(ms) is float and 0 < ms < math.inf for ms in numbers)
    except (OSError, RuntimeError, ValueError, AttributeError, RecursionError):
        return {}
    return cast("dict[str, dict[str, Times]]", found) if good else {}


@torch.no_grad()
def measure(shape: Shape, ways: Iterable[str]) -> Times:
    """Measure products of a shape, milliseconds of processor time; the ways take turns. What fails is left out."""
    calls: dict[str, Callable[[], Tensor]] = {}
    found: Times = {}
    for way in ways:
        with contextlib.suppress(*REFUSALS):
            call, packing = prepared(way, shape)
            call()
            calls[way] = call
            found |= {} if packing is None else {f"{way} packing": packing}
    for _ in range(ROUNDS):
        for way, call in calls.items():
            found[way] = min(found.get(way, math.inf), timed(call)[0])
    return found


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return milliseconds of processor time, above zero, and the result of a call."""
    start = CLOCK()
    result = call()
    return max(1e3 * (CLOCK() - start), 1e-6), result


def prepared(way: str, shape: Shape) -> tuple[Callable[[], Tensor], float | None]:
    """Return a product to be done, and what packing its weight took, if it is packed."""
    rows, inputs, outputs = shape
    kind, _, library = way.partition(" ")
    dtype = torch.float32 if kind == "int8" else getattr(torch, kind)
    x = torch.linspace(-1, 1, rows * inputs).view(rows, inputs).to(dtype)
    layer = nn.Linear(inputs, outputs, device="meta")
    layer.weight = nn.Parameter(torch.linspace(-1, 1, outputs * inputs).view(outputs, inputs).to(dtype))
    layer.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype))
    if kind == "int8":
        torchao("quantization").quantize_(layer, settings("int8_dynamic", layer.weight))
    if not library:
        return lambda: plain(layer, x), None
    if library == "oneDNN" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise NotImplementedError(way)
    packing, packed = timed(lambda: Packed.of(layer, library, rows))
    return lambda: packed.times(x, layer), packing


def shapes_of(config: UniLIPConfig) -> dict[str, Shape]:
    """Return the products of a model's transformer, by name."""
    rows, width, wide = shape_of(config)
    return {"attention": (rows, width, width), "widening": (rows, width, wide), "narrowing": (rows, wide // 2, width)}
