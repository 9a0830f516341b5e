"""Less memory: parts that come and go, and weights of few bits.

In:  a model and the names of its parts, or one module.
Out: the same model, whose parts are on the device only while they work; or the module with its linear layers quantised
     by torchao. The pixel decoder's strips are in `decoder`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unilip.config import QUANTIZATIONS
from unilip.errors import UniLIPError

SMALLEST = 32  # linear layers with a narrower side stay as they are: they weigh nothing, and decide much
QUANTIZED = ("encoder", "mllm", "connector", "dit")  # the decoder is nearly all 3x3 convolutions
INT4_ROWS = 16  # what torchao packs together; a language head of an odd vocabulary stays as it is
GROUPS = (128, 64, 32)  # columns that share a scale in int4, the largest that divides the layer


class Offload:
    """Brings parts of a model to a device while they work.

    Their weights rest in main memory, or, with `load`, nowhere: `load(part)` then reads them each time. A part is there
    from the first `using` that names it to the end of that block, however it ends.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[str],
        device: torch.device,
        load: Callable[[str], None] | None = None,
    ) -> None:
        self.device = device
        self.present: set[str] = set()
        self._model = [model]  # in a list: a module that knew its owner would be a part of itself
        self._load = load
        self._home: dict[str, list[tuple[nn.Module, str, Tensor]]] = {}
        if load is None:
            self._home = {part: list(own_tensors(model.get_submodule(part))) for part in parts}

    @contextlib.contextmanager
    def using(self, *parts: str) -> Iterator[None]:
        """Have parts on the device within the block."""
        fresh = [part for part in parts if part not in self.present]
        try:
            for part in fresh:
                self.present.add(part)
                self._bring(part)
            yield
        finally:
            for part in fresh:
                self._drop(part)
                self.present.discard(part)

    def _bring(self, part: str) -> None:
        if self._load is not None:
            self._load(part)
            return
        moved: dict[int, Tensor] = {}  # tied weights stay tied
        for module, name, tensor in self._home[part]:
            if id(tensor) not in moved:
                there = tensor.detach().to(self.device, non_blocking=True)
                is_weight = isinstance(tensor, nn.Parameter)
                moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if is_weight else there
            place(module, name, moved[id(tensor)])

    def _drop(self, part: str) -> None:
        if self._load is None:
            for module, name, tensor in self._home[part]:
                place(module, name, tensor)  # nothing is copied back: the weights have not changed
            return
        empty(self._model[0].get_submodule(part))


def own_tensors(root: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Give every parameter and buffer under a module with the module that holds it and its name there."""
    for module in root.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a parameter or buffer in place of the one of that name."""
    if name in module._parameters:
        assert isinstance(tensor, nn.Parameter)
        module._parameters[name] = tensor
    else:
        module._buffers[name] = tensor


def empty(root: nn.Module) -> None:
    """Take the data of every parameter and buffer under a module away; shapes and types stay."""
    gone: dict[int, Tensor] = {}  # tied weights stay tied
    for module, name, tensor in own_tensors(root):
        if id(tensor) not in gone:
            shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            gone[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
        place(module, name, gone[id(tensor)])


# --- few bits -------------------------------------------------------------------------------------------------------


def quantize(module: nn.Module, kind: str) -> None:
    """Keep the weights of a module's linear layers, and of its 1x1 convolutions in blocks of the DiT, in few bits.

    The arithmetic stays in the type of the activations. Embeddings, norms, other convolutions and layers narrower than
    32 stay as they are.

    Raises:
        UniLIPError: an unknown kind, no torchao, or a device or type for which it has no kernels.
    """
    if kind not in QUANTIZATIONS:
        raise UniLIPError(f"There is no quantisation {kind!r}; allowed: {', '.join(QUANTIZATIONS)}.")
    if importlib.util.find_spec("torchao") is None:
        raise UniLIPError(f"Quantisation to {kind} needs torchao; install it with pip install 'unilip[quantize]'.")
    with quiet_import():
        from torchao.quantization import quantize_
    convolutions_to_linear(module)
    tied = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for wanted in GROUPS if kind == "int4" else (1,):
        chosen = {
            layer
            for layer in module.modules()
            if type(layer) is nn.Linear
            and min(layer.weight.shape) >= SMALLEST
            and not is_quantized(layer)
            and id(layer.weight) not in tied  # a language head that shares the embedding costs nothing as it is
            and layer.in_features % wanted == 0
            and (kind != "int4" or layer.out_features % INT4_ROWS == 0)
        }
        if chosen:
            weight = next(iter(chosen)).weight
            try:
                quantize_(module, settings(kind, weight, wanted), lambda layer, _, chosen=chosen: layer in chosen)
            except (NotImplementedError, AssertionError, ImportError, RuntimeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise UniLIPError(
                    f"torchao cannot quantise to {kind} here ({weight.dtype} on {weight.device}: {reason}); "
                    "int8 works everywhere, int4 on CUDA needs bfloat16."
                ) from error


def settings(kind: str, weight: Tensor, group: int) -> Any:
    """Return torchao's configuration for weights like this one."""
    with quiet_import():
        from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
    if kind == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if kind == "fp8":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    if weight.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group)
    return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d", set_inductor_config=False)


def is_quantized(module: nn.Module) -> bool:
    """Tell whether any weight of a module is kept in few bits."""
    return any(type(p) is not nn.Parameter and hasattr(p, "tensor_data_names") for p in module.parameters())


def convolutions_to_linear(module: nn.Module) -> None:
    """Replace the 1x1 convolutions of the DiT's blocks by linear layers of the same weights, which `dit` reads too."""
    for block in module.modules():
        for name in ("conv_inverted", "conv_point"):
            layer = getattr(block, name, None)
            if not hasattr(block, "residual_connection") or block.residual_connection or type(layer) is not nn.Conv2d:
                continue
            with torch.device("meta"):
                linear = nn.Linear(layer.in_channels, layer.out_channels, bias=layer.bias is not None)
            linear.weight = nn.Parameter(layer.weight.detach().flatten(1), layer.weight.requires_grad)
            if isinstance(layer.bias, nn.Parameter):
                linear.bias = layer.bias
            setattr(block, name, linear.train(layer.training))


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Import torchao without its remarks about kernels that do not load."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
