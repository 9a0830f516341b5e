"""The sizes of UniLIP by name: tiny (tests), pico and nano (trained by this package), 1b and 3b (the released ones)."""

from __future__ import annotations

import dataclasses

from unilip.errors import ConfigError, check_choice
from unilip.method.config import DecoderConfig, DiTConfig, SamplingConfig, TextConfig, UniLIPConfig, VisionConfig


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
        vision=VisionConfig(hidden_size=160, num_layers=4, num_heads=5, intermediate_size=640, image_size=112),
        text=TextConfig(
            vocab_size=1536, hidden_size=192, num_layers=4, num_heads=6, num_kv_heads=2, intermediate_size=512,
            rope_theta=10_000.0, max_positions=1024, tie_embeddings=True,
        ),
        dit=DiTConfig(
            num_layers=6, num_heads=8, head_dim=32, num_cross_heads=8, cross_head_dim=32, caption_channels=192,
            sample_size=4, latent_channels=64, plain_blocks=True,
        ),
        decoder=DecoderConfig(
            block_out_channels=(16, 16, 32, 64, 128, 256), layers_per_block=(0, 1, 1, 1, 3, 1), latent_channels=64,
            block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2, upsample_block_type="pixel_shuffle",
        ),
        sampling=SamplingConfig(guidance_scale=2.5, plan="Place: "),
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
            sample_size=8, plain_blocks=True,
        ),
        decoder=DecoderConfig(
            block_out_channels=(32, 32, 64, 128, 128, 256), layers_per_block=(1, 1, 2, 2, 2, 1),
        ),
        sampling=SamplingConfig(guidance_scale=3.0, plan="Place: "),
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


def small_decoder(full: DecoderConfig) -> DecoderConfig:
    """Return a decoder of half the widths, with one block where the full one has any: about a tenth of the work."""
    widths = tuple(max(1, width // 2) for width in full.block_out_channels[:-1])
    end = max(full.block_out_channels[-1] // 2, full.latent_channels)
    layers = tuple(min(count, 1) for count in full.layers_per_block)
    return dataclasses.replace(full, block_out_channels=(*widths, end), layers_per_block=layers)


PRESETS = {"tiny": _tiny, "pico": _pico, "nano": _nano, "1b": _1b, "3b": _3b}


def preset(name: str) -> UniLIPConfig:
    """Return the named preset: tiny (tests), pico and nano (embedded models), 1b and 3b (the released sizes)."""
    check_choice("preset", name, PRESETS, ConfigError)
    return PRESETS[name]()
