"""LoRA and DoRA adapters in peft's format: loaded beside the weights, weighed, stacked, merged into them, taken off.

In:  a model, and folders with adapter_config.json and adapter_model.safetensors. Out: the same model, whose linear
layers add the adapters' updates; where parts are read from the checkpoint each time, the updates are added to their
weights then. Everything is checked before anything changes, and what fails in spite of that is undone.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from unilip.checkpoints.hub import ADAPTER, REMEDY, local, read_json
from unilip.errors import LARGEST, CheckpointError, UniLIPError, check_number, install
from unilip.fast.offload import HEAD, Offload
from unilip.fewstep import add_embedder, few_config
from unilip.files import content_hash
from unilip.sampling import changes, check_path

CONFIG, WEIGHTS = ADAPTER, "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files
KINDS = ("lora_A", "lora_B", "lora_magnitude_vector")  # of weights that an adapter has
MAPPING, TRAINED_ON = "auto_mapping", "trained_on"  # what peft lets say of the base; in it, values of its weights
LAYERS, VALUES = 4, 64  # of each part, of each layer: so many tell a model from another
FOREIGN = ("fan_in_fan_out", "layer_replication", "use_qalora", "lora_bias", "use_bdlora", "alora_invocation_tokens")
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")  # starts that peft takes off the weights of the base
FEW_STEPS = "few_steps"  # in the settings: what peft does not know, it says and leaves alone
logger = logging.getLogger(__name__)
INNER = "adapter_"  # peft makes attributes of names, so that "train" or "half" would hide what a module has already


def library() -> Any:
    """Import peft, or say how to get it."""
    try:
        import peft
    except ImportError as error:
        raise UniLIPError(f"Adapters need the package peft ({error}); {install('train')}.") from error
    return peft


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the layers that adapters have been put into."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters that are loaded."""
    beside = {name.removeprefix(INNER) for _, layer in adapted_layers(model) for name in layer.lora_A}
    return sorted(beside | {*_read_in(model)})


def offload_of(model: Any) -> Offload | None:
    """Return how a model's parts, or those of the model that this is a part of, come and go, if they do."""
    return getattr(getattr(model, "runtime", None), "offload", None)


def _read_in(model: nn.Module) -> dict[str, tuple[Adapter, float]]:
    """Return the adapters, with strengths, of a model whose weights take them in as they are read."""
    return getattr(offload_of(model), "adapters", {})


