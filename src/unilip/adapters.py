"""LoRA and DoRA adapters in peft's format: loaded beside the weights, weighed, stacked, merged into them, taken off.

In:  a model, and folders with adapter_config.json and adapter_model.safetensors. Out: the same model, whose linear
layers add the adapters' updates. `UniLIP.load_adapter` and its neighbours call these functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unilip.errors import CheckpointError, UniLIPError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files
KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")  # of weights that an adapter has


def library() -> Any:
    """Import peft, or say how to get it."""
    try:
        import peft
    except ImportError as error:
        raise UniLIPError(f"Adapters need the package peft ({error}); install it with pip install peft.") from error
    return peft


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers that adapters have been put into."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters that are loaded."""
    return sorted({name for _, layer in adapted_layers(model) for name in layer.lora_A})


def read_adapter(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the settings and tensors of an adapter's folder; names are those of the model's layers.

    Raises:
        CheckpointError: it is no folder of a LoRA adapter, or damaged.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path} is no adapter; give a folder with {CONFIG} and {WEIGHTS}, as peft writes it.")
    try:
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(path / WEIGHTS)
        kind = settings["peft_type"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); copy or train the adapter again.") from error
    if kind != "LORA":
        raise CheckpointError(f"{path} is an adapter of the kind {kind}; LORA (and DoRA) can be loaded.")
    return settings, {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None, scale: float = 1.0) -> str:
    """Put an adapter beside the weights, active with those that are loaded already; returns its name.

    Args:
        name: what to call it; the folder's own name by default ("final" is called after the folder above).
        scale: how strongly it acts: 0 not at all, 1 as trained.

    Raises:
        CheckpointError: it is damaged, or does not fit the model.
        UniLIPError: peft is missing, or the name is taken.
    """
    peft = library()
    settings, tensors = read_adapter(folder)
    path = Path(folder).resolve()
    name = (name or (path.parent.name if path.name == "final" else path.name)).replace(".", "_")
    others = adapter_names(model)
    if name in others:
        raise UniLIPError(f"An adapter {name} is loaded already; give another name, or unload first.")
    wanted = {module for module in settings.get("target_modules") or ()}
    shapes = {module: m.weight.shape for module, m in model.named_modules() if isinstance(m, nn.Linear)}
    for layer_name, layer in adapted_layers(model):
        shapes[layer_name] = layer.base_layer.weight.shape
    strange = sorted(key for key, tensor in tensors.items() if not _fits(shapes.get(_layer_of(key)), key, tensor))
    if strange or not tensors:
        raise CheckpointError(
            f"{folder} does not fit the model: {', '.join(strange[:3]) or 'it is empty'}. It was made for "
            f"{settings.get('base_model_name_or_path') or 'another model'} and {len(wanted)} of its layers."
        )
    config = peft.LoraConfig(
        r=settings["r"], lora_alpha=settings["lora_alpha"], use_dora=bool(settings.get("use_dora")),
        use_rslora=bool(settings.get("use_rslora")), target_modules=sorted({_layer_of(key) for key in tensors}),
        rank_pattern=settings.get("rank_pattern") or {}, alpha_pattern=settings.get("alpha_pattern") or {},
        lora_dropout=0.0, inference_mode=True, base_model_name_or_path=settings.get("base_model_name_or_path"),
    )  # fmt: skip
    scales = {other: adapter_scale(model, other) for other in others}
    put_in(model, config, name)
    own = {key: value for key, value in model.state_dict().items() if f".{name}." in key and _kind(key)}
    given = {_stored(key, name): tensor for key, tensor in tensors.items()}
    if own.keys() != given.keys():
        unload_adapters(model, [name])
        missing = sorted(own.keys() ^ given.keys())
        raise CheckpointError(f"{folder} is not whole: {', '.join(missing[:3])} is missing or too much.")
    for key, tensor in own.items():
        tensor.copy_(given[key])
    set_adapters(model, scales | {name: scale})
    return name


