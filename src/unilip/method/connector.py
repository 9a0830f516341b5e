"""Hidden states of prompt *and* queries -> condition of the diffusion transformer (paper, section 3.2).

In:  hidden (B,L,D) with padding mask (B,L); in edits, the positions of the source picture hold the encoder's features.
Out: condition (B,L,C). Attention is bidirectional: the last query changes what the first word becomes.
"""

import torch
from torch import Tensor, nn

from unilip.method.config import UniLIPConfig
from unilip.method.mllm import MLLM
from unilip.method.qwen2 import Layers, RMSNorm, TextLayer, positions, rotation, visible


class Connector(nn.Module):
    """A few Qwen2 layers that look both ways, a norm, and a linear layer into the DiT's caption width."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        self.t = config.text
        self.layers = Layers(TextLayer(self.t) for _ in range(config.connector_layers))
        self.norm = RMSNorm(self.t.hidden_size, self.t.norm_eps)
        self.to_dit = nn.Linear(self.t.hidden_size, config.dit.caption_channels)

    def connect(self, x: Tensor, mask: Tensor) -> Tensor:
        """Run layers and norm: (B,L,D), (B,L) -> (B,L,D)."""
        x = x.to(self.norm.weight.dtype)
        return self.norm(self.layers(x, rotation(positions(mask), self.t), visible(mask, False)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the condition (B,L,C) of hidden states (B,L,D) with padding mask (B,L)."""
        return self.to_dit(self.connect(x, mask))


@torch.no_grad()
def copy_from_llm(connector: Connector, mllm: MLLM) -> None:
    """Start the connector as a copy of the LLM's last layers and final norm (paper, section 4.1)."""
    source = mllm.language_model.model
    for ours, theirs in zip(connector.layers, source.layers[-len(connector.layers) :], strict=True):
        ours.load_state_dict(theirs.state_dict())
    connector.norm.load_state_dict(source.norm.state_dict())
