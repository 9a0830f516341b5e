"""Quantisation of linear layers by torchao: weights in int8, int4 or fp8; int8_dynamic, products in int8, too."""

import dataclasses
import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilip.errors import CheckpointError, UniLIPError, check_choice, install, reason
from unilip.method.config import QUANTIZATIONS

SMALL = 2**19  # weights of fewer numbers gain nothing from products in int8, nor from being packed
SMALLEST = 32  # linear layers with a narrower side stay as they are: they weigh nothing, and decide much
DYNAMIC = ("connector", "dit")  # with int8_dynamic; the others' activations have outliers, so only their weights shrink
QUANTIZED = ("encoder", "mllm", "connector", "dit")  # the decoder is nearly all 3x3 convolutions
SLICE = 2**24  # weights of more numbers are quantised some rows at a time
INT4_ROWS = 16  # what torchao packs together; a language head of an odd vocabulary stays as it is
LAYOUT = "prototype.safetensors.safetensors_utils"  # of quantised tensors in files
GROUPS = (128, 64, 32)  # columns that share a scale in int4, the largest that divides the layer


def kinds_of(given: Any) -> dict[str, str]:
    """Return each part's kind of quantisation: of one word, "part=kind,part=kind", or a mapping; "none" is none.

    With int8_dynamic as the one word the parts whose activations have outliers have int8 weights.
    Raises UniLIPError: an unknown kind or part, or no torchao.
    """
    if given is None or (isinstance(given, str) and given == "none"):
        return {}
    pairs: Any = given.items() if isinstance(given, Mapping) else None
    if isinstance(given, str) and "=" in given:
        pairs = [[side.strip() for side in pair.split("=", 1)] for pair in given.split(",") if "=" in pair]
        if len(pairs) != given.count(",") + 1:
            raise UniLIPError(f"quantization is {given!r}; give part=kind, with commas between.")
    if pairs is None:
        check_choice("quantisation", given, QUANTIZATIONS)
        pairs = [(part, "int8" if given == "int8_dynamic" and part not in DYNAMIC else given) for part in QUANTIZED]
    found = dict(pairs)
    for part, kind in found.items():
        check_choice("part to quantise", part, QUANTIZED)
        check_choice("quantisation", kind, QUANTIZATIONS)
        if importlib.util.find_spec("torchao") is None:
            raise UniLIPError(f"Quantisation to {kind} needs torchao; {install('quantize')}.")
    return found


def quantise(module: nn.Module, kind: str) -> None:
    """Keep the weights of a module's linear layers in few bits; embeddings, norms, convolutions and narrow layers stay.

    With int8_dynamic layers of under half a million weights stay, too, which it would slow down.
    Raises UniLIPError: an unknown kind, no torchao, or a device or type for which it has no kernels.
    """
    kinds_of(kind)
    tied = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for layer in list(module.modules()):
        if type(layer) is not nn.Linear or is_quantised(layer) or min(layer.weight.shape) < SMALLEST:
            continue
        weight = layer.weight
        group = next((n for n in GROUPS if layer.in_features % n == 0), 0)
        odd = kind == "int4" and (not group or layer.out_features % INT4_ROWS)
        slower = kind == "int8_dynamic" and weight.numel() < SMALL
        if odd or slower or id(weight) in tied:  # a language head that shares the embedding costs nothing as it is
            continue
        try:
            chosen = settings(kind, weight, group)
            if kind != "int4" and weight.numel() > SLICE:
                layer.weight = nn.Parameter(by_rows(weight.detach(), chosen), requires_grad=False)
            else:
                torchao("quantization").quantize_(layer, chosen)
                vars(layer).pop("extra_repr", None)  # torchao's own, which pickle cannot take
        except (NotImplementedError, AssertionError, ImportError, RuntimeError) as error:
            raise UniLIPError(
                f"torchao cannot quantise to {kind} here ({weight.dtype} on {weight.device}: {reason(error)}); int8 "
                "works everywhere, int4 on CUDA needs bfloat16."
            ) from error


