"""Pixels -> features: the one CLIP encoder that everything in UniLIP shares (paper, section 3.1).

In:  pixels (M,3,H,W), ImageNet-normalised, H and W multiples of 28.
Out: features (M,N,D), N = (H/28)(W/28). They are LLM input, edit condition, distillation target and what is decoded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

from unilip.config import TOKEN_PIXELS, UniLIPConfig
from unilip.errors import ImageError


def pixel_unshuffle(patches: Tensor, height: int, width: int) -> Tensor:
    """Merge each 2x2 block of patches into one token: (M, height*width, E) -> (M, height*width/4, 4E).

    Channel order is (row in block, column in block, channel), as InternVL's pixel shuffle.
    """
    m, _, e = patches.shape
    blocks = patches.reshape(m, height // 2, 2, width // 2, 2, e)  # M h 2 w 2 E
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(m, (height // 2) * (width // 2), 4 * e)  # M N 4E


class Encoder(nn.Module):
    """InternViT, pixel unshuffle and a two-layer projector into the LLM's width."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        v = config.vision
        self.patch_size = v.patch_size
        self.vision_tower = InternVLVisionModel(
            InternVLVisionConfig(
                hidden_size=v.hidden_size,
                num_hidden_layers=v.num_layers,
                num_attention_heads=v.num_heads,
                intermediate_size=v.intermediate_size,
                image_size=(v.image_size, v.image_size),
                patch_size=(v.patch_size, v.patch_size),
                layer_scale_init_value=v.layer_scale_init,
                layer_norm_eps=v.norm_eps,
                attention_bias=True,
            )
        )
        # every module reachable by name must own weights: the unused mask token and final norm are absent by config
        self.projector = nn.Sequential(
            nn.LayerNorm(4 * v.hidden_size),
            nn.Linear(4 * v.hidden_size, config.text.hidden_size),
            nn.GELU(),
            nn.Linear(config.text.hidden_size, config.text.hidden_size),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (M,N,D) of normalised pixels (M,3,H,W).

        Raises:
            ImageError: the sides are not multiples of 28 pixels.
        """
        height, width = pixels.shape[-2:]
        if height % TOKEN_PIXELS or width % TOKEN_PIXELS:
            raise ImageError(f"The encoder got {width}x{height} px; both sides must be multiples of {TOKEN_PIXELS}.")
        pixels = pixels.to(next(self.parameters()).dtype)
        patches = self.vision_tower(pixels).last_hidden_state[:, 1:]  # M (H/14 * W/14) E, without CLS
        return self.projector(pixel_unshuffle(patches, height // self.patch_size, width // self.patch_size))


@torch.no_grad()
def init_encoder(encoder: Encoder, generator: torch.Generator) -> None:
    """Give the parts that the library leaves at zero (class token, positions) a small random start."""
    embeddings = encoder.vision_tower.embeddings
    for parameter in (embeddings.cls_token, embeddings.position_embeddings):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
