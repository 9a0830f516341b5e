"""Noisy latent, timestep and condition -> velocity: the SANA diffusion transformer.

In:  latent (B,Z,h,w), integer timestep (B,), condition (B,L,C) with mask (B,L).
Out: velocity (B,Z,h,w).
What does not depend on the latent is computed apart, once for a whole picture: keys and values of the cross attention
by `prepare`, shifts, scales and gates of all timesteps by `modulate`. `step` does the rest, on tokens (B,n,W)
throughout: a 1x1 convolution is a matrix product there, and the depthwise one reads them as a picture without a copy.
W is the width, n = h w the number of tokens, S a number of timesteps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from torch import Tensor, nn

from unilip.config import UniLIPConfig
from unilip.packing import packing, product


@dataclass(frozen=True)
class PreparedCondition:
    """Keys and values of each block's cross attention, (B,heads,L,head_dim) each, and their mask (B,1,1,L)."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def select(self, rows: Tensor) -> PreparedCondition:
        """Take rows by index (R,), with repetition: one condition may serve several noises."""
        return self.map(lambda tensor: tensor.index_select(0, rows))

    def map(self, change: Callable[[Tensor], Tensor]) -> PreparedCondition:
        """Return the same with every tensor changed."""
        return PreparedCondition(
            tuple((change(key), change(value)) for key, value in self.keys_values), change(self.mask)
        )

    def part(self, rows: slice) -> PreparedCondition:
        """Take a range of rows, without a copy."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> PreparedCondition:
        """Move every tensor."""
        return self.map(lambda tensor: tensor.to(device))

    def clone(self) -> PreparedCondition:
        """Copy every tensor."""
        return self.map(Tensor.clone)

    def copy_(self, other: PreparedCondition) -> None:
        """Overwrite every tensor by that of a condition of the same shape."""
        for ours, theirs in zip(self.keys_values, other.keys_values, strict=True):
            ours[0].copy_(theirs[0])
            ours[1].copy_(theirs[1])
        self.mask.copy_(other.mask)

    def padded(self, length: int) -> PreparedCondition:
        """Return it with L grown to `length` by positions in front that nobody attends to."""
        more = length - self.mask.shape[-1]
        if more <= 0:
            return self
        return PreparedCondition(
            tuple((F.pad(key, (0, 0, more, 0)), F.pad(value, (0, 0, more, 0))) for key, value in self.keys_values),
            F.pad(self.mask, (more, 0)),
        )


def stack(conditions: Sequence[PreparedCondition]) -> PreparedCondition:
    """Put the rows of several conditions below each other, padding the shorter ones."""
    length = max(c.mask.shape[-1] for c in conditions)
    grown = [c.padded(length) for c in conditions]
    blocks = zip(*(c.keys_values for c in grown), strict=True)
    return PreparedCondition(
        tuple((torch.cat([key for key, _ in block]), torch.cat([value for _, value in block])) for block in blocks),
        torch.cat([c.mask for c in grown]),
    )


class DiT(nn.Module):
    """`SanaTransformer2DModel`, which holds the weights, with the parts that do not change over the steps split off."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        d = config.dit
        self.transformer = SanaTransformer2DModel(
            in_channels=d.latent_channels,
            out_channels=d.latent_channels,
            num_attention_heads=d.num_heads,
            attention_head_dim=d.head_dim,
            num_layers=d.num_layers,
            num_cross_attention_heads=d.num_cross_heads,
            cross_attention_head_dim=d.cross_head_dim,
            cross_attention_dim=d.hidden_size,
            caption_channels=d.caption_channels,
            mlp_ratio=d.mlp_ratio,
            sample_size=d.sample_size,
            interpolation_scale=d.interpolation_scale,
        )
        for block in self.transformer.transformer_blocks:
            block.__class__ = Block
        self.checkpointing: dict[str, Any] | None = None  # in training: what torch.utils.checkpoint is told

    def prepare(self, condition: Tensor, mask: Tensor) -> PreparedCondition:
        """Project a condition (B,L,C) with mask (B,L) to the keys and values of every block."""
        net = self.transformer
        captions = net.caption_norm(net.caption_projection(condition))  # B L W
        b, length, _ = captions.shape
        keys_values = []
        for block in net.transformer_blocks:
            attn = block.attn2
            key, value = (
                linear(captions).view(b, length, attn.heads, -1).transpose(1, 2) for linear in (attn.to_k, attn.to_v)
            )
            keys_values.append((key, value))
        return PreparedCondition(tuple(keys_values), mask.bool()[:, None, None, :])

    def modulate(self, timesteps: Tensor) -> Tensor:
        """Return the modulations (S,8,W) of integer timesteps (S,) in [0, 1000]; `step` takes one, or B.

        Six belong to the blocks, each of which adds its own table to them; the last two, shift and scale, to the end.
        """
        net = self.transformer
        shared, embedded = net.time_embed(timesteps, hidden_dtype=net.patch_embed.proj.weight.dtype)  # S 6W, S W
        return torch.cat([shared.unflatten(1, (6, -1)), net.scale_shift_table + embedded[:, None]], 1)

    @contextlib.contextmanager
    def with_packed_weights(self, rows: int, calls: int) -> Iterator[None]:
        """Inside, on a CPU, multiply by packed weights: where steps have `rows` tokens, and there are `calls` of them.

        Takes as much memory again as the blocks' weights. Only calls without gradients use it.
        """
        layers = (
            layer
            for block in self.transformer.transformer_blocks
            for layer in (
                block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.attn1.to_out[0],
                block.attn2.to_q, block.attn2.to_out[0], block.ff.conv_inverted, block.ff.conv_point,
            )
        )  # fmt: skip
        with packing(layers, rows, calls):
            yield

    def step(self, latent: Tensor, modulation: Tensor, condition: PreparedCondition) -> Tensor:
        """Return the velocity (B,Z,h,w) of latents (B,Z,h,w) under a modulation (1 or B,8,W)."""
        hidden, last = self.first_block(latent, modulation, condition), len(condition.keys_values)
        hidden = self.run_blocks(hidden, modulation, condition, 1, last, latent.shape[-2:])
        return self.finish(hidden, modulation, latent.shape[-2:])

    def first_block(self, latent: Tensor, modulation: Tensor, condition: PreparedCondition) -> Tensor:
        """Return the tokens (B,n,W) of latents (B,Z,h,w) after the first block."""
        hidden = self.transformer.patch_embed(latent)  # B n W
        return self.run_blocks(hidden, modulation, condition, 0, 1, latent.shape[-2:])

    def run_blocks(
        self, hidden: Tensor, modulation: Tensor, condition: PreparedCondition, start: int, stop: int, size: torch.Size
    ) -> Tensor:
        """Run blocks `start` to `stop` on tokens (B,n,W) of a grid of `size` (h,w)."""
        for i in range(start, stop):
            key, value = condition.keys_values[i]
            block, inputs = self.transformer.transformer_blocks[i], (hidden, modulation[:, :6], key, value)
            if self.checkpointing is not None and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(block, *inputs, condition.mask, size, **self.checkpointing)
            else:
                hidden = block(*inputs, condition.mask, size)
        return hidden

    def finish(self, hidden: Tensor, modulation: Tensor, size: torch.Size) -> Tensor:
        """Return the velocity (B,Z,h,w) of the last block's tokens (B,n,W)."""
        net = self.transformer
        hidden = net.proj_out(modulated_norm(net.norm_out.norm, hidden, modulation[:, -2:]))  # B n Z
        return hidden.transpose(1, 2).reshape(len(hidden), -1, *size)  # B Z h w

    def forward(
        self, latent: Tensor, timestep: Tensor | None, condition: PreparedCondition, modulation: Tensor | None = None
    ) -> Tensor:
        """Return the velocity (B,Z,h,w) of latents (B,Z,h,w) at integer timesteps (B,) in [0, 1000].

        In place of timesteps, what `modulate` returned for them, or for the one of all rows, may be given.
        """
        if modulation is None:
            assert timestep is not None
            modulation = self.modulate(timestep)
        return self.step(latent, modulation, condition)


