"""Sizes and weights that the tests of the method and of its fast ways share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from unilip.method.config import DecoderConfig, DiTConfig, TextConfig, UniLIPConfig, VisionConfig

M = TypeVar("M", bound=nn.Module)

ODD = UniLIPConfig(  # nothing is a power of two, or as wide as anything else
    image_size=84,
    num_queries=3,
    connector_layers=2,
    vision=VisionConfig(hidden_size=20, num_layers=3, num_heads=5, intermediate_size=36, image_size=70, norm_eps=1e-5),
    text=TextConfig(
        vocab_size=37, hidden_size=30, num_layers=3, num_heads=5, num_kv_heads=1, intermediate_size=44,
        rope_theta=10_000.0, max_positions=64, norm_eps=1e-5, tie_embeddings=True,
    ),
    dit=DiTConfig(
        num_layers=3, num_heads=5, head_dim=12, num_cross_heads=3, cross_head_dim=20, caption_channels=26,
        mlp_ratio=1.7, sample_size=5, latent_channels=6, interpolation_scale=1.7,
    ),
    decoder=DecoderConfig(
        block_out_channels=(6, 6, 12, 12, 24, 24), layers_per_block=(0, 2, 1, 1, 1, 2), attention_head_dim=6,
        latent_channels=6, block_types=("ResBlock",) * 4 + ("EfficientViTBlock",) * 2,
        qkv_multiscales=((), (), (), (), (3,), (5, 3)),
    ),
)  # fmt: skip


def spread(module: M) -> M:
    """Draw every weight anew, so that all of them tell: norms around 1, products that keep the size of what enters."""
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            nn.init.normal_(parameter, around, 0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return module


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors."""
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).abs().max())


def off(a: Tensor, b: Tensor) -> float:
    """The distance of a from b, relative to the length of b."""
    assert a.shape == b.shape
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


def seeds(*numbers: int) -> list[torch.Generator]:
    """A generator for each number."""
    return [torch.Generator().manual_seed(n) for n in numbers]