@torch.no_grad()
def take_in(model: nn.Module, name: str, layer: Any) -> None:
    """Add the adapters that act to the weight of a linear layer that has just been read."""
    if acting := [(one, scale) for one, scale in _read_in(model).values() if scale and name in one.tensors]:
        whole = plain = layer.weight.float()
        for one, scale in acting:
            whole = one.added(name, whole, plain, scale)
        layer.weight = nn.Parameter(whole.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


@dataclass(frozen=True)
class Adapter:
    """What an adapter's folder holds, checked; tensors by layer and kind (`KINDS`), the other mappings by layer."""

    path: Path
    base: str  # what it was trained on, as it says itself
    dora: bool  # whether it also has lengths of the weights' columns
    rslora: bool  # whether alpha is divided by sqrt(rank)
    tensors: Mapping[str, Mapping[str, Tensor]]
    rank: Mapping[str, int]
    alpha: Mapping[str, float]
    few_steps: tuple[int, ...]  # the numbers of jumps that it teaches its base (`unilip.fewstep`), mostly none
    trained_on: Mapping[str, str]  # values of its base's weights (`sampled`), if it tells

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(sorted({layer.partition(".")[0] for layer in self.tensors}))

    def fits(self, layer: str, shape: Sequence[int] | None) -> bool:
        """Whether what it has for a layer belongs to a weight of this shape (out, in)."""
        (out, width), rank = shape or (0, 0), self.rank[layer]
        wanted = {"lora_A": (rank, width), "lora_B": (out, rank), "lora_magnitude_vector": (out,)}
        return all(tuple(tensor.shape) == wanted[kind] for kind, tensor in self.tensors[layer].items())

    def added(self, layer: str, weight: Tensor, plain: Tensor, scale: float) -> Tensor:
        """Return a layer's WEIGHT (out,in) and this adapter, SCALE times as strong; PLAIN is the weight without any."""
        kinds = {kind: tensor.to(weight) for kind, tensor in self.tensors[layer].items()}
        rank = self.rank[layer] ** 0.5 if self.rslora else self.rank[layer]
        delta = scale * self.alpha[layer] / rank * (kinds["lora_B"] @ kinds["lora_A"])
        if not self.dora:
            return weight + delta
        return kinds["lora_magnitude_vector"][:, None] / (plain + delta).norm(dim=1, keepdim=True) * (weight + delta)


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter's folder. Raises CheckpointError: none of LoRA, damaged, or its settings and tensors disagree."""
    path = local(check_path("folder", folder))
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise CheckpointError(f"{path} is no adapter; give a folder with {CONFIG} and {WEIGHTS}, as peft writes it.")
    settings = read_json(path / CONFIG, REMEDY)
    try:
        stored = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged ({error}){REMEDY}.") from error
    if (kind := settings.get("peft_type")) != "LORA":
        raise CheckpointError(f"{path} is an adapter of the kind {kind}; LORA (and DoRA) can be loaded.")
    odd = [key for key in FOREIGN if settings.get(key)]
    if str(settings.get("init_lora_weights")).startswith(CHANGING):
        odd.append(f"init_lora_weights {settings['init_lora_weights']!r}, which changes the weights of its base")
    if odd:
        raise CheckpointError(f"{path / CONFIG} uses {', '.join(odd)}, which is not supported; train it without.")
    tensors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in stored.items():
        layer, _, what = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if what not in KINDS or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{path / WEIGHTS} holds {key}, which is no finite weight of a LoRA adapter.")
        tensors[layer][what] = tensor
    if not tensors:
        raise CheckpointError(f"{path / WEIGHTS} is empty{REMEDY}.")
    steps = settings.get(FEW_STEPS) or []
    if not isinstance(steps, list) or not all(type(n) is int and 1 <= n <= 1000 for n in steps):
        raise CheckpointError(f"{path / CONFIG} has {FEW_STEPS} {steps!r}; they are numbers between 1 and 1000.")
    about = settings.get(MAPPING)
    try:
        told = about.get(TRAINED_ON, {}) if isinstance(about, dict) else {}
        trained_on = {layer: text for layer, text in told.items() if len(unpacked(text)) and layer in tensors}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path / CONFIG} is damaged ({MAPPING}.{TRAINED_ON}: {error}){REMEDY}.") from error
    dora = bool(settings.get("use_dora"))
    for layer, found in tensors.items():
        if found.keys() != set(KINDS if dora else KINDS[:2]):
            raise CheckpointError(
                f"{path} is not whole: {layer} has {', '.join(sorted(found))}, {'with' if dora else 'without'} DoRA."
            )
    rank = {layer: _setting(path, settings, "r", "rank_pattern", layer) for layer in tensors}
    alpha = {layer: _setting(path, settings, "lora_alpha", "alpha_pattern", layer) for layer in tensors}
    for key in (key for name in ("rank_pattern", "alpha_pattern") for key in settings.get(name) or ()):
        if not any(_ends(layer, key) for layer in tensors):
            raise CheckpointError(f"{path / CONFIG} has a pattern {key!r} that is the end of no layer's name.")
    for layer, found in tensors.items():
        if not found["lora_A"].shape[:1] == found["lora_B"].shape[1:] == (rank[layer],):
            raise CheckpointError(f"{path / CONFIG} says rank {rank[layer]:g} of {layer}, whose tensors have another.")
    base = str(settings.get("base_model_name_or_path") or "another model").removeprefix("all=")
    return Adapter(path, base, dora, bool(settings.get("use_rslora")), tensors, rank, alpha, tuple(steps), trained_on)


def _setting(path: Path, settings: Mapping[str, Any], name: str, pattern: str, layer: str) -> Any:
    """A positive number of a layer: that of the first pattern that ends its name, or that of all."""
    special = settings.get(pattern) or {}
    value: Any = special
    if isinstance(special, dict):  # peft allows regular expressions here; none of a file's are ever run
        value = next((special[key] for key in special if _ends(layer, key)), settings.get(name))
    if type(value) not in ((int,) if name == "r" else (int, float)) or not 0 < value < 1e6:
        raise CheckpointError(f"{path / CONFIG} has {name} {value!r} for {layer}; it must be a number greater than 0.")
    return value


def _ends(layer: str, pattern: str) -> bool:
    return f".{layer}".endswith(f".{pattern}") or f"^{layer}" == pattern


def called(folder: str | os.PathLike[str]) -> str:
    """Return what an adapter is called by its folder."""
    path = Path(folder).resolve()
    return path.parent.name if path.name == "final" else path.name


