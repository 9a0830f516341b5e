"""One word for what counts chooses how a model is run: type, few bits, packed weights, strips, parts that come and go.

Out: types and what comes and goes, by what is measured on this processor and how much memory is free.
"""

import importlib.util
import math
from collections.abc import Mapping

import torch

from unilip.fast.products import WORTH, least, name_of, shape_of
from unilip.fast.quantise import DYNAMIC, QUANTIZED, SMALL
from unilip.machine import spare_memory
from unilip.method.config import UniLIPConfig

DECIBELS = 60  # "auto" rounds no further than float32, and leaves no exact picture further than this; tested
ROOM = 2**30  # bytes that a picture needs beside the weights


def choose(
    performance: str,
    config: UniLIPConfig,
    numbers: int,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    quantization: Mapping[str, str] | None = None,
    low_memory: bool | None = None,
) -> tuple[torch.dtype, dict[str, str], bool, str]:
    """Choose for a model of so many weights; what is given besides stays as it is, and the rest is chosen around it.

    Returns the type, the kinds of few bits by part, whether parts come and go, and all that in a line.
    """
    few, small = importlib.util.find_spec("torchao") is not None, performance == "memory"
    precision, kinds, why = torch.float32, dict[str, str](), list[str]()
    if small:
        precision, kinds = torch.bfloat16, dict.fromkeys(QUANTIZED if few else (), "int8")
    elif performance == "speed":
        precision, kinds, why = fast_types(config, device, few, dtype)
    precision, kinds = dtype or precision, kinds if quantization is None else dict(quantization)
    if performance == "auto" and low_memory is None:
        needed = numbers * precision.itemsize + ROOM
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else spare_memory()
        small = needed > free
        why.append(f"needs about {needed / 2**30:.1f} of {free / 2**30:.1f} GiB that are free")
    small = small if low_memory is None else low_memory
    bits = [f"{kind} in {', '.join(p for p in kinds if kinds[p] == kind)}" for kind in dict.fromkeys(kinds.values())]
    said = f"performance {performance}: {', '.join([name_of(precision), *bits])}, "
    said += "one part in memory at a time, decoded in strips" if small else "all parts in memory"
    said += f" ({'; '.join(why)})" if why else ""
    return precision, kinds, small, said


def fast_types(
    config: UniLIPConfig, device: torch.device, few: bool, dtype: torch.dtype | None
) -> tuple[torch.dtype, dict[str, str], list[str]]:
    """Return the type and the kinds of few bits by part in which products are fastest, and how fast they are."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, {}, ["this GPU multiplies in it"]
    if device.type != "cpu":
        return torch.float32, {}, []
    shape = shape_of(config)
    exact, half, eight = (least(kind, shape) for kind in ("float32", "bfloat16", "int8" if few else "none"))
    named = (("bfloat16", half), ("int8", eight))
    why = [f"here products in {kind} take {ms / exact:.2f} of float32's time" for kind, ms in named if ms < math.inf]
    chosen = dtype or (torch.bfloat16 if half < WORTH * exact else torch.float32)
    slow = eight >= WORTH * (half if chosen == torch.bfloat16 else exact)
    return chosen, {} if slow or config.dit.hidden_size**2 < SMALL else dict.fromkeys(DYNAMIC, "int8_dynamic"), why
