"""Noisy latent, timestep and condition -> velocity: the diffusion transformer of SANA (paper, section 3.2).

In:  latent (R,Z,h,w), timestep (R,) in [0, 1000], condition (B,L,C) with padding mask (B,L); R = K B, and K latents
     that follow each other share a condition. Few-step weights: the timestep to jump to, too.
Out: velocity (R,Z,h,w), of a jump the mean velocity on its way.
Letters: W width, n = h w tokens, d width of a head. Tokens (R,n,W) throughout; a 1x1 convolution is a linear layer.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.errors import UniLIPError
from unilip.method.config import DiTConfig, UniLIPConfig
from unilip.method.qwen2 import Layers, RMSNorm

Size = tuple[int, int]  # h, w


def sinusoids(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (...,width/2) of values (...) at frequencies from 1 down to 1/10000."""
    steps = torch.arange(width // 2, device=values.device, dtype=torch.float32) / (width // 2)
    angles = values[..., None].float() * torch.exp(-math.log(10_000) * steps)
    return angles.cos(), angles.sin()


def grid_positions(size: Size, width: int, base: int, scale: float, device: torch.device) -> Tensor:
    """Return sin-cos positions (n,W) of a grid: columns in the first half of the channels, rows in the second."""
    halves = []
    h, w = size
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) / (side / base) / scale for side in size)
    for places in (columns.expand(h, w), rows[:, None].expand(h, w)):
        cos, sin = sinusoids(places.flatten(), width // 2)
        halves += [sin, cos]
    return torch.cat(halves, -1)


class Attention(nn.Module):
    """Projections of one attention; `linear` looks at the tokens themselves, `cross` at the condition, or at those."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def split(self, x: Tensor) -> Tensor:
        """(R,n,W) -> (R,heads,n,d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def linear(self, x: Tensor) -> Tensor:
        """ReLU attention in time linear in n, its sums in float32: (R,n,W) -> (R,n,W)."""
        out = relu_attention(*(self.split(project(x)) for project in (self.to_q, self.to_k, self.to_v)))
        joined: Tensor = self.to_out[0](out.to(x.dtype).transpose(1, 2).flatten(2))
        return joined.clip(-65504, 65504) if joined.dtype == torch.float16 else joined

    def keys_values(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Captions (B,L,W) -> keys and values (B,heads,L,d)."""
        return self.split(self.to_k(captions)), self.split(self.to_v(captions))

    def cross(self, x: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """Softmax attention from tokens (KB,n,W) to keys and values (B,heads,L,d) where seen (B,1,1,L)."""
        q = self.split(self.to_q(x).reshape(len(k), -1, x.shape[-1]))  # B heads Kn d
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.to_out[0](out.transpose(1, 2).reshape(x.shape))


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with ReLU for softmax: (R,heads,n,d) each -> (R,heads,n,d), float32."""
    q, k = q.relu().float(), k.relu().float()
    return q @ (k.transpose(2, 3) @ v.float()) / (q @ k.sum(2)[..., None] + 1e-15)


class FeedForward(nn.Module):
    """Widen, mix the 3x3 neighbours of each channel unless `plain`, gate, narrow."""

    def __init__(self, width: int, ratio: float, plain: bool = False) -> None:
        super().__init__()
        inner = int(ratio * width)
        self.conv_inverted = nn.Linear(width, 2 * inner)
        self.conv_depth = None if plain else nn.Conv2d(2 * inner, 2 * inner, 3, padding=1, groups=2 * inner)
        self.conv_point = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """(R,n,W) -> (R,n,W)."""
        wide = self.conv_inverted(x)
        if self.conv_depth is not None:
            grid = F.silu(wide).unflatten(1, size).permute(0, 3, 1, 2)  # R 2M h w
            wide = self.conv_depth(grid).permute(0, 2, 3, 1).flatten(1, 2)
        value, gate = wide.chunk(2, -1)  # R n M
        return self.conv_point(value * F.silu(gate))


class Block(nn.Module):
    """Self attention, cross attention, feed-forward; the timestep modulates the first and the last."""

    def __init__(self, d: DiTConfig) -> None:
        super().__init__()
        w = d.hidden_size
        self.attn1 = Attention(w, d.num_heads, False)
        self.attn2 = Attention(w, d.num_cross_heads, True)
        self.ff, self.plain = FeedForward(w, d.mlp_ratio, d.plain_blocks), d.plain_blocks
        self.scale_shift_table = nn.Parameter(torch.randn(6, w) / w**0.5)

    def forward(self, x: Tensor, time: Tensor, captions: Tensor, seen: Tensor, size: Size) -> Tensor:
        """Tokens (R,n,W), modulation (R,6,W), captions (B,L,W) where seen (B,1,1,L) -> tokens (R,n,W)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time).chunk(6, 1)
        own, attn = modulated(x, shift1, scale1), self.attn1
        x = x + gate1 * (attn.cross(own, *attn.keys_values(own), None) if self.plain else attn.linear(own))
        x = x + self.attn2.cross(x, *self.attn2.keys_values(captions), seen)
        return x + gate2 * self.ff(modulated(x, shift2, scale2), size)


class TimeEmbedder(nn.ModuleDict):
    """Timesteps (R,) -> their embedding (R,W), and by it the modulation of the blocks (R,6W)."""

    def __init__(self, w: int) -> None:
        embedder = nn.ModuleDict({"linear_1": nn.Linear(256, w), "linear_2": nn.Linear(w, w)})
        super().__init__({"emb": nn.ModuleDict({"timestep_embedder": embedder}), "linear": nn.Linear(w, 6 * w)})

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both in the type of the weights."""
        first, second = cast(nn.ModuleDict, cast(nn.ModuleDict, self["emb"])["timestep_embedder"]).values()
        time: Tensor = second(F.silu(first(torch.cat(sinusoids(timestep, 256), -1).to(dtype))))
        return time, self["linear"](F.silu(time))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift (R,1,W) of a timestep: (R,n,W) -> (R,n,W)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Transformer(nn.Module):
    """SANA, with its weight names."""

    def __init__(self, d: DiTConfig) -> None:
        super().__init__()
        self.d, w = d, d.hidden_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(d.latent_channels, w, 1)})
        self.time_embed = TimeEmbedder(w)
        self.time_embed_2 = TimeEmbedder(w) if d.few_steps else None
        project = {"linear_1": nn.Linear(d.caption_channels, w), "linear_2": nn.Linear(w, w)}
        self.caption_projection = nn.ModuleDict(project)
        self.caption_norm = RMSNorm(w, 1e-5)
        self.transformer_blocks = Layers(Block(d) for _ in range(d.num_layers))
        self.scale_shift_table = nn.Parameter(torch.randn(2, w) / w**0.5)
        self.proj_out = nn.Linear(w, d.latent_channels)

    def tokens(self, latent: Tensor) -> Tensor:
        """Latent (R,Z,h,w) -> tokens (R,n,W)."""
        x = self.patch_embed["proj"](latent.to(self.proj_out.weight.dtype)).flatten(2).transpose(1, 2)
        base, scale, (h, w) = self.d.sample_size, self.d.interpolation_scale, latent.shape[2:]
        return x if scale is None else x + grid_positions((h, w), x.shape[-1], base, scale, x.device).to(x.dtype)

    def modulate(self, timestep: Tensor, target: Tensor | None = None) -> Tensor:
        """Timesteps (R,), and those to jump to -> modulations (R,8,W): six of the blocks, two of the end."""
        time, blocks = self.time_embed(timestep, self.proj_out.weight.dtype)
        if target is not None:
            if self.time_embed_2 is None:
                raise UniLIPError("This transformer has no few-step weights; leave the target of a jump out.")
            span = ((timestep - target) / 1000).to(time.dtype)[:, None]
            there, blocks_there = self.time_embed_2(target, self.proj_out.weight.dtype)
            time, blocks = time + span * there, blocks + span * blocks_there
        return torch.cat([blocks.unflatten(1, (6, -1)), self.scale_shift_table + time[:, None]], 1)

    def captions(self, condition: Tensor) -> Tensor:
        """Condition (B,L,C) -> captions (B,L,W), which every block's cross attention reads."""
        first, second = self.caption_projection["linear_1"], self.caption_projection["linear_2"]
        hidden = second(F.gelu(first(condition.to(self.proj_out.weight.dtype)), approximate="tanh"))
        return self.caption_norm(hidden)

    def forward(
        self, latent: Tensor, timestep: Tensor, condition: Tensor, mask: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return the velocity; see the head of this file."""
        size = (latent.shape[2], latent.shape[3])
        times, seen = self.modulate(timestep, target), mask.bool()[:, None, None, :]
        x = self.transformer_blocks(self.tokens(latent), times[:, :6], self.captions(condition), seen, size)
        velocity: Tensor = self.proj_out(modulated(x, *times[:, 6:].chunk(2, 1)))
        return velocity.transpose(1, 2).unflatten(2, size)


class DiT(nn.Module):
    """The part of the model that denoises; it holds the transformer under the name that checkpoints have."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        self.transformer = Transformer(config.dit)

    def forward(
        self, latent: Tensor, timestep: Tensor, condition: Tensor, mask: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """Return the velocity (R,Z,h,w) of latents (R,Z,h,w) at timesteps (R,) under conditions (B,L,C), mask (B,L)."""
        return self.transformer(latent, timestep, condition, mask, target)

    def modulate(self, timesteps: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return the modulations (S,8,W) of timesteps (S,); a jump to its own start has that of the plain velocity."""
        return self.transformer.modulate(timesteps, targets)