def put_in(model: nn.Module, config: Any, name: str) -> None:
    """Give the layers that a peft config names an adapter of this name; the model's training flags stay."""
    flags = {id(p): p.requires_grad for p in model.parameters()}
    training = model.training
    library().inject_adapter_in_model(config, model, adapter_name=name)
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(id(parameter), False))
    model.train(training)


def set_adapters(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Make exactly these adapters act, each as strongly as said; several add up.

    Raises:
        UniLIPError: one of them is not loaded.
    """
    unknown = sorted(set(scales) - set(adapter_names(model)))
    if unknown:
        loaded = ", ".join(adapter_names(model)) or "none"
        raise UniLIPError(f"There is no adapter {', '.join(unknown)}; loaded: {loaded}.")
    flags = {id(p): p.requires_grad for p in model.parameters()}
    for _, layer in adapted_layers(model):
        active = [name for name in scales if name in layer.lora_A]
        layer.set_adapter(active)
        for name in active:
            layer.set_scale(name, scales[name])
    for parameter in model.parameters():  # making it act is not training it
        parameter.requires_grad_(flags[id(parameter)])


def adapter_scale(model: nn.Module, name: str) -> float:
    """Return how strongly an adapter acts: 0 where it is switched off."""
    for _, layer in adapted_layers(model):
        if name in layer.lora_A:
            unit = layer.lora_alpha[name] / (layer.r[name] ** 0.5 if layer.use_rslora.get(name) else layer.r[name])
            return float(layer.scaling[name] / unit) if name in layer.active_adapters else 0.0
    raise UniLIPError(f"There is no adapter {name}; loaded: {', '.join(adapter_names(model)) or 'none'}.")


def merge_adapters(model: nn.Module) -> None:
    """Add the active adapters to the weights, as strongly as they act, and take all of them off.

    Afterwards the model is an ordinary one: it can be saved, and runs as fast as before.
    """
    for name, layer in list(adapted_layers(model)):
        layer.merge(safe_merge=True)
        _replace(model, name, layer.base_layer)
    _forget(model)


def unload_adapters(model: nn.Module, names: list[str] | None = None) -> None:
    """Take adapters off, all by default; the weights are as if they had never been there."""
    gone = adapter_names(model) if names is None else names
    for name, layer in list(adapted_layers(model)):
        for adapter in gone:
            if adapter in layer.lora_A:
                layer.delete_adapter(adapter)
        if not layer.lora_A:
            _replace(model, name, layer.base_layer)
    if not adapter_names(model):
        _forget(model)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _forget(model: nn.Module) -> None:
    """Drop what peft notes on a model with adapters."""
    if hasattr(model, "peft_config"):
        del model.peft_config


def _kind(key: str) -> str | None:
    return next((kind for kind in KINDS if f".{kind}." in key or key.endswith(f".{kind}")), None)


def _layer_of(key: str) -> str:
    """The layer of a stored name: 'dit.x.to_q.lora_A.weight' -> 'dit.x.to_q'."""
    kind = _kind(key)
    return key.split(f".{kind}")[0] if kind else key


def _stored(key: str, name: str) -> str:
    """A stored name as it is in the model: '...lora_A.weight' -> '...lora_A.NAME.weight'."""
    kind = _kind(key)
    return f"{_layer_of(key)}.{kind}.{name}.weight"


def _fits(shape: Any, key: str, tensor: Tensor) -> bool:
    """Whether a tensor can belong to a linear layer of the shape (out, in)."""
    if shape is None:
        return False
    out, width = shape
    wanted = {"lora_A": (..., width), "lora_B": (out, ...), "lora_magnitude_vector": (out,)}.get(_kind(key) or "")
    if wanted is None or len(wanted) != tensor.dim():
        return False
    return all(w is ... or w == size for w, size in zip(wanted, tensor.shape, strict=True))
