"""The complete description of a UniLIP model: frozen, typed, JSON round trip, presets.

A `UniLIPConfig` holds four child configs, each of which is handed to one library module (`InternVLVisionModel`,
`Qwen2ForCausalLM`, `SanaTransformer2DModel`, the `AutoencoderDC` decoder), and the numbers that tie them together.

Dimension letters used throughout the package: B batch, M images in a batch, H/W pixels, h/w latent grid (H/28, W/28),
N = h*w image tokens, T prompt tokens, Q queries, D LLM width, C caption channels, L = T + Q condition length.
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
SOLVERS = ("dpm++", "euler", "unipc")
QUANTIZATIONS = ("int8", "int4", "fp8")
CONDITIONS = ("dual", "queries", "hidden")  # whose hidden states the DiT sees: prompt and queries, or one of the two
SAMPLING_PRESETS = ("quality", "balanced", "fast")  # how many evaluations a picture may cost


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:
            raise ConfigError(f"{type(owner).__name__}.{name} is {value!r}; it must be a number greater than 0.")


def _divides(owner: object, whole: str, part: str) -> None:
    a, b = getattr(owner, whole), getattr(owner, part)
    if a % b:
        name = type(owner).__name__
        raise ConfigError(f"{name}.{whole} ({a}) must be a multiple of {part} ({b}); change one of them.")


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
        _positive(self, "hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size")
        _positive(self, "norm_eps")
        _divides(self, "hidden_size", "num_heads")
        _divides(self, "image_size", "patch_size")
        if 2 * self.patch_size != TOKEN_PIXELS:
            raise ConfigError(
                f"VisionConfig.patch_size is {self.patch_size}; it must be {TOKEN_PIXELS // 2}, because an image token "
                f"covers 2x2 patches of {TOKEN_PIXELS} px."
            )


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
        _positive(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        _positive(self, "rope_theta", "max_positions", "norm_eps")
        _divides(self, "hidden_size", "num_heads")
        _divides(self, "num_heads", "num_kv_heads")
        if self.hidden_size // self.num_heads % 2:
            raise ConfigError(
                f"TextConfig.hidden_size / num_heads ({self.hidden_size} / {self.num_heads}) must be even, because "
                "rotary positions turn pairs of channels."
            )


@dataclass(frozen=True)
class DiTConfig:
    """SANA transformer.

    `interpolation_scale` switches the sin-cos position embedding of the latent grid: a number turns it on, None turns
    it off. The released weights were trained *with* it (value 1) although their own config says None, because the
    library version they were made with read None as 1. Loading them without it silently gives another network.
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

    def __post_init__(self) -> None:
        _positive(self, "num_layers", "num_heads", "head_dim", "num_cross_heads", "cross_head_dim", "sample_size")
        _positive(self, "caption_channels", "latent_channels", "mlp_ratio")
        if self.interpolation_scale is not None:
            _positive(self, "interpolation_scale")
            if self.hidden_size % 4:
                raise ConfigError(
                    f"DiTConfig.num_heads x head_dim ({self.hidden_size}) must be a multiple of 4 for a position "
                    "embedding; change them or set interpolation_scale to null."
                )
        if self.num_cross_heads * self.cross_head_dim != self.hidden_size:
            raise ConfigError(
                f"DiTConfig.num_cross_heads x cross_head_dim ({self.num_cross_heads} x {self.cross_head_dim}) must "
                f"equal num_heads x head_dim ({self.hidden_size})."
            )

    @property
    def hidden_size(self) -> int:
        """Width of the transformer."""
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
            count = len(getattr(self, name))
            if count != 6:
                raise ConfigError(f"DecoderConfig.{name} has {count} entries; the f32 decoder has 6 scales.")
        _positive(self, "attention_head_dim", "latent_channels")
        for name, least in (("block_out_channels", 1), ("layers_per_block", 0)):
            if min(getattr(self, name)) < least:
                raise ConfigError(f"DecoderConfig.{name} is {getattr(self, name)}; no entry may be below {least}.")
        unknown = sorted(set(self.block_types) - set(BLOCK_TYPES))
        if unknown:
            raise ConfigError(
                f"DecoderConfig.block_types has {', '.join(map(repr, unknown))}; allowed: {', '.join(BLOCK_TYPES)}."
            )
        if self.upsample_block_type not in ("interpolate", "pixel_shuffle"):
            raise ConfigError(
                f"DecoderConfig.upsample_block_type is {self.upsample_block_type!r}; "
                "allowed: interpolate, pixel_shuffle."
            )
        if self.block_out_channels[-1] % self.latent_channels:
            raise ConfigError(
                f"DecoderConfig.block_out_channels ends in {self.block_out_channels[-1]}; it must be a multiple of "
                f"latent_channels ({self.latent_channels})."
            )


