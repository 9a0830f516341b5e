"""Fine-tuning by adapters: LoRA or DoRA on the linear layers that a recipe's `trains` reaches, by peft.

Out: a folder that `UniLIP.load_adapter` and `peft.PeftModel.from_pretrained` read.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from unilip import adapters
from unilip.errors import ConfigError
from unilip.model import UniLIP
from unilip.recipes.record import FewSteps, Recipe
from unilip.train import processes
from unilip.train.parallel import whole_tensor

NAME = "default"  # what peft calls the only adapter


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(f".{kind}." in name for kind in adapters.KINDS)


def reached(recipe: Recipe, name: str) -> tuple[list[str], float]:
    """Return the prefixes of `trains` that the name of a layer or parameter has, and the factor of the longest."""
    found = {prefix: factor for prefix, factor in recipe.trains if f"{name}.".startswith(f"{prefix}.")}
    # no gradient comes to where jumps go, in a model with few-step weights that learns no jumps
    idle = ".time_embed_2." in f"{name}." and not isinstance(recipe.objective, FewSteps)
    return ([], 0.0) if idle or not found else (list(found), found[max(found, key=len)])


def target_layers(recipe: Recipe, model: nn.Module) -> list[str]:
    """Return the linear layers that get an adapter. Raises ConfigError: none, or a prefix of `trains` reaches none."""
    last_words = {word.strip() for word in recipe.adapter.targets.split(",") if word.strip()}
    found, seen, used = [], set(), set[str]()
    for name, module in model.named_modules():
        prefixes, factor = reached(recipe, name)
        head = name.endswith("lm_head") and not last_words  # often the embeddings' own weights
        if not isinstance(module, nn.Linear) or factor <= 0 or head:
            continue
        seen.add(name.split(".")[-1])
        if not last_words or any(f".{name}".endswith(f".{word}") for word in last_words):
            found.append(name)
            used.update(prefixes)
    idle = [prefix for prefix, factor in recipe.trains if factor > 0 and prefix not in used]
    if idle or not found:
        raise ConfigError(
            f"adapter: trains names {', '.join(idle or dict(recipe.trains))}, where no linear layer is called "
            f"{recipe.adapter.targets or 'anything'}; there are {', '.join(sorted(seen)) or 'none'}. Change trains "
            "(an adapter trains no single parameters) or adapter.targets."
        )
    return found


def add_adapter(recipe: Recipe, model: UniLIP) -> None:
    """Put an adapter into the model: the first step starts from exactly what the model did before."""
    settings = recipe.adapter
    config = adapters.library().LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha or 2 * settings.rank, use_dora=settings.dora,
        target_modules=target_layers(recipe, model), base_model_name_or_path=",".join(recipe.init),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        adapters.put_in(model, config, NAME)


def save_adapter(model: UniLIP, folder: Path, base: str = "") -> None:
    """Write the adapter to a new folder in peft's format, with what it is of; sharded, by all processes together."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            stored = name.replace(f".{NAME}.weight", "" if ".lora_magnitude_vector." in name else ".weight")
            tensors[adapters.PREFIX + stored] = whole_tensor(parameter.detach()).cpu().contiguous().clone()
    base_layers = {layer: module.base_layer for layer, module in adapters.adapted_layers(model)}
    trained_on = adapters.sampled(base_layers, lambda layer: whole_tensor(base_layers[layer].weight))
    if not processes.first():
        return
    folder.mkdir(parents=True)
    save_file(tensors, folder / adapters.WEIGHTS, metadata={"format": "pt"})
    configs: Any = model.peft_config  # peft puts it there
    values = configs[NAME].to_dict()
    if any(".time_embed_2." in name for name in tensors):
        values[adapters.FEW_STEPS] = list(model.config.dit.few_steps)
    values["base_model_name_or_path"] = base or values["base_model_name_or_path"]
    mapping = {"base_model_class": "UniLIP", "parent_library": "unilip.model", adapters.TRAINED_ON: trained_on}
    values |= {adapters.MAPPING: mapping, "inference_mode": True, "target_modules": sorted(values["target_modules"])}
    (folder / adapters.CONFIG).write_text(json.dumps(values, indent=1, default=str), encoding="utf-8")
