"""Features -> latent -> pixels: what makes a CLIP encoder draw what it sees (paper, section 3.1).

In:  features (M,N,D).
Out: latent (M,32,h,w) by the latent head; pixels (M,3,28h,28w) in [-1,1] by the DC-AE decoder, which writes 32 px per
     latent cell and is resized to the 28 px that an image token covers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, ResBlock
from diffusers.models.autoencoders.autoencoder_dc import Decoder as DCDecoder
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn

from unilip.config import DECODER_PIXELS, TOKEN_PIXELS, UniLIPConfig


class ResidualMLP(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to (...,D)."""
        return x + self.mlp(x)


class LatentHead(nn.Module):
    """Features (M,N,D) -> latent (M,Z,h,w): residual blocks, then a narrow two-layer projection."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        width, channels = config.text.hidden_size, config.decoder.latent_channels
        self.blocks = nn.ModuleList(ResidualMLP(width) for _ in range(config.latent_head_blocks))
        self.out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, features: Tensor, height: int | None = None) -> Tensor:
        """Return the latent grid; `height` is its number of rows, and may be left out for a square one."""
        for block in self.blocks:
            features = block(features)
        tokens = self.out(features)  # M N Z
        m, n, z = tokens.shape
        rows = height or round(n**0.5)
        return tokens.transpose(1, 2).reshape(m, z, rows, n // rows)  # M Z h w


class PixelDecoder(nn.Module):
    """The decoder half of DC-AE, followed by the resize from 32 to 28 pixels per cell."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        d = config.decoder
        self.decoder = DCDecoder(
            in_channels=3,
            latent_channels=d.latent_channels,
            attention_head_dim=d.attention_head_dim,
            block_type=d.block_types,
            block_out_channels=d.block_out_channels,
            layers_per_block=d.layers_per_block,
            qkv_multiscales=d.qkv_multiscales,
            norm_type="rms_norm",
            act_fn="silu",
            upsample_block_type=d.upsample_block_type,
        )
        self.checkpointing: dict[str, Any] | None = None  # in training: what torch.utils.checkpoint is told
        self.strips = 1  # pieces that the last, local stages are decoded in
        self.sliced = False  # one picture after the other

    def decode(self, latent: Tensor) -> Tensor:
        """Return the decoder's own resolution: (M,Z,h,w) -> (M,3,32h,32w), about [-1,1]."""
        if self.checkpointing is not None and torch.is_grad_enabled():
            return torch.utils.checkpoint.checkpoint(self.decoder, latent, **self.checkpointing)
        pieces = latent.split(1) if self.sliced and len(latent) > 1 else [latent]
        walked = self.strips > 1 or (can_spare(latent) and not self.decoder._forward_pre_hooks)  # of sharding, say
        decode = (lambda piece: decode_in_strips(self.decoder, piece, self.strips)) if walked else self.decoder
        decoded = [decode(piece) for piece in pieces]
        return decoded[0] if len(decoded) == 1 else torch.cat(decoded)

    def forward(self, latent: Tensor) -> Tensor:
        """Return pixels (M,3,28h,28w), about [-1,1], of latents (M,Z,h,w)."""
        return resize_to_tokens(self.decode(latent))


def resize_to_tokens(pixels: Tensor) -> Tensor:
    """Shrink (M,3,32h,32w) to (M,3,28h,28w): bilinear, no antialiasing, as the released models do."""
    size = [side // DECODER_PIXELS * TOKEN_PIXELS for side in pixels.shape[-2:]]
    return F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False).to(pixels.dtype)


# --- layer by layer, and in strips ----------------------------------------------------------------------------------