@dataclass(frozen=True)
class SamplingConfig:
    """Defaults of `generate` and `edit`; the released models use 20 steps of DPM-Solver++ at shift 3, guidance 4.5."""

    num_inference_steps: int = 20
    guidance_scale: float = 4.5
    flow_shift: float = 3.0
    solver: str = "dpm++"

    def __post_init__(self) -> None:
        if isinstance(self.num_inference_steps, bool) or not isinstance(self.num_inference_steps, int):
            raise ConfigError(f"num_inference_steps is {self.num_inference_steps!r}; it must be a whole number.")
        if not 1 <= self.num_inference_steps <= 1000:
            raise ConfigError(
                f"num_inference_steps is {self.num_inference_steps}; it must be between 1 and 1000 (20 is usual)."
            )
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(
                f"guidance_scale is {self.guidance_scale}; it must be a number of at least 0 (1 switches it off)."
            )
        _positive(self, "flow_shift")
        if self.solver not in SOLVERS:
            raise ConfigError(f"There is no solver {self.solver!r}; allowed: {', '.join(SOLVERS)}.")


@dataclass(frozen=True)
class UniLIPConfig:
    """Everything needed to build a UniLIP model without its weights.

    `image_size` is the square size in pixels that the model reads and draws. Latents enter the diffusion transformer
    as `(latent - latent_mean) * latent_factor`; both are a number or one number per channel. `name` is free text
    shown by `unilip info`. `condition` and `substitute_features` are for ablations; released models have the defaults:
    the DiT sees the hidden states of the prompt and of the queries ("dual"), and in edits the connector reads the
    encoder's own features in place of the hidden states of the source picture.
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
        _positive(self, "image_size", "num_queries", "connector_layers", "latent_head_blocks")
        if self.image_size % TOKEN_PIXELS:
            raise ConfigError(
                f"UniLIPConfig.image_size is {self.image_size}; it must be a multiple of {TOKEN_PIXELS} "
                f"(for example {max(1, round(self.image_size / TOKEN_PIXELS)) * TOKEN_PIXELS})."
            )
        if self.connector_layers > self.text.num_layers:
            raise ConfigError(
                f"UniLIPConfig.connector_layers is {self.connector_layers}, but the connector starts as a copy of the "
                f"LLM's last layers, of which there are only {self.text.num_layers}."
            )
        if self.condition not in CONDITIONS:
            raise ConfigError(f"UniLIPConfig.condition is {self.condition!r}; allowed: {', '.join(CONDITIONS)}.")
        if self.dit.latent_channels != self.decoder.latent_channels:
            raise ConfigError(
                f"UniLIPConfig: dit.latent_channels ({self.dit.latent_channels}) and decoder.latent_channels "
                f"({self.decoder.latent_channels}) must be equal."
            )
        if self.num_queries >= self.text.max_positions:
            raise ConfigError(
                f"UniLIPConfig.num_queries is {self.num_queries}, which leaves no room for a prompt in the "
                f"{self.text.max_positions} positions of the LLM."
            )
        for name in ("latent_mean", "latent_factor"):
            value = getattr(self, name)
            channels = self.dit.latent_channels
            if isinstance(value, tuple) and len(value) != channels:
                raise ConfigError(f"UniLIPConfig.{name} has {len(value)} entries for {channels} latent channels.")
            numbers = value if isinstance(value, tuple) else (value,)
            if not all(math.isfinite(v) for v in numbers) or (name == "latent_factor" and min(numbers) <= 0):
                least = "greater than 0" if name == "latent_factor" else "finite"
                raise ConfigError(f"UniLIPConfig.{name} is {value!r}; every number in it must be {least}.")

    @property
    def grid(self) -> int:
        """Image tokens along one side."""
        return self.image_size // TOKEN_PIXELS

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one picture, N."""
        return self.grid**2

    def replace(self, **changes: Any) -> UniLIPConfig:
        """Return a copy with some fields changed, checked again."""
        hints = get_type_hints(UniLIPConfig)
        for name in set(changes) & set(hints):
            if not dataclasses.is_dataclass(hints[name]):
                changes[name] = _typed(changes[name], hints[name], f"config.{name}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values, with the format's name."""
        return {"format": FORMAT, **json.loads(json.dumps(dataclasses.asdict(self)))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> UniLIPConfig:
        """Build from `to_dict` output; an unknown or ill-typed field is a `ConfigError`."""
        if data.get("format", FORMAT) != FORMAT:
            raise ConfigError(f"config has the format {data['format']!r}; only {FORMAT!r} is read here.")
        rest = {key: value for key, value in data.items() if key != "format"}
        return build(cls, rest, "config")


def build(kind: type, data: Mapping[str, Any], where: str) -> Any:
    """Build the dataclass `kind` from a mapping, strictly: known fields only, each of its declared type."""
    hints = get_type_hints(kind)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"{where} has unknown fields {', '.join(unknown)}; allowed: {', '.join(hints)}.")
    values: dict[str, Any] = {}
    for name, value in data.items():
        hint: Any = hints[name]
        place = f"{where}.{name}"
        if not dataclasses.is_dataclass(hint):
            values[name] = _typed(value, hint, place)
        elif isinstance(value, Mapping):
            values[name] = build(cast(type, hint), value, place)
        else:
            raise ConfigError(f"{place} must be a JSON object, not {type(value).__name__}.")
    return kind(**values)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """Return a JSON value as the declared type of a field: a plain one, a tuple of one, or a choice of these."""
    if get_origin(hint) in (Union, types.UnionType):
        for choice in get_args(hint):
            with contextlib.suppress(ConfigError):
                return _typed(value, choice, where)
    elif get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            return tuple(_typed(v, get_args(hint)[0], where) for v in value)
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is hint:
        return value
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"{where} is {value!r}; it must be {expected}.")


