"""Noisy latent, timestep and condition -> velocity: the SANA diffusion transformer.

In:  latent (B,Z,h,w), integer timestep (B,), condition (B,L,C) with mask (B,L).
Out: velocity (B,Z,h,w).
What does not depend on the timestep (caption projection, keys and values of the cross attention) is computed once by
`prepare` and reused by every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import SanaTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from unilip.config import UniLIPConfig


@dataclass(frozen=True)
class PreparedCondition:
    """Keys and values of each block's cross attention, (B,heads,L,head_dim) each, and their mask (B,1,1,L)."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    mask: Tensor

    def select(self, rows: Tensor) -> PreparedCondition:
        """Take rows by index (R,), with repetition: one condition may serve several noises."""
        return PreparedCondition(
            tuple((key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.keys_values),
            self.mask.index_select(0, rows),
        )


class PreparedCrossAttention:
    """Attention processor that takes ready keys and values in place of the encoder's hidden states.

    For K x B rows of hidden states and B rows of keys, K rows in a row share one row of keys.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the attended states (B,n,W)."""
        key, value = encoder_hidden_states
        b, n, _ = hidden_states.shape
        query = attn.to_q(hidden_states).view(len(key), -1, attn.heads, key.shape[-1]).transpose(1, 2)  # B heads Kn d
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        out = out.transpose(1, 2).reshape(b, n, -1)  # BK n W
        return attn.to_out[1](attn.to_out[0](out)) / attn.rescale_output_factor


class DiT(nn.Module):
    """`SanaTransformer2DModel` with the parts that do not change over the steps split off."""

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
            block.attn2.set_processor(PreparedCrossAttention())
        self.gradient_checkpointing = False

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

    def forward(self, latent: Tensor, timestep: Tensor, condition: PreparedCondition) -> Tensor:
        """Return the velocity (B,Z,h,w) of latents (B,Z,h,w) at integer timesteps (B,) in [0, 1000].

        The condition has B rows or a divisor of it: with B/K rows, K latents in a row share one.
        """
        net = self.transformer
        b, _, height, width = latent.shape
        hidden = net.patch_embed(latent)  # B hw W
        modulation, embedded = net.time_embed(timestep, batch_size=b, hidden_dtype=hidden.dtype)
        for block, keys_values in zip(net.transformer_blocks, condition.keys_values, strict=True):
            inputs = (hidden, None, keys_values, condition.mask, modulation, height, width)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)
            else:
                hidden = block(*inputs)
        hidden = net.proj_out(net.norm_out(hidden, embedded, net.scale_shift_table))  # B hw Z
        return hidden.transpose(1, 2).reshape(b, -1, height, width)  # B Z h w