def by_rows(weight: Tensor, chosen: Any) -> Tensor:
    """Quantise a large weight (D,C) some rows at a time, with their own scales, for want of room for copies of it."""
    made: list[Tensor] = []
    for rows in weight.split(max(1, SLICE // weight.shape[1])):
        piece = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
        piece.weight = nn.Parameter(rows, requires_grad=False)
        torchao("quantization").quantize_(piece, chosen)
        made.append(piece.weight)
    about = json.loads(flatten({"all.weight": made[0]})[1]["all.weight"])
    whole = {key: torch.cat([getattr(part, key) for part in made]) for key in about["_tensor_data_names"]}
    return FewBits(about, {}).tensor(whole)


def settings(kind: str, weight: Tensor, group: int = 0) -> Any:
    """Return torchao's configuration for weights like this one."""
    ao = torchao("quantization")
    plain: dict[str, Any] = {
        "int8": ao.Int8WeightOnlyConfig,
        "int8_dynamic": ao.Int8DynamicActivationInt8WeightConfig,
        "fp8": ao.Float8WeightOnlyConfig,
    }
    if kind in plain:
        return plain[kind](set_inductor_config=False)
    if weight.device.type == "cpu":
        return torchao("prototype.quantization.int4").PrototypeInt4WeightOnlyConfig(group_size=group)
    return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


def is_quantised(module: nn.Module) -> bool:
    """Tell whether any weight of a module is kept in few bits."""
    return any(type(p) is not nn.Parameter and hasattr(p, "tensor_data_names") for p in module.parameters())


@dataclass(frozen=True)
class FewBits:
    """A quantised tensor as torchao's layout stores it: what it is, and which tensors of the file hold its data."""

    about: Mapping[str, Any]
    pieces: Mapping[str, str]
    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32

    def tensor(self, pieces: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """Put it together; it computes in `dtype`, by default as it was saved."""
        given = {**self.about["_data"], **pieces}
        if dtype is not None:
            given["dtype"] = {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")}
        return torchao(LAYOUT).object_from_dict({**self.about, "_data": given})


def few_bits(metadata: Mapping[str, str], piece: Callable[[str], Tensor], where: str) -> dict[str, FewBits]:
    """Find the quantised tensors that a file's metadata, in torchao's layout, tells of; `piece` gives empty ones.

    Raises CheckpointError: they are damaged or of an unknown kind, or there is no torchao.
    """
    found: dict[str, FewBits] = {}
    name = "tensor_names"
    try:
        for name in json.loads(metadata.get("tensor_names", "[]")):
            about = json.loads(metadata[name])
            if about["_type"] == "Tensor":
                continue
            if importlib.util.find_spec("torchao") is None:
                raise CheckpointError(f"{where} holds quantised weights, which need torchao; {install('quantize')}.")
            few = FewBits(about, {key: piece_name(name, key) for key in about["_tensor_data_names"]})
            whole = few.tensor({key: piece(stored) for key, stored in few.pieces.items()})
            if not (hasattr(whole, "tensor_data_names") and whole.dtype.is_floating_point):
                raise ValueError(f"{about['_type']} is no quantised tensor")
            found[name] = dataclasses.replace(few, shape=tuple(whole.shape), dtype=whole.dtype)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RuntimeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{where} says it holds {str(name)[:120]} quantised in torchao's layout, but it does not ({error!r:.160}); "
            "save it again."
        ) from error
    return found


def flatten(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Take quantised tensors apart as torchao's layout does; returns plain tensors, and metadata if any was quantised.

    Raises UniLIPError: a kind that the layout does not know: what is packed for this very processor.
    """
    flat, about = dict[str, Tensor](), dict[str, str]()
    if not any(hasattr(tensor, "tensor_data_names") for tensor in state.values()):
        return dict(state), {}
    layout = torchao(LAYOUT)
    for name, tensor in state.items():
        if not hasattr(tensor, "tensor_data_names"):
            flat[name], about[name] = tensor, json.dumps({"_type": "Tensor"})
            continue
        if (kind := type(tensor).__name__) not in layout.ALLOWED_TENSORS_SUBCLASSES:
            raise UniLIPError(
                f"{name} is a {kind}, packed for this processor alone, and cannot be saved; save int8 or fp8, or load "
                "the plain model with this quantisation each time."
            )
        about[name] = json.dumps(tensor, cls=layout.TensorSubclassAttributeJSONEncoder)
        flat |= {piece_name(name, key): getattr(tensor, key) for key in json.loads(about[name])["_tensor_data_names"]}
    return flat, {**about, "tensor_names": json.dumps(list(state))}


def piece_name(name: str, key: str) -> str:
    """Name one tensor of the data of a quantised tensor, as torchao does."""
    module, _, weight = name.rpartition(".")
    return f"{module}._{weight}_{key}"


@functools.cache
def torchao(module: str) -> Any:
    """Import a module of torchao, without its remarks about kernels that do not load."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(f"torchao.{module}")
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