def _tiny() -> UniLIPConfig:
    return UniLIPConfig(
        name="tiny",
        image_size=56,
        num_queries=8,
        connector_layers=2,
        latent_factor=10.6,
        vision=VisionConfig(hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64, image_size=56),
        text=TextConfig(
            vocab_size=400, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=128,
            max_positions=512,
        ),
        dit=DiTConfig(
            num_layers=2, num_heads=4, head_dim=16, num_cross_heads=2, cross_head_dim=32, caption_channels=48,
            sample_size=16,
        ),
        decoder=DecoderConfig(
            block_out_channels=(16, 16, 16, 32, 32, 32), layers_per_block=(1,) * 6, attention_head_dim=8,
        ),
    )  # fmt: skip


def _pico() -> UniLIPConfig:
    return UniLIPConfig(
        name="pico",
        image_size=112,
        num_queries=16,
        connector_layers=2,
        latent_factor=1.0,
        vision=VisionConfig(hidden_size=128, num_layers=4, num_heads=4, intermediate_size=512, image_size=112),
        text=TextConfig(
            vocab_size=1536, hidden_size=192, num_layers=4, num_heads=6, num_kv_heads=2, intermediate_size=512,
            rope_theta=10_000.0, max_positions=1024, tie_embeddings=True,
        ),
        dit=DiTConfig(
            num_layers=6, num_heads=6, head_dim=32, num_cross_heads=6, cross_head_dim=32, caption_channels=192,
            sample_size=4,
        ),
        decoder=DecoderConfig(
            block_out_channels=(16, 16, 32, 64, 128, 256), layers_per_block=(0, 1, 2, 2, 2, 1),
            block_types=("ResBlock",) * 5 + ("EfficientViTBlock",), upsample_block_type="pixel_shuffle",
        ),
        sampling=SamplingConfig(guidance_scale=2.5),
    )  # fmt: skip


def _nano() -> UniLIPConfig:
    return UniLIPConfig(
        name="nano",
        image_size=224,
        num_queries=64,
        connector_layers=2,
        latent_factor=1.0,
        vision=VisionConfig(hidden_size=192, num_layers=6, num_heads=6, intermediate_size=768, image_size=224),
        text=TextConfig(
            vocab_size=3072, hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=2, intermediate_size=704,
            rope_theta=10_000.0, max_positions=2048, tie_embeddings=True,
        ),
        dit=DiTConfig(
            num_layers=10, num_heads=8, head_dim=32, num_cross_heads=8, cross_head_dim=32, caption_channels=256,
            sample_size=8,
        ),
        decoder=DecoderConfig(
            block_out_channels=(32, 32, 64, 128, 128, 256), layers_per_block=(1, 1, 2, 2, 2, 1),
        ),
        sampling=SamplingConfig(guidance_scale=3.0),
    )  # fmt: skip


def _1b() -> UniLIPConfig:
    return UniLIPConfig(name="1b")


def _3b() -> UniLIPConfig:
    return UniLIPConfig(
        name="3b",
        latent_factor=9.5,
        text=TextConfig(hidden_size=1536, num_layers=28, num_heads=12, intermediate_size=8960),
        dit=DiTConfig(num_layers=20, num_heads=70, num_cross_heads=20, cross_head_dim=112),
    )


PRESETS = {"tiny": _tiny, "pico": _pico, "nano": _nano, "1b": _1b, "3b": _3b}


def preset(name: str) -> UniLIPConfig:
    """Return the named preset: tiny (tests), pico and nano (embedded models), 1b and 3b (the released sizes)."""
    if name not in PRESETS:
        raise ConfigError(f"There is no preset {name!r}; allowed: {', '.join(PRESETS)}.")
    return PRESETS[name]()
