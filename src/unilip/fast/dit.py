"""The diffusion transformer over many steps: what does not depend on the latent is computed once for a whole picture.

In:  a `method.dit.Transformer`, conditions (B,L,C) with masks (B,L), timesteps (S,). Out: keys and values of the cross
attention by `prepare`; the velocity by `step`, equal to the plain forward. R rows, n = h w tokens of width W, as there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.fast.products import Multiply, plain
from unilip.method.dit import Attention, Block, FeedForward, Size, Transformer, relu_attention


@dataclass(frozen=True)
class PreparedCondition:
    """Keys and values of each block's cross attention, (B,heads,L,d) each, and which are valid (B,1,1,L)."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> PreparedCondition:
        """Return the same with every tensor changed."""
        return PreparedCondition(tuple((change(k), change(v)) for k, v in self.keys_values), change(self.mask))

    def __getitem__(self, rows: slice | Tensor) -> PreparedCondition:
        """Take a range of rows, without a copy; or rows by index (R,), with repetition, to serve several noises."""
        return self.map(lambda tensor: tensor[rows])

    def copy_(self, other: PreparedCondition) -> None:
        """Overwrite every tensor by that of a condition of the same shape."""
        for ours, theirs in zip(self.keys_values, other.keys_values, strict=True):
            ours[0].copy_(theirs[0])
            ours[1].copy_(theirs[1])
        self.mask.copy_(other.mask)

    def padded(self, length: int) -> PreparedCondition:
        """Left-pad L to `length`; the padding is masked."""
        more = length - self.mask.shape[-1]
        if more <= 0:
            return self
        grown = tuple((F.pad(k, (0, 0, more, 0)), F.pad(v, (0, 0, more, 0))) for k, v in self.keys_values)
        return PreparedCondition(grown, F.pad(self.mask, (more, 0)))


def blocks(net: Transformer) -> list[Block]:
    """Return the transformer's blocks."""
    return [cast(Block, block) for block in net.transformer_blocks]


def prepare(net: Transformer, condition: Tensor, mask: Tensor) -> PreparedCondition:
    """Project a condition (B,L,C) with mask (B,L) to the keys and values of every block."""
    captions = net.captions(condition)  # B L W
    keys_values = tuple(block.attn2.keys_values(captions) for block in blocks(net))
    return PreparedCondition(keys_values, mask.bool()[:, None, None, :])


def step(
    net: Transformer, latent: Tensor, modulation: Tensor, condition: PreparedCondition, multiply: Multiply = plain
) -> Tensor:
    """Return the velocity (R,Z,h,w) of latents (R,Z,h,w) under a modulation (1 or R,8,W)."""
    size = (latent.shape[2], latent.shape[3])
    x = net.tokens(latent).contiguous()  # else transposed in all blocks, which bfloat16 pays for
    for block, (k, v) in zip(blocks(net), condition.keys_values, strict=True):
        x = run_block(block, x, modulation[:, :6], k, v, condition.mask, size, multiply)
    return net.proj_out(modulated_norm(x, modulation[:, 6:])).transpose(1, 2).unflatten(2, size)


def packable(net: Transformer) -> Iterator[nn.Module]:
    """Yield the linear layers that `step` applies to tokens."""
    for block in blocks(net):
        yield from (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0])
        yield from (block.attn2.to_q, block.attn2.to_out[0], block.ff.conv_inverted, block.ff.conv_point)


def run_block(
    block: Block, x: Tensor, modulation: Tensor, k: Tensor, v: Tensor, seen: Tensor, size: Size, multiply: Multiply
) -> Tensor:
    """Do what `Block.forward` does with ready keys and values: (R,n,W) -> (R,n,W)."""
    own = block.scale_shift_table + modulation  # 1|R 6 W
    x = torch.addcmul(x, own[:, 2:3], self_attention(block, modulated_norm(x, own[:, 0:2]), multiply))
    x = x + cross_attention(block.attn2, x, k, v, seen, multiply)
    return torch.addcmul(x, own[:, 5:6], feed_forward(block.ff, modulated_norm(x, own[:, 3:5]), size, multiply))


def modulated_norm(x: Tensor, modulation: Tensor) -> Tensor:
    """Normalise (R,n,W), then shift it by the first, scale it by 1 + the second of (1 or R,2,W)."""
    shift, scale = modulation[:, 0:1], 1 + modulation[:, 1:2]
    if len(modulation) == 1:  # of all rows: the normalisation's own weight and bias
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), 1e-6)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), scale).to(x.dtype)


def self_attention(block: Block, x: Tensor, multiply: Multiply) -> Tensor:
    """Attention among tokens: `Attention.linear`, or of `plain_blocks` by softmax: (R,n,W) -> (R,n,W)."""
    attn = block.attn1
    q, k, v = (attn.split(multiply(project, x)) for project in (attn.to_q, attn.to_k, attn.to_v))
    out = F.scaled_dot_product_attention(q, k, v) if block.plain else relu_attention(q, k, v)
    joined = multiply(attn.to_out[0], out.transpose(1, 2).flatten(2).to(x.dtype))
    return joined.clip(-65504, 65504) if joined.dtype == torch.float16 and not block.plain else joined


def cross_attention(attn: Attention, x: Tensor, k: Tensor, v: Tensor, seen: Tensor, multiply: Multiply) -> Tensor:
    """`Attention.cross`: (R,n,W) -> (R,n,W)."""
    q = attn.split(multiply(attn.to_q, x).reshape(len(k), -1, x.shape[-1]))  # B heads Kn d
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return multiply(attn.to_out[0], out.transpose(1, 2).reshape(x.shape))


def feed_forward(ff: FeedForward, x: Tensor, size: Size, multiply: Multiply) -> Tensor:
    """`FeedForward.forward`, in place where nothing is differentiated: (R,n,W) -> (R,n,W)."""
    fresh = not torch.is_grad_enabled()
    wide = multiply(ff.conv_inverted, x)
    if ff.conv_depth is not None:
        grid = F.silu(wide, inplace=fresh).unflatten(1, size).permute(0, 3, 1, 2)  # channels last
        wide = ff.conv_depth(grid).permute(0, 2, 3, 1).flatten(1, 2)
    value, gate = wide.chunk(2, -1)  # R n M each
    gated = value.mul_(F.silu(gate, inplace=True)) if fresh else value * F.silu(gate)
    return multiply(ff.conv_point, gated)
