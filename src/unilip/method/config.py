"""The complete description of a UniLIP model: frozen, typed, checked, JSON round trip.

A `UniLIPConfig` holds the configs of its networks and what ties them together; by default it is the released 1b model.

Dimension letters of this package: B batch, M images in a batch, H/W pixels, h/w latent grid (H/28, W/28), N = h w image
tokens, T prompt tokens, Q queries, D LLM width, C caption channels, L = T + Q condition length, Z latent channels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from unilip.errors import ConfigError

FORMAT = "unilip"
TOKEN_PIXELS = 28  # one image token covers 2x2 patches of 14 px
DECODER_PIXELS = 32  # one latent cell becomes 32 px in the DC-AE decoder
BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")  # of the DC-AE decoder
UPSAMPLING = ("interpolate", "pixel_shuffle")
SOLVERS = ("dpm++", "euler", "unipc")
QUANTIZATIONS = ("int8", "int4", "fp8", "int8_dynamic")
CONDITIONS = ("dual", "queries", "hidden")  # whose hidden states the DiT sees: prompt and queries, or one of the two
SAMPLING_PRESETS = ("quality", "balanced", "fast", "turbo")  # how many evaluations a picture may cost


def _check(owner: object, positive: str, divides: str = "", **choices: tuple[str, ...]) -> None:
    """Check fields: names of positive numbers, "whole/part" pairs of which one divides the other, choices."""
    kind = type(owner).__name__
    for name in positive.split():
        if not 0 < getattr(owner, name) < math.inf:
            raise ConfigError(f"{kind}.{name} is {getattr(owner, name)!r}; it must be a number greater than 0.")
    for whole, part in (pair.split("/") for pair in divides.split()):
        a, b = getattr(owner, whole), getattr(owner, part)
        if a % b:
            raise ConfigError(f"{kind}.{whole} ({a}) must be a multiple of {part} ({b}); change one of them.")
    for name, allowed in choices.items():
        value = getattr(owner, name)
        wrong = sorted(set(value if isinstance(value, tuple) else (value,)) - set(allowed))
        if wrong:
            raise ConfigError(f"{kind}.{name} is {', '.join(map(repr, wrong))}; allowed: {', '.join(allowed)}.")


@dataclass(frozen=True)
class VisionConfig:
    """InternViT: patches of `patch_size` pixels; `image_size` is the resolution of the stored position grid."""

    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    image_size: int = 448
    patch_size: int = 14
    layer_scale_init: float = 0.1
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = "hidden_size num_layers num_heads intermediate_size image_size patch_size norm_eps"
        _check(self, sizes, "hidden_size/num_heads image_size/patch_size")
        if 2 * self.patch_size != TOKEN_PIXELS:
            raise ConfigError(f"VisionConfig.patch_size is {self.patch_size}; it must be 14: a token is 2x2 patches.")


@dataclass(frozen=True)
class TextConfig:
    """Qwen2 decoder; `tie_embeddings` says whether the language head shares the token embedding."""

    vocab_size: int = 151674
    hidden_size: int = 896
    num_layers: int = 24
    num_heads: int = 14
    num_kv_heads: int = 2
    intermediate_size: int = 4864
    rope_theta: float = 1_000_000.0
    max_positions: int = 32768
    norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size num_layers num_heads num_kv_heads intermediate_size"
        _check(self, f"{sizes} rope_theta max_positions norm_eps", "hidden_size/num_heads num_heads/num_kv_heads")
        if self.hidden_size // self.num_heads % 2:
            heads = f"{self.hidden_size} / {self.num_heads}"
            raise ConfigError(f"TextConfig.hidden_size / num_heads ({heads}) must be even: rotation turns pairs.")


@dataclass(frozen=True)
class DiTConfig:
    """SANA transformer.

    `interpolation_scale` switches the sin-cos position embedding of the latent grid: on by a number, off by None. The
    released weights were trained *with* it (1), though their own config says None: diffusers 0.32, their maker, read
    None as 1. Without it they are silently another network.

    `few_steps` are the numbers of jumps from noise to a picture that the weights were trained for, their own number
    first; where there are any, a second timestep embedder knows where a jump goes. With `plain_blocks` self attention
    is softmax attention and the feed-forward mixes no neighbours: of the small embedded models, not of SANA.
    """

    num_layers: int = 28
    num_heads: int = 36
    head_dim: int = 32
    num_cross_heads: int = 16
    cross_head_dim: int = 72
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    sample_size: int = 16
    latent_channels: int = 32
    interpolation_scale: float | None = 1.0
    few_steps: tuple[int, ...] = ()
    plain_blocks: bool = False

    def __post_init__(self) -> None:
        sizes = "num_layers num_heads head_dim num_cross_heads cross_head_dim caption_channels mlp_ratio sample_size"
        embedded = self.interpolation_scale is not None
        _check(self, f"{sizes} latent_channels {'interpolation_scale' * embedded}")
        if embedded and self.hidden_size % 4:
            why = f"({self.hidden_size}) must be a multiple of 4 for a position embedding"
            raise ConfigError(f"DiTConfig.num_heads x head_dim {why}; change them or set interpolation_scale to null.")
        if self.num_cross_heads * self.cross_head_dim != self.hidden_size:
            cross = f"num_cross_heads x cross_head_dim ({self.num_cross_heads} x {self.cross_head_dim})"
            raise ConfigError(f"DiTConfig.{cross} must equal num_heads x head_dim ({self.hidden_size}).")
        if not all(1 <= n <= 1000 for n in self.few_steps) or len(set(self.few_steps)) < len(self.few_steps):
            raise ConfigError(f"DiTConfig.few_steps is {self.few_steps}; give different numbers between 1 and 1000.")

    @property
    def hidden_size(self) -> int:
        """Width of the transformer, W."""
        return self.num_heads * self.head_dim


@dataclass(frozen=True)
class DecoderConfig:
    """DC-AE f32 decoder, from the finest of six scales to the coarsest.

    A first entry 0 in `layers_per_block` leaves the finest scale out: the image is then written by an upsampling
    convolution from the second scale.
    """

    block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    block_types: tuple[str, ...] = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    qkv_multiscales: tuple[tuple[int, ...], ...] = ((), (), (), (5,), (5,), (5,))
    attention_head_dim: int = 32
    latent_channels: int = 32
    upsample_block_type: str = "interpolate"

    def __post_init__(self) -> None:
        for name in ("block_out_channels", "layers_per_block", "block_types", "qkv_multiscales"):
            if (count := len(getattr(self, name))) != 6:
                raise ConfigError(f"DecoderConfig.{name} has {count} entries; the f32 decoder has 6 scales.")
        _check(self, "attention_head_dim latent_channels", block_types=BLOCK_TYPES, upsample_block_type=UPSAMPLING)
        for name, least in (("block_out_channels", 1), ("layers_per_block", 0)):
            if min(getattr(self, name)) < least:
                raise ConfigError(f"DecoderConfig.{name} is {getattr(self, name)}; no entry may be below {least}.")
        widths, z = self.block_out_channels, self.latent_channels
        steps = zip(widths, widths[1:], self.layers_per_block, strict=False)
        wrong = [f"4 x {fine} must be a multiple of {coarse}" for fine, coarse, n in steps if n and 4 * fine % coarse]
        wrong += [f"its end ({widths[-1]}) must be a multiple of latent_channels ({z})"] if widths[-1] % z else []
        if wrong:
            raise ConfigError(f"DecoderConfig.block_out_channels is {widths}; {wrong[0]}.")


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `generate` and `edit`, as published. `plan` asks the LLM to write a prompt out before it is drawn."""

    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    flow_shift: float = 3.0
    solver: str = "dpm++"
    plan: str = ""
    joint: bool = False  # whether it has learned from edits of several pictures
    recall: bool = True  # whether it has learned from conversations that began before their newest picture

    def __post_init__(self) -> None:
        steps, guidance = self.num_inference_steps, self.guidance_scale
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
            raise ConfigError(f"num_inference_steps is {steps!r}; it must be a whole number between 1 and 1000.")
        if not 0 <= guidance < math.inf:
            raise ConfigError(f"guidance_scale is {guidance}; it must be a number of at least 0 (1 switches it off).")
        _check(self, "flow_shift", solver=SOLVERS)


