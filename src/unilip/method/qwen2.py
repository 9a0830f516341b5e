"""Qwen2 layers: causal in the language model, looking both ways in the connector. x (B,L,D) -> (B,L,D).

RMS norm, grouped-query attention with rotary positions, gated MLP. Letters: d width of a head, S positions that are
looked at (those before L in a cache, and L).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.method.config import TextConfig

Rotation = tuple[Tensor, Tensor]  # cos and sin (B,1,L,d)


class Layers(nn.ModuleList):
    """Layers that run one after the other. `around(layer, x, *rest)` calls each; training recomputes through it."""

    around: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor, *rest: Any) -> Tensor:
        """Pass x through all layers, `rest` going to each unchanged."""
        for layer in self:
            x = layer(x, *rest) if self.around is None else self.around(layer, x, *rest)
        return x


class RMSNorm(nn.Module):
    """Divide by the root mean square, computed in float32, and scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """(...,D) -> (...,D)."""
        unit = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return self.weight * unit.to(x.dtype)


class KeyValueCache:
    """Keys and values of what was read, by layer, so that text is continued without reading it again."""

    def __init__(self) -> None:
        self.kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.growing = True

    def extend(self, layer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return all keys and values (B,heads,S,d) of a layer with new ones (B,heads,L,d) behind, kept if growing."""
        if layer in self.kept:
            k, v = (torch.cat(pair, 2) for pair in zip(self.kept[layer], (k, v), strict=True))
        if self.growing:
            self.kept[layer] = k, v
        return k, v


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, t: TextConfig) -> None:
        super().__init__()
        self.width = t.hidden_size // t.num_heads
        self.q_proj = nn.Linear(t.hidden_size, t.hidden_size)
        self.k_proj, self.v_proj = (nn.Linear(t.hidden_size, t.num_kv_heads * self.width) for _ in range(2))
        self.o_proj = nn.Linear(t.hidden_size, t.hidden_size, bias=False)

    def forward(self, x: Tensor, rotation: Rotation, seen: Tensor, cache: KeyValueCache | None) -> Tensor:
        """(B,L,D) -> (B,L,D), where `seen` (B,1,L,S) is true."""
        projected = (project(x) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (y.unflatten(-1, (-1, self.width)).transpose(1, 2) for y in projected)  # B heads L d
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        groups = q.shape[1] // k.shape[1]
        if groups > 1:  # each key and value serves several queries
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, t: TextConfig) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(t.hidden_size, t.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(t.intermediate_size, t.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B,L,D) -> (B,L,D)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    """Attention and MLP, each after a norm and added to what came in."""

    def __init__(self, t: TextConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(t), MLP(t)
        self.input_layernorm, self.post_attention_layernorm = (RMSNorm(t.hidden_size, t.norm_eps) for _ in range(2))

    def forward(self, x: Tensor, rotation: Rotation, seen: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B,L,D) -> (B,L,D)."""
        x = x + self.self_attn(self.input_layernorm(x), rotation, seen, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def positions(mask: Tensor) -> Tensor:
    """Count valid tokens only, so that padding on either side changes nothing: mask (B,L) -> positions (B,L)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def rotation(places: Tensor, t: TextConfig) -> Rotation:
    """Return cos and sin (B,1,L,d), float32, of the angles of positions (B,L)."""
    width = t.hidden_size // t.num_heads
    steps = torch.arange(0, width, 2, dtype=torch.float32, device=places.device) / width
    angles = (places[..., None].float() * t.rope_theta**-steps).repeat(1, 1, 2)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn pairs of channels of x (B,heads,L,d) by their angles."""
    a, b = x.chunk(2, -1)
    return x * turn[0].to(x.dtype) + torch.cat([-b, a], -1) * turn[1].to(x.dtype)


def visible(mask: Tensor, causal: bool, last: int | None = None) -> Tensor:
    """Say who looks at whom: padding mask (B,S) -> bool (B,1,L,S) for the last L positions (all by default).

    Padding looks at itself, so that no row of the attention is empty.
    """
    length = mask.shape[1]
    own = torch.eye(length, dtype=torch.bool, device=mask.device)
    seen = mask.bool()[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        seen = seen & torch.ones_like(own).tril()
    return (seen | own)[:, :, length - (last or length) :]
