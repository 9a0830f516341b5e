"""Features -> latent -> pixels: what makes a CLIP encoder draw what it sees (paper, section 3.1).

In:  features (M,N,D).
Out: latent (M,Z,h,w) by the latent head; pixels (M,3,28h,28w) by the decoder of DC-AE, which writes 32 px for each
     latent cell and is resized to the 28 px that an image token covers.
Letters here: c channels, r rows and s columns of a stage (h, w at the coarsest, 32h, 32w at the finest).
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.method.config import DECODER_PIXELS, TOKEN_PIXELS, DecoderConfig, UniLIPConfig
from unilip.method.qwen2 import Layers


class ResidualMLP(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second = nn.Linear(width, width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width, eps=1e-6), first, nn.GELU(), second)

    def forward(self, x: Tensor) -> Tensor:
        """(...,D) -> (...,D)."""
        return x + self.mlp(x)


class LatentHead(nn.Module):
    """Features (M,N,D) -> latent (M,Z,h,w): residual blocks, then a narrow two-layer projection."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        d, z = config.text.hidden_size, config.decoder.latent_channels
        self.blocks = nn.ModuleList(ResidualMLP(d) for _ in range(config.latent_head_blocks))
        self.out = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, z), nn.GELU(), nn.Linear(z, z))

    def forward(self, features: Tensor, height: int | None = None) -> Tensor:
        """Return the latent grid (M,Z,h,w), row by row; `height` is h, and may be left out for a square one."""
        x = features.to(next(self.out.parameters()).dtype)
        for block in self.blocks:
            x = block(x)
        rows = height or round(x.shape[1] ** 0.5)
        return self.out(x).transpose(1, 2).unflatten(2, (rows, -1))


# --- the decoder of DC-AE, on pictures x (M,c,r,s) --------------------------------------------------------------------


class ChannelNorm(nn.Module):
    """RMS norm over channels, with scale and shift."""

    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(M,c,r,s) -> (M,c,r,s)."""
        unit = x * torch.rsqrt(x.float().square().mean(1, keepdim=True) + self.eps)
        return unit.to(x.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a norm, added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(M,c,r,s) -> (M,c,r,s)."""
        return x + self.norm(self.conv2(F.silu(self.conv1(x))))


def surrounding(channels: int, heads: int, size: int) -> nn.Sequential:
    """Return what averages queries, keys and values (M,3c,r,s), with learned weights, over `size` x `size` windows."""
    window = nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels, bias=False)
    mix = nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=False)
    return nn.Sequential(OrderedDict(proj_in=window, proj_out=mix))


