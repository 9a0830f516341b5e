"""The pixel decoder with less work and memory: one picture at a time, in strips, with folded upsampling, in place.

Latents (M,Z,h,w) -> pixels (M,3,32h,32w), equal to the plain decoder's. The last stages are local: a strip gets as many
more rows as its outputs depend on, which are cut off again, so only what is held at once is less.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.method.decoder import ChannelNorm, DCDecoder, ResBlock, Upsample
from unilip.method.qwen2 import Layers


def decode(decoder: DCDecoder, latent: Tensor, strips: int = 1) -> Tensor:
    """Decode (M,Z,h,w) -> (M,3,32h,32w); with several strips one picture after the other, else all at once."""
    latent = latent.to(decoder.conv_in.weight.dtype)
    if strips == 1 and not can_spare(latent):
        if latent.device.type == "cpu" and latent.dtype != torch.float32:  # as oneDNN wants it: nothing is reordered
            latent = latent.contiguous(memory_format=torch.channels_last)
        pixels: Tensor = decoder(latent)
        return pixels
    pieces = latent.split(1) if strips > 1 else (latent,)
    decoded = [decode_in_strips(decoder, piece, strips) for piece in pieces]
    return decoded[0] if len(decoded) == 1 else torch.cat(decoded)


def decode_in_strips(decoder: DCDecoder, latent: Tensor, strips: int) -> Tensor:
    """Decode (M,Z,h,w) -> (M,3,32h,32w) with the stages after the last attention done in horizontal strips."""
    stages = [list(cast(Layers, stage)) for stage in reversed(decoder.up_blocks)]
    is_local = [all(isinstance(layer, (ResBlock, Upsample)) for layer in stage) for stage in stages]
    first = len(stages) - next((i for i, local in enumerate(reversed(is_local)) if not local), len(stages))
    hidden = decoder.conv_in(latent) + latent.repeat_interleave(decoder.copies, 1)
    for stage in stages[:first]:
        for layer in stage:
            hidden = run_layer(layer, hidden)  # M c r s
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
            strip = torch.addcmul(shift, strip, weight, out=strip).relu_()
        else:
            strip = decoder.norm_out(strip).relu()
        strip = local[-1](strip)
        out.append(strip[:, :, (top - start) * scale : (min(top + size, rows) - start) * scale].contiguous())
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def can_spare(hidden: Tensor) -> bool:
    """Whether the shorter ways below apply: on a CPU, in float32, where nothing is differentiated or compiled."""
    busy = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not busy and hidden.device.type == "cpu" and hidden.dtype == torch.float32


def run_layer(layer: nn.Module, hidden: Tensor) -> Tensor:
    """Run a layer of the decoder as it is, or where `can_spare` says so, the same with less work and memory."""
    if can_spare(hidden):
        if isinstance(layer, Upsample) and layer.repeat and type(layer.conv) is nn.Conv2d:  # no adapter around it
            return upsample(layer, hidden)
        if isinstance(layer, ResBlock):
            return residual(layer, hidden)
    result: Tensor = layer(hidden)
    return result


def upsample(layer: Upsample, x: Tensor) -> Tensor:
    """Repeat every pixel 2x2, convolve by 3x3, add the shortcut: (M,c,r,s) -> (M,out,2r,2s), repeating nothing.

    Three taps fall on two repeated pixels, so each of four outputs is a 2x2 convolution: 16 products in place of 36.
    """
    m, _, r, s = x.shape
    weight, bias = layer.conv.weight, layer.conv.bias
    last = x.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        m, len(weight), 2 * r, 2 * s, dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )  # fmt: skip
    for top in (0, 1):
        for left in (0, 1):
            taps = fold(fold(weight, top, 2), left, 3)  # out c 2 2
            part = F.conv2d(x, taps, bias, padding=1)[:, :, top : top + r, left : left + s]
            if layer.copies:
                part += x if layer.copies == 4 else x.repeat_interleave(layer.copies, 1)[:, 2 * top + left :: 4]
            out[:, :, top::2, left::2] = part
    return out


def fold(weight: Tensor, second: int, dim: int) -> Tensor:
    """Sum the two of three taps along DIM that fall on one pixel: the last two for its first output, else the first."""
    a, b, c = weight.split(1, dim)
    return torch.cat([a + b, c] if second else [a, b + c], dim)


def residual(block: ResBlock, x: Tensor) -> Tensor:
    """`ResBlock.forward`, in place where that is ours: (M,c,r,s) -> (M,c,r,s)."""
    hidden = unit(block.norm, block.conv2(F.silu(block.conv1(x), inplace=True)))
    hidden = torch.addcmul(x, hidden, block.norm.weight[:, None, None], out=hidden)
    return hidden.add_(block.norm.bias[:, None, None])


def unit(norm: ChannelNorm, hidden: Tensor) -> Tensor:
    """Divide in place by the root mean square over channels (M,c,r,s)."""
    scale = torch.linalg.vector_norm(hidden, dim=1, keepdim=True).square_().div_(hidden.shape[1]).add_(norm.eps)
    return hidden.mul_(scale.rsqrt_())


def margin(layers: list[nn.Module]) -> tuple[int, int]:
    """Return how many rows around its own a row of local layers depends on, and how many rows one becomes."""
    rows, scale = 0, 1
    for layer in reversed(layers):
        if isinstance(layer, Upsample):  # its 3x3 convolution comes after repeating, or before shuffling
            rows = -(-(rows + 1) // 2) if layer.repeat else -(-rows // 2) + 1
            scale *= 2
        else:
            rows += 2 if isinstance(layer, ResBlock) else 1
    return rows, scale