# --- one block, on tokens (B,n,W) -----------------------------------------------------------------------------------


class Block(SanaTransformerBlock):
    """A block of the transformer with another way through its weights, for ready keys, values and modulations."""

    def forward(
        self, hidden: Tensor, modulation: Tensor, key: Tensor, value: Tensor, mask: Tensor, size: torch.Size
    ) -> Tensor:
        """Linear self attention, cross attention, gated convolutional feed-forward: (B,n,W) -> (B,n,W).

        The modulation (1 or B,6,W) of a timestep has shift, scale and gate of the attention, then of the feed-forward.
        """
        own = self.scale_shift_table + modulation
        attended = linear_attention(self.attn1, modulated_norm(self.norm1, hidden, own[:, 0:2]))
        hidden = torch.addcmul(hidden, own[:, 2:3], attended)
        hidden = hidden + cross_attention(self.attn2, hidden, key, value, mask)
        mixed = feed_forward(self.ff, modulated_norm(self.norm2, hidden, own[:, 3:5]), size)
        return torch.addcmul(hidden, own[:, 5:6], mixed)


def modulated_norm(norm: nn.LayerNorm, hidden: Tensor, modulation: Tensor) -> Tensor:
    """Normalise (B,n,W), then shift it by the first, scale it by 1 + the second of (1 or B,2,W)."""
    shift, scale = modulation[:, 0:1], 1 + modulation[:, 1:2]
    if len(modulation) == 1:  # of all rows: the normalisation's own weight and bias
        return F.layer_norm(hidden, norm.normalized_shape, scale.flatten(), shift.flatten(), norm.eps)
    return torch.addcmul(shift, norm(hidden), scale).to(hidden.dtype)