class LinearAttention(nn.Module):
    """ReLU attention in time linear in r s, at one or several scales (EfficientViT)."""

    def __init__(self, channels: int, width: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.width = width
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList(surrounding(3 * channels, channels // width, size) for size in scales)
        self.to_out = nn.Linear(channels * (1 + len(scales)), channels, bias=False)
        self.norm_out = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(M,c,r,s) -> (M,c,r,s), sums in float32."""
        m, _, r, s = x.shape
        cells = x.movedim(1, -1).contiguous()
        qkv = torch.cat([self.to_q(cells), self.to_k(cells), self.to_v(cells)], -1).movedim(-1, 1)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], 1).float()
        q, k, v = scales.reshape(m, -1, 3 * self.width, r * s).chunk(3, 2)  # M heads d rs
        q, k = q.relu(), k.relu()
        if r * s > self.width:
            out = (v @ k.transpose(2, 3)) @ q / (k.sum(3)[:, :, None] @ q + 1e-15)
        else:  # the same sums in the cheaper order
            scores = k.transpose(2, 3) @ q
            out = v @ (scores / (scores.sum(2, keepdim=True) + 1e-15))
        out = self.to_out(out.to(x.dtype).reshape(m, -1, r, s).movedim(1, -1).contiguous()).movedim(-1, 1)
        return x + self.norm_out(out)


class GatedConv(nn.Module):
    """Widen, mix the 3x3 neighbours of each channel, gate, narrow, norm; added to what came in."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_inverted = nn.Conv2d(channels, 8 * channels, 1)
        self.conv_depth = nn.Conv2d(8 * channels, 8 * channels, 3, padding=1, groups=8 * channels)
        self.conv_point = nn.Conv2d(4 * channels, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(M,c,r,s) -> (M,c,r,s)."""
        value, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, 1)
        return x + self.norm(self.conv_point(value * F.silu(gate)))


class EfficientViTBlock(nn.Module):
    """Linear attention, then the gated convolution."""

    def __init__(self, channels: int, width: int, scales: tuple[int, ...]) -> None:
        super().__init__()
        self.attn, self.conv_out = LinearAttention(channels, width, scales), GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(M,c,r,s) -> (M,c,r,s)."""
        return self.conv_out(self.attn(x))


class Upsample(nn.Module):
    """Twice as large, by repeated pixels or by pixel shuffle, beside a shortcut without weights."""

    def __init__(self, channels: int, out: int, repeat: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.repeat, self.copies = repeat, 4 * out // channels if shortcut else 0
        self.conv = nn.Conv2d(channels, out if repeat else 4 * out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(M,c,r,s) -> (M,out,2r,2s)."""
        large = self.conv(F.interpolate(x, scale_factor=2)) if self.repeat else F.pixel_shuffle(self.conv(x), 2)
        if self.copies:
            large = large + F.pixel_shuffle(x.repeat_interleave(self.copies, 1), 2)
        return large


class DCDecoder(nn.Module):
    """Six scales from coarse to fine; the stages are stored finest first."""

    def __init__(self, d: DecoderConfig) -> None:
        super().__init__()
        channels, repeat = d.block_out_channels, d.upsample_block_type == "interpolate"
        self.copies = channels[-1] // d.latent_channels
        self.conv_in = nn.Conv2d(d.latent_channels, channels[-1], 3, padding=1)
        stages = []
        for i, (c, count) in enumerate(zip(channels, d.layers_per_block, strict=True)):
            layers: list[nn.Module] = [Upsample(channels[i + 1], c, repeat)] if count and i + 1 < len(channels) else []
            efficient, width = d.block_types[i] == "EfficientViTBlock", d.attention_head_dim
            for _ in range(count):
                layers.append(EfficientViTBlock(c, width, d.qkv_multiscales[i]) if efficient else ResBlock(c))
            stages.append(Layers(layers))
        self.up_blocks = nn.ModuleList(stages)
        finest = channels[0] if d.layers_per_block[0] else channels[1]
        self.norm_out = ChannelNorm(finest)
        last = nn.Conv2d(finest, 3, 3, padding=1) if d.layers_per_block[0] else Upsample(finest, 3, repeat, False)
        self.conv_out: nn.Module = last

    def forward(self, latent: Tensor) -> Tensor:
        """Latent (M,Z,h,w) -> pixels (M,3,32h,32w), about [-1,1]."""
        x = self.conv_in(latent) + latent.repeat_interleave(self.copies, 1)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(F.relu(self.norm_out(x)))


class PixelDecoder(nn.Module):
    """The decoder half of DC-AE, then the resize from 32 to 28 pixels a cell."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        self.decoder = DCDecoder(config.decoder)

    def decode(self, latent: Tensor) -> Tensor:
        """Return the decoder's own resolution: (M,Z,h,w) -> (M,3,32h,32w), about [-1,1]."""
        return self.decoder(latent.to(self.decoder.conv_in.weight.dtype))

    def forward(self, latent: Tensor) -> Tensor:
        """Return pixels (M,3,28h,28w), about [-1,1], of latents (M,Z,h,w)."""
        return resize_to_tokens(self.decode(latent))


def resize_to_tokens(pixels: Tensor) -> Tensor:
    """Shrink (M,3,32h,32w) to (M,3,28h,28w): bilinear, no antialiasing, as the released models do."""
    size = [side // DECODER_PIXELS * TOKEN_PIXELS for side in pixels.shape[-2:]]
    return F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False).to(pixels.dtype)