@dataclass(frozen=True)
class UniLIPConfig:
    """Everything needed to build a UniLIP model without its weights.

    `image_size` is the model's own square in pixels; other shapes have about as many of them. Latents enter the
    diffusion transformer as `(latent - latent_mean) * latent_factor`; both are a number or one number per channel.
    `name` is free text shown by `unilip info`. `condition` and `substitute_features` are for ablations; released models
    have the defaults: the DiT sees the hidden states of the prompt and of the queries ("dual"), and in edits the
    connector reads the encoder's own features in place of the hidden states of the source picture.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    dit: DiTConfig = field(default_factory=DiTConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    name: str = "unilip"
    image_size: int = 448
    num_queries: int = 256
    connector_layers: int = 6
    condition: str = "dual"
    substitute_features: bool = True
    latent_head_blocks: int = 3
    latent_mean: float | tuple[float, ...] = 0.0
    latent_factor: float | tuple[float, ...] = 10.6

    def __post_init__(self) -> None:
        sizes = "image_size num_queries connector_layers latent_head_blocks"
        _check(self, sizes, condition=CONDITIONS)
        if self.image_size % TOKEN_PIXELS:
            near = max(1, (self.image_size + TOKEN_PIXELS // 2) // TOKEN_PIXELS) * TOKEN_PIXELS
            raise ConfigError(
                f"UniLIPConfig.image_size is {self.image_size}; take a multiple of 28 (for example {near})."
            )
        if self.connector_layers > self.text.num_layers:
            most = f"copied from the LLM's last layers, of which there are only {self.text.num_layers}"
            raise ConfigError(f"UniLIPConfig.connector_layers is {self.connector_layers}; they are {most}.")
        if self.dit.latent_channels != self.decoder.latent_channels:
            both = f"dit.latent_channels ({self.dit.latent_channels}) and decoder.latent_channels"
            raise ConfigError(f"UniLIPConfig: {both} ({self.decoder.latent_channels}) must be equal.")
        if self.num_queries >= self.text.max_positions:
            room = f"no room for a prompt in the {self.text.max_positions} positions of the LLM"
            raise ConfigError(f"UniLIPConfig.num_queries is {self.num_queries}, which leaves {room}.")
        for name in ("latent_mean", "latent_factor"):
            value, channels = getattr(self, name), self.dit.latent_channels
            if isinstance(value, tuple) and len(value) != channels:
                raise ConfigError(f"UniLIPConfig.{name} has {len(value)} entries for {channels} latent channels.")
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(v) for v in numbers) or (name == "latent_factor" and min(numbers) <= 0):
                least = "greater than 0" if name == "latent_factor" else "finite"
                raise ConfigError(f"UniLIPConfig.{name} is {value!r}; every number in it must be {least}.")

    @property
    def grid(self) -> int:
        """Image tokens along one side of the model's own square."""
        return self.image_size // TOKEN_PIXELS

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of the model's own square, N."""
        return self.grid**2

    def replace(self, **changes: Any) -> UniLIPConfig:
        """Return a copy with some fields changed, checked again."""
        hints = get_type_hints(UniLIPConfig)
        for name in set(changes) & set(hints):
            changes[name] = _typed(changes[name], hints[name], f"config.{name}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values, with the format's name."""
        values: dict[str, Any] = {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}
        for name in ("few_steps", "plain_blocks"):  # earlier readers do not know them
            if not values["dit"][name]:
                del values["dit"][name]
        return values

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UniLIPConfig:
        """Build from `to_dict` output; an unknown or ill-typed field is a `ConfigError`."""
        if not isinstance(data, Mapping) or data.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"config is {str(data)[:80]}; only the format {FORMAT!r} is read here.")
        return cast(UniLIPConfig, _build(cls, {key: value for key, value in data.items() if key != "format"}, "config"))


def _build(kind: type, data: Mapping[str, Any], where: str) -> Any:
    """Build a dataclass from a mapping, strictly: known fields only, each of its declared type."""
    hints = get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown fields {', '.join(unknown)}; allowed: {', '.join(hints)}.")
    return kind(**{name: _typed(value, hints[name], f"{where}.{name}") for name, value in data.items()})


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as the declared type of a field: a plain one, a config, a tuple, or a choice of these."""
    if dataclasses.is_dataclass(hint):
        if isinstance(value, cast(type, hint)):
            return value
        if isinstance(value, Mapping):
            return _build(cast(type, hint), value, where)
        raise ConfigError(f"{where} must be a JSON object, not {type(value).__name__}.")
    if get_origin(hint) in (Union, types.UnionType):
        for choice in get_args(hint):
            with contextlib.suppress(ConfigError):
                return _typed(value, choice, where)
    elif get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(v, get_args(hint)[0], where) for v in value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 10**300:
            return float(value)
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} is {value!r}; it must be {hint.__name__ if isinstance(hint, type) else hint}.")
