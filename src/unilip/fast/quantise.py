"""Weight-only quantisation of linear layers by torchao: int8, int4, fp8.

In:  a part of a model. Out: the same part; the arithmetic stays in the type of the activations.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from unilip.errors import UniLIPError, check_choice, install
from unilip.method.config import QUANTIZATIONS

SMALLEST = 32  # linear layers with a narrower side stay as they are: they weigh nothing, and decide much
QUANTIZED = ("encoder", "mllm", "connector", "dit")  # the decoder is nearly all 3x3 convolutions
INT4_ROWS = 16  # what torchao packs together; a language head of an odd vocabulary stays as it is
GROUPS = (128, 64, 32)  # columns that share a scale in int4, the largest that divides the layer


def check_quantisation(kind: str) -> None:
    """Say what is wrong with a kind of quantisation before anything is read.

    Raises:
        UniLIPError: an unknown kind, or no torchao.
    """
    check_choice("quantisation", kind, QUANTIZATIONS)
    if importlib.util.find_spec("torchao") is None:
        raise UniLIPError(f"Quantisation to {kind} needs torchao; {install('quantize')}.")


def quantise(module: nn.Module, kind: str) -> None:
    """Keep the weights of a module's linear layers in few bits.

    Embeddings, norms, convolutions and layers narrower than 32 stay as they are.

    Raises:
        UniLIPError: an unknown kind, no torchao, or a device or type for which it has no kernels.
    """
    check_quantisation(kind)
    with quiet_import():
        from torchao.quantization import quantize_
    tied = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    for wanted in GROUPS if kind == "int4" else (1,):
        chosen = {
            layer
            for layer in module.modules()
            if type(layer) is nn.Linear
            and min(layer.weight.shape) >= SMALLEST
            and not is_quantised(layer)
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


def is_quantised(module: nn.Module) -> bool:
    """Tell whether any weight of a module is kept in few bits."""
    return any(type(p) is not nn.Parameter and hasattr(p, "tensor_data_names") for p in module.parameters())


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