def decode_in_strips(decoder: DCDecoder, latent: Tensor, strips: int) -> Tensor:
    """Decode (M,Z,h,w) -> (M,3,32h,32w) with the stages after the last attention done in horizontal strips.

    Those stages are local: an output row depends on a few input rows around its own. Each strip gets that many more,
    and they are cut off again, so the pixels are those of the whole decoder; only what is held at once is less.
    """
    stages = list(reversed(decoder.up_blocks))
    is_local = [all(isinstance(layer, (ResBlock, DCUpBlock2d)) for layer in stage) for stage in stages]
    first = len(stages) - next((i for i, local in enumerate(reversed(is_local)) if not local), len(stages))
    hidden = decoder.conv_in(latent)
    if decoder.in_shortcut:
        hidden = hidden + latent.repeat_interleave(decoder.in_shortcut_repeats, dim=1)
    for stage in stages[:first]:
        for layer in stage:
            hidden = run_layer(layer, hidden)  # M C r c
    if can_spare(hidden):  # large pictures: convolutions need not reorder them
        hidden = hidden.contiguous(memory_format=torch.channels_last)
    local = [*(layer for stage in stages[first:] for layer in stage), decoder.conv_out]
    halo, scale = margin(local)
    rows = hidden.shape[2]
    size = -(-rows // min(strips, rows))
    out: list[Tensor] = []
    for top in range(0, rows, size):
        start, stop = max(0, top - halo), min(rows, top + size + halo)
        strip = hidden[:, :, start:stop]
        for layer in local[:-1]:
            strip = run_layer(layer, strip)
        if can_spare(strip) and local[:-1]:  # else it may be a part of what another strip needs, too
            strip = unit(decoder.norm_out, strip)
            shift, weight = decoder.norm_out.bias[:, None, None], decoder.norm_out.weight[:, None, None]
            strip = torch.addcmul(shift, strip, weight, out=strip)
        else:
            strip = decoder.norm_out(strip.movedim(1, -1)).movedim(-1, 1)
        strip = local[-1](decoder.conv_act(strip))
        out.append(strip[:, :, (top - start) * scale : (min(top + size, rows) - start) * scale].contiguous())
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def can_spare(hidden: Tensor) -> bool:
    """Whether the shorter ways below apply: on a CPU, in float32, where nothing is differentiated or compiled."""
    plain = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not plain and hidden.device.type == "cpu" and hidden.dtype == torch.float32


def run_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Run a layer of the decoder as it is, or where `can_spare` says so, the same with less work and memory."""
    if can_spare(hidden):
        if type(layer) is DCUpBlock2d and layer.interpolate and type(layer.conv) is nn.Conv2d:  # no adapter around it
            return upsample(layer, hidden)
        if type(layer) is ResBlock and layer.norm_type == "rms_norm":
            return residual(layer, hidden)
    result: Tensor = layer(hidden)
    return result


def upsample(layer: DCUpBlock2d, x: Tensor) -> Tensor:
    """Repeat every pixel 2x2, convolve by 3x3, add the shortcut: (M,C,h,w) -> (M,O,2h,2w), without repeating anything.

    Among repeated pixels three taps fall on two, so each of the four outputs of a pixel is a 2x2 convolution of the
    small picture with summed taps: 16 products in place of 36.
    """
    m, _, h, w = x.shape
    weight, bias = layer.conv.weight, layer.conv.bias
    last = x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        m, len(weight), 2 * h, 2 * w, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    for top in (0, 1):
        for left in (0, 1):
            taps = fold(fold(weight, top, 2), left, 3)  # O C 2 2
            part = F.conv2d(x, taps, bias, padding=1)[:, :, top : top + h, left : left + w]
            if layer.shortcut:
                part += x if layer.repeats == 4 else x.repeat_interleave(layer.repeats, 1)[:, 2 * top + left :: 4]
            out[:, :, top::2, left::2] = part
    return out


def fold(weight: Tensor, second: int, dim: int) -> Tensor:
    """Sum the two of three taps along DIM that fall on one pixel: the last two for its first output, else the first."""
    a, b, c = weight.split(1, dim)
    return torch.cat([a + b, c] if second else [a, b + c], dim)


def residual(block: ResBlock, x: Tensor) -> Tensor:
    """Two convolutions, a norm over channels, and the sum with what came in (M,C,h,w), in place where that is ours."""
    hidden = block.conv1(x)
    hidden = F.silu(hidden, inplace=True) if type(block.nonlinearity) is nn.SiLU else block.nonlinearity(hidden)
    hidden = block.conv2(hidden)
    norm = block.norm
    hidden = unit(norm, hidden)
    hidden = torch.addcmul(x, hidden, norm.weight[:, None, None], out=hidden)
    return hidden.add_(norm.bias[:, None, None])


def unit(norm: RMSNorm, hidden: Tensor) -> Tensor:
    """Divide in place by the root mean square over channels (M,C,h,w)."""
    scale = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).square_().div_(hidden.shape[1]).add_(norm.eps)
    return hidden.mul_(scale.rsqrt_())


def margin(layers: list[nn.Module]) -> tuple[int, int]:
    """Return how many rows around its own a row of local layers depends on, and how many rows one becomes."""
    rows, scale = 0, 1
    for layer in reversed(layers):
        if isinstance(layer, DCUpBlock2d):
            rows = (
                -(-(rows + 1) // 2) if layer.interpolate else -(-rows // 2) + 1
            )  # its 3x3 convolution, after or before
            scale *= 2
        else:
            rows += 2 if isinstance(layer, ResBlock) else 1
    return rows, scale
