"""The pixel decoder with less work and memory: layers written over their input, some rows at a time, folded upsampling.

Equal to the plain decoder up to rounding. No row is computed twice: what a 3x3 convolution needs of the rows above was
kept, and of those below is not overwritten yet.
"""

from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.method.decoder import ChannelNorm, DCDecoder, ResBlock, Upsample
from unilip.method.qwen2 import Layers

PIECE = 2**24  # bytes of rows at once: glibc gives memory of that size again without asking the system for fresh pages


def decode(decoder: DCDecoder, latent: Tensor, strips: int = 1) -> Tensor:
    """Decode (M,Z,h,w) -> (M,3,32h,32w); with several strips one picture after the other, else all at once.

    On a CPU, and elsewhere with strips, where nothing is differentiated or compiled; else the plain way.
    """
    latent = latent.to(decoder.conv_in.weight.dtype)
    is_busy = torch.is_grad_enabled() or torch.compiler.is_compiling()
    if is_busy or (strips == 1 and latent.device.type != "cpu"):
        return decoder(latent)
    return torch.cat([run(decoder, piece, strips) for piece in (latent.split(1) if strips > 1 else (latent,))])


def run(decoder: DCDecoder, latent: Tensor, strips: int) -> Tensor:
    """Decode (M,Z,h,w) -> (M,3,32h,32w), the rows of what works on neighbours alone in at least so many strips."""
    latent = latent.contiguous(memory_format=torch.channels_last)  # as oneDNN wants it: nothing is reordered
    x = decoder.conv_in(latent) + latent.repeat_interleave(decoder.copies, 1)
    for stage in reversed(decoder.up_blocks):
        for layer in cast(Layers, stage):
            if isinstance(layer, Upsample) and layer.repeat and type(layer.conv) is nn.Conv2d:  # no adapter around it
                x = upsample(layer, x, strips)
            elif isinstance(layer, ResBlock) and type(layer.conv1) is type(layer.conv2) is nn.Conv2d:
                x = residual(layer, x, strips)
            else:
                x = layer(x)
    if type(decoder.conv_out) is nn.Conv2d:
        return finish(decoder, x, strips)
    return decoder.conv_out(decoder.norm_out(x).relu())


def upsample(layer: Upsample, x: Tensor, strips: int) -> Tensor:
    """Repeat every pixel 2x2, convolve by 3x3, add the shortcut: (M,c,r,s) -> (M,out,2r,2s), repeating nothing.

    Three taps fall on two repeated pixels, so each of four outputs is a 2x2 convolution: 16 products in place of 36.
    """
    m, _, r, s = x.shape
    weight, bias = layer.conv.weight, layer.conv.bias
    layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    out = torch.empty(m, len(weight), 2 * r, 2 * s, dtype=x.dtype, device=x.device, memory_format=layout)
    folded = {(top, left): fold(fold(weight, top, 2), left, 3) for top in (0, 1) for left in (0, 1)}  # out c 2 2 each
    for start, stop in pieces(out, strips, 2):
        for (top, left), taps in folded.items():
            part = some_rows(x, taps, bias, start, stop, 1 - top)[..., left : left + s]
            if layer.copies:
                part += repeated(x[:, :, start:stop], layer.copies, 2 * top + left)
            out[:, :, 2 * start + top : 2 * stop : 2, left::2] = part
    return out


def repeated(x: Tensor, copies: int, nth: int) -> Tensor:
    """Repeat each channel of (M,c,r,s), and return every fourth from the nth on: a view where that can be."""
    return x[:, nth // copies :: 4 // copies] if 4 % copies == 0 else x.repeat_interleave(copies, 1)[:, nth::4]


def fold(weight: Tensor, second: int, dim: int) -> Tensor:
    """Sum the two of three taps along DIM that fall on one pixel: the last two for its first output, else the first."""
    a, b, c = weight.split(1, dim)
    return torch.cat([a + b, c] if second else [a, b + c], dim)


def residual(block: ResBlock, x: Tensor, strips: int) -> Tensor:
    """`ResBlock.forward`, written over its input: (M,c,r,s) -> (M,c,r,s)."""
    one, two, norm = block.conv1, block.conv2, block.norm
    between, made = x[:, :, :0], 0  # rows of the first convolution's result: the last ones, and how many there were
    for start, stop in pieces(x, strips):
        end = min(stop + 1, x.shape[2])
        rows = [between[:, :, -2:]] if start else []
        if made < end:
            rows.append(F.silu(some_rows(x, one.weight, one.bias, made, end), inplace=True))
        between, made = rows[0] if len(rows) == 1 else torch.cat(rows, 2), end
        first = max(0, start - 1)
        hidden = unit(norm, some_rows(between, two.weight, None, start - first, stop - first))
        x[:, :, start:stop].addcmul_(hidden, norm.weight[:, None, None]).add_(norm.bias[:, None, None])
    return x


def finish(decoder: DCDecoder, x: Tensor, strips: int) -> Tensor:
    """Norm, written over its input, and last convolution: (M,c,r,s) -> (M,3,r,s)."""
    conv, norm, made = cast(nn.Conv2d, decoder.conv_out), decoder.norm_out, 0
    out: list[Tensor] = []
    for start, stop in pieces(x, strips):
        end = min(stop + 1, x.shape[2])
        unit(norm, x[:, :, made:end]).mul_(norm.weight[:, None, None]).add_(norm.bias[:, None, None]).relu_()
        made = end
        out.append(some_rows(x, conv.weight, conv.bias, start, stop))
    return torch.cat(out, 2)


def pieces(x: Tensor, strips: int, scale: int = 1) -> Iterator[tuple[int, int]]:
    """Cut the rows r of (M,c,scale r,s) into so many pieces or more, of PIECE bytes or less; yield starts and ends."""
    rows = x.shape[2] // scale
    size = max(1, min(-(-rows // strips), PIECE * rows // max(1, x.nbytes)))
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def some_rows(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int, above: int = 1) -> Tensor:
    """Return rows of a convolution by 3x3 or 2x2, padded by 1, reading only what they need: row i from i - above on."""
    low, high = start - above, stop - above + weight.shape[2] - 1
    if low >= 0 and high <= x.shape[2]:
        return F.conv2d(x[:, :, low:high], weight, bias, padding=(0, 1))
    low = max(0, low)
    found = F.conv2d(x[:, :, low:high], weight, bias, padding=1)
    first = start - above - low + 1
    return found[:, :, first : first + stop - start]


def unit(norm: ChannelNorm, hidden: Tensor) -> Tensor:
    """Divide in place by the root mean square over channels (M,c,r,s), which is taken in float32."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # mixed types multiply many times as slowly
    scale = torch.linalg.vector_norm(wide, dim=1, keepdim=True).square_().div_(wide.shape[1]).add_(norm.eps).rsqrt_()
    return hidden.copy_(wide.mul_(scale))