def _lacks_embedder(model: nn.Module, adapter: Adapter) -> bool:
    """Whether an adapter changes the second timestep embedder, and the model has none yet: it is lent one."""
    dit: Any = getattr(model, "dit", None)
    return bool(adapter.few_steps) and dit is not None and dit.transformer.time_embed_2 is None


def sampled(layers: Iterable[str], weight: Callable[[str], Tensor]) -> dict[str, str]:
    """Return some values of some of the weights that `weight` gives by layer: what a base is known by again."""
    found = {}
    names = sorted(n for n in layers if n != HEAD and ".time_embed_2." not in n)  # both are often lent or shared
    for part in sorted({name.partition(".")[0] for name in names}):
        own = [name for name in names if name.startswith(f"{part}.")]
        for name in own[:: -(-len(own) // LAYERS)]:
            tensor = weight(name).detach()
            if hasattr(tensor, "tensor_data_names"):  # in few bits: not all kinds tell their values
                eye = torch.eye(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
                tensor = nn.functional.linear(eye, tensor).mT.contiguous()
            some = tensor.flatten()[:: max(1, tensor.numel() // VALUES) | 1][:VALUES].to("cpu", torch.bfloat16)
            found[name] = base64.b64encode(some.contiguous().view(torch.uint8).numpy().tobytes()).decode()
    return found


def unpacked(text: str) -> Tensor:
    """Return the values (M,) of a layer of `sampled`."""
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.bfloat16).float()


def check_base(model: Any, adapter: Adapter, weight: Callable[[str], Tensor]) -> None:
    """Compare a model's weights, as far as their types tell, with those that an adapter was trained on.

    The log says where they have changed, or that the adapter does not tell. Raises CheckpointError: of another model.
    """
    if not adapter.trained_on:
        logger.info("%s does not tell the weights that it was trained on; it names %s", adapter.path, adapter.base)
        return
    weights = {layer: weight(layer) for layer in adapter.trained_on}
    now = sampled(weights, weights.__getitem__)
    then = torch.cat([unpacked(adapter.trained_on[name]) for name in now])
    here = torch.cat([unpacked(text) for text in now.values()])
    apart = float((here - then).norm() / then.norm().clamp_min(1e-12))
    rounded = any(hasattr(tensor, "tensor_data_names") for tensor in weights.values())  # kept in few bits
    if bool(((here - then).abs() <= then.abs() / 128 + 1e-6).all()) or (rounded and apart < 0.3):
        return
    old, new = (content_hash(dict(one))[:8] for one in (adapter.trained_on, now))
    both = f"{adapter.path} was trained on {adapter.base} (weights {old}), and this is {model.config.name} ({new})"
    if torch.cosine_similarity(here, then, 0) < 0.2:
        raise CheckpointError(
            f"{both}, another model of the same shapes. Load it beside the one it was trained on, or train one here."
        )
    logger.warning("%s, whose weights have changed by %.0f %%: it may do less than there", both, 100 * apart)


def fitting(model: Any, adapter: Adapter, stored: Callable[[str], Tensor] | None = None) -> Adapter:
    """Check an adapter beside a model, whose weights need not be there yet where STORED reads tensors by name.

    Raises CheckpointError: it does not fit the model, or belongs to another one.
    """
    shapes = {layer: m.weight.shape for layer, m in model.named_modules() if isinstance(m, nn.Linear)}
    shapes |= {layer: m.base_layer.weight.shape for layer, m in adapted_layers(model)}
    if _lacks_embedder(model, adapter):
        shapes |= {layer.replace(".time_embed.", ".time_embed_2."): shape for layer, shape in shapes.items()}
    if strange := [layer for layer in adapter.tensors if not adapter.fits(layer, shapes.get(layer))]:
        raise CheckpointError(
            f"{adapter.path} does not fit the model: {', '.join(strange[:3])}. It was made for {adapter.base} and "
            f"{len(adapter.tensors)} of its layers."
        )
    loader = getattr(offload_of(model), "loader", None)
    read = stored if loader is None else loader.checkpoint.tensor

    def weight(layer: str) -> Tensor:
        if read is not None:
            return read(f"{layer}.weight")
        found: Any = model.get_submodule(layer)
        return getattr(found, "base_layer", found).weight

    check_base(model, adapter, weight)
    return adapter


@changes
def load_adapter(
    model: Any, folder: str | os.PathLike[str] | Adapter, name: str | None = None, scale: float = 1.0
) -> str:
    """Put a LoRA or DoRA adapter (a folder in peft's format, or one that `fitting` passed) beside the weights.

    It acts at once, `scale` times as strongly as trained, together with those loaded before; with low_memory, whenever
    weights are read. Returns its name: by default that of the folder, or of the one above if it is called "final".
    Raises UniLIPError: it is damaged, does not fit the model, or cannot be added to weights that are read each time;
    the name is taken, or peft is missing.
    """
    if not (name is None or isinstance(name, str)):
        raise UniLIPError(f"name is {name!r}; give a text.")
    path = folder.path if isinstance(folder, Adapter) else check_path("folder", folder)
    name, others = (name or called(path)).replace(".", "_"), adapter_names(model)
    if name in others:
        raise UniLIPError(f"An adapter {name} is loaded already; give another name, or unload first.")
    scales = {other: adapter_scale(model, other) for other in others}
    check_number(f"The scale of adapter {name}", scale, -LARGEST)
    offload = offload_of(model)
    if offload is not None and offload.loader is None:
        raise UniLIPError("The weights of this model rest elsewhere; load adapters first, then enable_cpu_offload.")
    adapter = folder if isinstance(folder, Adapter) else fitting(model, read_adapter(folder))
    if offload is not None:
        tied = HEAD in adapter.tensors and model.config.text.tie_embeddings
        if tied or offload.loader.checkpoint.quantized or _lacks_embedder(model, adapter):
            why = "has quantised weights" if offload.loader.checkpoint.quantized else f"has no place for {path}"
            raise UniLIPError(
                f"This model reads its weights each time and {why}; merge the adapter into the plain model first, with "
                "`unilip convert`, or load it without low_memory."
            )
        offload.adapters[name] = (adapter, scale)
        set_adapters(model, scales | {name: scale})
        return name
    peft = library()
    rank, alpha = next(iter(adapter.rank.values())), next(iter(adapter.alpha.values()))
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_dora=adapter.dora, use_rslora=adapter.rslora, target_modules=[*adapter.tensors],
        rank_pattern={re.escape(layer): value for layer, value in adapter.rank.items() if value != rank},
        alpha_pattern={re.escape(layer): value for layer, value in adapter.alpha.items() if value != alpha},
        lora_dropout=0.0, inference_mode=True, base_model_name_or_path=adapter.base,
    )  # fmt: skip
    try:
        if _lacks_embedder(model, adapter):
            add_embedder(model.dit)
            model.dit.plain_config = model.config
        put_in(model, config, INNER + name)
        model.peft_config[INNER + name].few_steps = adapter.few_steps
        layers = dict(adapted_layers(model))
        for layer, tensors in adapter.tensors.items():
            for kind, tensor in tensors.items():
                getattr(layers[layer], kind)[INNER + name].weight.detach().copy_(tensor)
        set_adapters(model, scales | {name: scale})
    except BaseException as error:
        unload_adapters(model, [one for one in adapter_names(model) if one == name])
        set_adapters(model, scales)
        if isinstance(error, (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError, ImportError)):
            raise UniLIPError(f"{path} could not be put into the model ({error}).") from error
        raise
    return name


@contextlib.contextmanager
def _same_flags(model: nn.Module) -> Iterator[None]:
    """Let parameters be trained after the block as before it, and new ones not: making one act is not training it."""
    flags = {id(p): p.requires_grad for p in model.parameters()}
    yield
    for parameter in model.parameters():
        parameter.requires_grad_(flags.get(id(parameter), False))


@changes
def put_in(model: nn.Module, config: Any, name: str) -> None:
    """Give the layers that a peft config names an adapter of this name; the model's training flags stay."""
    training = model.training
    with _same_flags(model):
        library().inject_adapter_in_model(config, model, adapter_name=name)
    model.train(training)


def _known(model: nn.Module, names: Iterable[str]) -> None:
    """Raise UniLIPError where an adapter is not loaded."""
    loaded = adapter_names(model)
    if unknown := [str(name) for name in names if name not in loaded]:
        raise UniLIPError(f"There is no adapter {', '.join(unknown)}; loaded: {', '.join(loaded) or 'none'}.")


@changes
def set_adapters(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Make exactly these loaded adapters act, each as strongly as said; an empty mapping switches all off.

    Raises UniLIPError: one of them is not loaded, or its strength is no number.
    """
    if not isinstance(scales, Mapping):
        raise UniLIPError(f"scales is {scales!r}; give a mapping from names of adapters to numbers.")
    _known(model, scales)
    for name, scale in scales.items():
        check_number(f"The scale of adapter {name}", scale, -LARGEST)
    taken = _read_in(model)
    for name in [*(name for name in scales if name in taken), *(name for name in taken if name not in scales)]:
        taken[name] = (taken.pop(name)[0], scales.get(name, 0.0))  # in the order in which they are to act
    with _same_flags(model):
        for _, layer in adapted_layers(model):
            # at strength 0 it is off, for a DoRA that acts so still has the lengths of the weights' columns changed
            active = {inner: scale for name, scale in scales.items() if scale for inner in _held(layer, name)}
            layer.set_adapter(list(active))
            for inner, scale in active.items():
                layer.set_scale(inner, scale)
    _tell_few_steps(model, [name for name in scales if scales[name]])


def _held(layer: Any, name: str) -> list[str]:
    """Return what peft calls an adapter in a layer: nothing where it does not reach."""
    return [inner for inner in layer.lora_A if inner.removeprefix(INNER) == name]


def adapter_scale(model: nn.Module, name: str) -> float:
    """Return how strongly an adapter acts: 0 where it is switched off."""
    if name in (taken := _read_in(model)):
        return taken[name][1]
    for _, layer in adapted_layers(model):
        for inner in _held(layer, name):
            root = layer.r[inner] ** 0.5 if layer.use_rslora.get(inner) else layer.r[inner]
            acts = inner in layer.active_adapters
            return float(layer.scaling[inner] / layer.lora_alpha[inner] * root) if acts else 0.0
    _known(model, [name])
    return 0.0


@changes
def merge_adapters(model: nn.Module) -> None:
    """Add the acting adapters to the weights for good, and take all off; the model can then be saved as any other.

    Raises UniLIPError: the weights are quantised, read each time, or would not be finite; the model is as it was.
    """
    if _read_in(model):
        raise UniLIPError("This model reads its weights each time; load it without low_memory to merge adapters.")
    layers = list(adapted_layers(model))
    for name, layer in layers:
        weight = layer.base_layer.weight
        if not weight.is_floating_point() or hasattr(weight, "tensor_data_names"):
            raise UniLIPError("Quantised weights take no adapter in; load the model plainly, merge, then quantise.")
        for inner in layer.active_adapters:
            if inner in layer.lora_A and not bool((weight + layer.get_delta_weight(inner)).isfinite().all()):
                why = f"Merging overflows {weight.dtype} in {name}"
                raise UniLIPError(f"{why}; load the model in float32, or scale less.")
    for name, layer in layers:
        layer.merge()
        model.set_submodule(name, layer.base_layer)
    _tell_few_steps(model, [], merged=True)
    vars(model).pop("peft_config", None)


@changes
def unload_adapters(model: nn.Module, names: str | Sequence[str] | None = None) -> None:
    """Take one adapter off or several, all by default, as if they had never been there; others act as before.

    Raises UniLIPError: one of them is not loaded.
    """
    given: Any = names
    gone = adapter_names(model) if given is None else list(given) if isinstance(given, (list, tuple, set)) else [given]
    _known(model, gone)
    for adapter in gone:
        _read_in(model).pop(adapter, None)
    with _same_flags(model):
        for name, layer in list(adapted_layers(model)):  # in the place of one that acts, peft would let another act
            layer.set_adapter([inner for inner in layer.active_adapters if inner.removeprefix(INNER) not in gone])
            for inner in [inner for inner in layer.lora_A if inner.removeprefix(INNER) in gone]:
                layer.delete_adapter(inner)
            if not layer.lora_A:
                model.set_submodule(name, layer.base_layer)
    left = adapter_names(model)
    _tell_few_steps(model, [name for name in left if adapter_scale(model, name)])
    if not left:
        vars(model).pop("peft_config", None)  # what peft notes on a model with adapters


def _tell_few_steps(model: Any, acting: Sequence[str], merged: bool = False) -> None:
    """Let the config of a model with a lent embedder say in how many steps the adapters that act can draw, if in few.

    The embedder goes with the last adapter, but stays when one that needs it is merged.
    """
    dit: Any = getattr(model, "dit", None)
    if not hasattr(dit, "plain_config"):
        return
    if not merged:
        steps = [found for name in acting if (found := model.peft_config[INNER + name].few_steps)]
        model.config = few_config(dit.plain_config, steps[0]) if steps else dit.plain_config
    if not adapter_names(model):
        if not model.config.dit.few_steps:
            dit.transformer.time_embed_2 = None
        del dit.plain_config