def linear_attention(attn: Attention, hidden: Tensor) -> Tensor:
    """ReLU attention in time linear in n, its sums in float32: (B,n,W) -> (B,n,W)."""
    b, n, _ = hidden.shape
    query, key, value = (
        product(linear, hidden).view(b, n, attn.heads, -1).transpose(1, 2).float()
        for linear in (attn.to_q, attn.to_k, attn.to_v)
    )  # B heads n d
    query, key = query.relu(), key.relu()
    summed = key.transpose(2, 3) @ value  # B heads d d
    weight = query @ key.sum(2).unsqueeze(-1)  # B heads n 1
    out = (query @ summed / (weight + 1e-15)).transpose(1, 2).reshape(b, n, -1).to(hidden.dtype)
    out = product(attn.to_out[0], out)
    return out.clip(-65504, 65504) if out.dtype == torch.float16 else out


def cross_attention(attn: Attention, hidden: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend from tokens (KB,n,W) to keys and values (B,heads,L,d) under a mask (B,1,1,L).

    K rows that follow each other share keys and values.
    """
    b, n, _ = hidden.shape
    query = product(attn.to_q, hidden).view(len(key), -1, attn.heads, key.shape[-1]).transpose(1, 2)  # B heads Kn d
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return product(attn.to_out[0], out.transpose(1, 2).reshape(b, n, -1))


def feed_forward(ff: Any, hidden: Tensor, size: torch.Size) -> Tensor:
    """Widen, mix the 3x3 neighbours of each channel, gate, narrow: (B,n,W) -> (B,n,W)."""
    fresh = not torch.is_grad_enabled()
    wide = F.silu(pointwise(ff.conv_inverted, hidden, size), inplace=fresh)  # B n 2M
    mixed = ff.conv_depth(wide.unflatten(1, size).permute(0, 3, 1, 2))  # B 2M h w, channels last
    value, gate = mixed.permute(0, 2, 3, 1).flatten(1, 2).chunk(2, -1)  # B n M each
    gated = value.mul_(F.silu(gate, inplace=True)) if fresh else F.silu(gate) * value
    return pointwise(ff.conv_point, gated, size)


def pointwise(layer: nn.Module, hidden: Tensor, size: torch.Size) -> Tensor:
    """Apply a 1x1 convolution, a linear layer in its place, or what wraps either, to tokens (B,n,W)."""
    if type(layer) is nn.Conv2d or isinstance(layer, nn.Linear):
        return product(layer, hidden)
    return layer(hidden.unflatten(1, size).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
