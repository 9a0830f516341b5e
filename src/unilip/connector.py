"""Hidden states -> condition of the diffusion transformer (paper, section 3.2: the dual condition).

In:  hidden (B,L,D) of the whole prompt *and* the queries, mask (B,L); in edits, hidden at the image's positions is
     first replaced by the encoder's own features.
Out: condition (B,L,C). Attention is bidirectional over valid tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding

from unilip.config import UniLIPConfig
from unilip.mllm import MLLM, fill_slots, position_ids, qwen2_config


def substitute_features(hidden: Tensor, image_slots: Tensor, features: Tensor) -> Tensor:
    """Overwrite hidden (B,L,D) at the image positions (B,T<=L) by the features (M,N,D): edits keep identity by it."""
    b, length = hidden.shape[:2]
    slots = torch.cat([image_slots, image_slots.new_zeros(b, length - image_slots.shape[1])], 1)
    return fill_slots(hidden, slots, features)


def bidirectional_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask (B,1,L,L) that hides padding keys from everyone and nothing else.

    It is four-dimensional and never None, because attention implementations fall back to causal otherwise.
    """
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask == 0, torch.finfo(dtype).min)
    return bias[:, None, None, :].expand(-1, 1, mask.shape[1], -1)


class Connector(nn.Module):
    """A few Qwen2 layers without the causal mask, a norm, and a linear layer into the DiT's caption width."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        text = qwen2_config(config.text, num_hidden_layers=config.connector_layers, layer_types=None)
        text._attn_implementation = "sdpa"
        layers = [Qwen2DecoderLayer(text, i) for i in range(config.connector_layers)]
        for layer in layers:
            layer.self_attn.is_causal = False
        self.layers = nn.ModuleList(layers)
        self.norm = Qwen2RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary = Qwen2RotaryEmbedding(text)
        self.to_dit = nn.Linear(text.hidden_size, config.dit.caption_channels)
        self.checkpointing: dict[str, Any] | None = None  # in training: what torch.utils.checkpoint is told

    def connect(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Run the bidirectional layers and the norm: (B,L,D), (B,L) -> (B,L,D)."""
        positions = position_ids(mask)
        rotary = self.rotary(hidden, positions)
        bias = bidirectional_mask(mask, hidden.dtype)
        for layer in self.layers:
            if self.checkpointing is not None and torch.is_grad_enabled():
                hidden = torch.utils.checkpoint.checkpoint(
                    layer, hidden, bias, positions, position_embeddings=rotary, **self.checkpointing
                )
            else:
                hidden = layer(hidden, attention_mask=bias, position_ids=positions, position_embeddings=rotary)
        return self.norm(hidden)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return the condition (B,L,C) of hidden states (B,L,D) with padding mask (B,L)."""
        return self.to_dit(self.connect(hidden, mask))


@torch.no_grad()
def copy_from_llm(connector: Connector, mllm: MLLM) -> None:
    """Start the connector as a copy of the LLM's last layers and final norm (paper, section 4.1)."""
    source = mllm.language_model.model
    for ours, theirs in zip(connector.layers, source.layers[-len(connector.layers) :], strict=True):
        ours.load_state_dict(theirs.state_dict())
    connector.norm.load_state_dict(source.norm.state_dict())
