"""Pixels -> features: the one CLIP encoder that everything in UniLIP shares (paper, section 3.1).

In:  pixels (M,3,H,W), ImageNet-normalised; H and W multiples of 28.
Out: features (M,N,D), N = (H/28)(W/28): LLM input, edit condition, distillation target, and what is decoded.
InternViT: patches of 14 px (h' w' of them), a class token, pre-norm layers of width E with layer scale.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.errors import ImageError
from unilip.method.config import TOKEN_PIXELS, UniLIPConfig, VisionConfig
from unilip.method.qwen2 import Layers


class Attention(nn.Module):
    """Multi-head self attention over all tokens, both ways."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.heads = v.num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(v.hidden_size, v.hidden_size) for _ in range(3))
        self.projection_layer = nn.Linear(v.hidden_size, v.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(M,n,E) -> (M,n,E)."""
        projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in projected)  # M heads n d
        return self.projection_layer(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionLayer(nn.Module):
    """Attention and MLP, each after a norm and scaled channel by channel before it is added."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.attention = Attention(v)
        wide, narrow = nn.Linear(v.hidden_size, v.intermediate_size), nn.Linear(v.intermediate_size, v.hidden_size)
        self.mlp = nn.Sequential(OrderedDict(fc1=wide, act=nn.GELU(), fc2=narrow))
        self.layernorm_before, self.layernorm_after = (nn.LayerNorm(v.hidden_size, eps=v.norm_eps) for _ in range(2))
        scale = torch.full((v.hidden_size,), v.layer_scale_init)
        self.lambda_1, self.lambda_2 = nn.Parameter(scale), nn.Parameter(scale.clone())

    def forward(self, x: Tensor) -> Tensor:
        """(M,n,E) -> (M,n,E)."""
        x = x + self.lambda_1 * self.attention(self.layernorm_before(x))
        return x + self.lambda_2 * self.mlp(self.layernorm_after(x))


class Embeddings(nn.Module):
    """Patches by a strided convolution, a class token, learned positions stretched to the grid at hand."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        stored = (v.image_size // v.patch_size) ** 2
        self.patch_embeddings = nn.ModuleDict({"projection": nn.Conv2d(3, v.hidden_size, v.patch_size, v.patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, v.hidden_size))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + stored, v.hidden_size))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (M,3,H,W) -> tokens (M,1+h'w',E), class token first."""
        patches = self.patch_embeddings["projection"](pixels)  # M E h' w'
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        return tokens + self.positions(*patches.shape[-2:])

    def positions(self, height: int, width: int) -> Tensor:
        """Return positions (1,1+h'w',E): the stored square grid, resized per axis (bicubic) where it differs."""
        cls, grid = self.position_embeddings.split([1, self.position_embeddings.shape[1] - 1], 1)
        side = round(grid.shape[1] ** 0.5)
        if (height, width) == (side, side):
            return self.position_embeddings
        grid = grid.unflatten(1, (side, side)).permute(0, 3, 1, 2)  # 1 E side side
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return torch.cat([cls, grid.flatten(2).transpose(1, 2)], 1)


class VisionTower(nn.Module):
    """InternViT without its final norm, which the released models do not use."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(v)
        self.encoder = nn.ModuleDict({"layer": Layers(VisionLayer(v) for _ in range(v.num_layers))})

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (M,3,H,W) -> patch tokens (M,h'w',E), class token dropped."""
        tokens: Tensor = self.encoder["layer"](self.embeddings(pixels))
        return tokens[:, 1:]


class Encoder(nn.Module):
    """InternViT, 2x2 patches merged into one token, a two-layer projector into the LLM's width."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        v, d = config.vision, config.text.hidden_size
        self.vision_tower = VisionTower(v)
        self.projector = nn.Sequential(
            nn.LayerNorm(4 * v.hidden_size), nn.Linear(4 * v.hidden_size, d), nn.GELU(), nn.Linear(d, d)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features (M,N,D) of normalised pixels (M,3,H,W).

        Raises:
            ImageError: the sides are not multiples of 28 pixels.
        """
        height, width = pixels.shape[-2:]
        if height % TOKEN_PIXELS or width % TOKEN_PIXELS:
            raise ImageError(f"The encoder got {width}x{height} px; both sides must be multiples of {TOKEN_PIXELS}.")
        patches = self.vision_tower(pixels.to(self.vision_tower.embeddings.cls_token.dtype))  # M h'w' E
        return self.projector(merge_patches(patches, 2 * height // TOKEN_PIXELS, 2 * width // TOKEN_PIXELS))


def merge_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """Pixel unshuffle, each 2x2 block of patches to one token: (M, height*width, E) -> (M, height*width/4, 4E).

    Channel order is (row in block, column in block, channel), as in InternVL.
    """
    blocks = patches.unflatten(1, (height // 2, 2, width // 2, 2))  # M h 2 w 2 E
    return blocks.transpose(2, 3).flatten(3).flatten(1, 2)  # M N 4E
