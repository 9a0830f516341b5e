"""What a training run is: one complete, typed record; stages differ in their values, not in code.

A `Recipe` says what trains (parameter-name prefixes with learning-rate factors), the objective with its loss weights,
the data, the optimiser and what is written when. `override` changes single fields by dotted name, as `--set` does.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from unilip.errors import ConfigError


@dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and cosine decay; `warmup` is a fraction of the steps, `final` a fraction of `lr`."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 1e-4
    warmup: float = 0.03
    final: float = 0.1
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr is {self.lr}; it must be greater than 0.")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"optim.warmup is {self.warmup}; it is a fraction of the steps, at least 0 and below 1.")


@dataclass(frozen=True)
class Understand:
    """Stage 0: image-text contrast, prediction of the caption's words, next token of answers. Weights of the three."""

    contrastive: float = 1.0
    words: float = 1.0
    next_token: float = 0.0
    turns: int = 4


@dataclass(frozen=True)
class Reconstruct:
    """Tokenizer stages: L2 in [0,1], perceptual, distillation to the frozen original features, hinge GAN."""

    pixel: float = 1.0
    perceptual: float = 1.1
    distill: float = 0.0
    gan: float = 0.0
    gan_start: int = 0
    lecam: float = 0.001
    perceptual_source: str = "teacher"

    def __post_init__(self) -> None:
        if self.perceptual_source not in ("teacher", "lpips"):
            raise ConfigError(
                f"objective.perceptual_source is {self.perceptual_source!r}; allowed: teacher (features of the frozen "
                "original encoder), lpips (LPIPS-VGG16 and ConvNeXt logits; needs their weights)."
            )


@dataclass(frozen=True)
class Flow:
    """Generation stages: `noises` noisy copies share one condition; `target` is the latent space that is learned.

    "unilip": features of the target picture through the latent head; "dcae": latents of a DC-AE autoencoder, which is
    what a frozen pretrained SANA knows.
    """

    noises: int = 1
    drop_prompt: float = 0.1
    target: str = "unilip"

    def __post_init__(self) -> None:
        if self.target not in ("unilip", "dcae"):
            raise ConfigError(f"objective.target is {self.target!r}; allowed: unilip, dcae.")
        if self.noises < 1 or not 0 <= self.drop_prompt <= 1:
            raise ConfigError("objective.noises must be at least 1 and objective.drop_prompt between 0 and 1.")


@dataclass(frozen=True)
class Data:
    """Where batches come from: the emoji world by its name, or a folder of pictures with captions beside them.

    `edit_share` is the share of batches that hold edits (each batch has one task). `workers` processes prepare them.
    """

    source: str = "emoji"
    world: str = "nano"
    path: str = ""
    image_size: int = 0
    edit_share: float = 0.0
    text_share: float = 0.0
    workers: int = 0

    def __post_init__(self) -> None:
        if self.source not in ("emoji", "folder"):
            raise ConfigError(f"data.source is {self.source!r}; allowed: emoji, folder.")
        if self.source == "folder" and not self.path:
            raise ConfigError("data.path is empty; data.source=folder needs the folder of the pictures.")
        if not (0 <= self.edit_share <= 1 and 0 <= self.text_share <= 1):
            raise ConfigError("data.edit_share and data.text_share are shares between 0 and 1.")


@dataclass(frozen=True)
class Recipe:
    """A whole run. `init` lists where parts start: "part=source" pairs, a source being a recipe's result or a path."""

    name: str
    model: str
    objective: Understand | Reconstruct | Flow
    trains: tuple[tuple[str, float], ...]
    steps: int
    batch_size: int
    init: tuple[str, ...] = ()
    optim: Optim = field(default_factory=Optim)
    data: Data = field(default_factory=Data)
    accumulate: int = 1
    ema: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    measure_latents: bool = False
    log_every: int = 20
    sample_every: int = 500
    save_every: int = 500
    keep: int = 2
    note: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "sample_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype is {self.dtype!r}; allowed: float32, bfloat16 (autocast; weights stay float32).")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"ema is {self.ema}; it must be at least 0 (off) and below 1.")
        if isinstance(self.objective, Flow) and not any(p.split(".")[0] in ("connector", "dit", "mllm") for p, _ in self.trains):
            raise ConfigError("trains names nothing that a flow objective reaches; name connector, dit or mllm.queries.")

    @property
    def stage(self) -> str:
        """The second half of the name: recon, sft, ..."""
        return self.name.split("/")[-1]


def leaves(record: Any, prefix: str = "") -> dict[str, Any]:
    """Return every settable field of a recipe by dotted name."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{f.name}.")
        else:
            found[prefix + f.name] = value
    return found


def override(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Apply "dotted.name=value" settings; an unknown name is refused with the nearest valid one."""
    for setting in settings:
        name, sep, text = setting.partition("=")
        names = leaves(recipe)
        if not sep:
            raise ConfigError(f"--set takes NAME=VALUE, not {setting!r}.")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.3)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{recipe.name} has no setting {name!r}.{hint} All of them: {', '.join(names)}.")
        recipe = _replace(recipe, name.split("."), _parse(name, text, names[name]))
    return recipe


def _replace(record: Any, path: list[str], value: Any) -> Any:
    head, *rest = path
    return dataclasses.replace(record, **{head: _replace(getattr(record, head), rest, value) if rest else value})


def _parse(name: str, text: str, old: Any) -> Any:
    try:
        if isinstance(old, bool):
            if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
                raise ValueError(text)
            return text.lower() in ("true", "1", "yes")
        if isinstance(old, int):
            return int(text.replace("_", ""))
        if isinstance(old, float):
            return float(text)
        if name == "trains":
            pairs = [part.rpartition(":") for part in text.split(",") if part]
            return tuple((p or f, float(f) if p else 1.0) for p, _, f in pairs)
        if isinstance(old, tuple):
            return tuple(part for part in text.split(",") if part)
        return text
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} cannot be read as {type(old).__name__}, which {old!r} is.") from error
