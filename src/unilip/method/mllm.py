"""Text, image features and learned queries -> hidden states; and text answers with a KV cache (paper, section 3.2).

In:  embeddings (B,T,D) with image slots filled by features (M,N,D), padding mask (B,T).
Out: hidden (B,T+Q,D) after the final norm of the causal Qwen2 decoder, and its mask (B,T+Q).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from unilip.method.config import TextConfig, UniLIPConfig
from unilip.method.qwen2 import KeyValueCache, Layers, RMSNorm, TextLayer, positions, rotation, visible


def fill_slots(x: Tensor, slots: Tensor, features: Tensor) -> Tensor:
    """Put features (M,N,D), in order, where slots (B,T), T <= L, are true in x (B,L,D)."""
    slots = nn.functional.pad(slots, (0, x.shape[1] - slots.shape[1]))
    values = features.reshape(-1, features.shape[-1]).to(x.dtype)
    return x.masked_scatter(slots[..., None].expand_as(x), values)


class Qwen2(nn.Module):
    """Token embeddings, causal layers, final norm."""

    def __init__(self, t: TextConfig) -> None:
        super().__init__()
        self.t = t
        self.embed_tokens = nn.Embedding(t.vocab_size, t.hidden_size)
        self.layers = Layers(TextLayer(t) for _ in range(t.num_layers))
        self.norm = RMSNorm(t.hidden_size, t.norm_eps)

    def forward(self, x: Tensor, mask: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Read x (B,L,D), the last L of the S positions of mask (B,S); a cache holds those before: -> (B,L,D)."""
        new = x.shape[1]
        turns = rotation(positions(mask)[:, -new:], self.t)
        return self.norm(self.layers(x, turns, visible(mask, True, new), cache))


class LanguageModel(nn.Module):
    """Qwen2 with its language head, which may share the token embedding."""

    def __init__(self, t: TextConfig) -> None:
        super().__init__()
        self.model = Qwen2(t)
        self.lm_head = nn.Linear(t.hidden_size, t.vocab_size, bias=False)
        if t.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight


class MLLM(nn.Module):
    """The multimodal LLM, and the learned queries that ask it for a picture."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        self.language_model = LanguageModel(config.text)
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, config.text.hidden_size))

    def embed(self, ids: Tensor, slots: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return embeddings (B,T,D) of token ids (B,T), slots (B,T) filled with features (M,N,D)."""
        x: Tensor = self.language_model.model.embed_tokens(ids)
        return x if features is None or slots is None else fill_slots(x, slots, features)

    def append_queries(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the queries behind prompts: (B,T,D), (B,T) -> (B,T+Q,D), (B,T+Q)."""
        queries = self.queries.to(x.dtype).expand(len(x), -1, -1)
        return torch.cat([x, queries], 1), torch.cat([mask, mask.new_ones(queries.shape[:2])], 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states (B,L,D) of embeddings (B,L,D) with padding mask (B,L)."""
        return self.language_model.model(x, mask)

    def read_with_queries(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Read prompts (B,T,D) with mask (B,T), then the queries: hidden states (B,T+Q,D) and their mask."""
        x, mask = self.append_queries(x, mask)
        return self(x, mask), mask

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits (...,V), float32, of hidden states (...,D)."""
        logits: Tensor = self.language_model.lm_head(hidden)
        return logits.float()

    @torch.no_grad()
    def answer(
        self, x: Tensor, mask: Tensor, *, end_id: int, max_new_tokens: int, temperature: float = 0.0,
        top_p: float = 1.0, generator: torch.Generator | None = None, adjust: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Continue left-padded embeddings (B,T,D), mask (B,T), as text: yield ids (B,) until every row has ended.

        Greedy at temperature 0, else nucleus sampling, of what `adjust` makes of logits (B,V). Ended rows yield
        `end_id`; logits that are no numbers end by -1.
        """
        cache, ended = KeyValueCache(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(max_new_tokens):
            logits = adjust(self.logits(self.language_model.model(x, mask, cache)[:, -1]))
            broken = ~logits.isfinite().all(-1)
            ids = next_token(logits.masked_fill(broken[:, None], 0), temperature, top_p, generator)
            ids = ids.masked_fill(broken, -1).masked_fill(ended, end_id)
            ended |= (ids == end_id) | broken
            yield ids
            if bool(ended.all()):
                return
            x, mask = self.embed(ids[:, None].clamp(min=0)), torch.cat([mask, mask.new_ones(len(mask), 1)], 1)


def next_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Choose an id for each row of logits (B,V): the likeliest at temperature 0, else from the top `top_p` of them."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.max(-1, keepdim=True).values  # so that a tiny temperature gives -inf, not NaN
    scaled = (logits / max(temperature, torch.finfo(logits.dtype).tiny)).nan_to_num(0.0)
    probabilities = scaled.softmax(-1).to(generator.device if generator is not None else "cpu")
    ordered, ids = probabilities.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # the first token always stays
    choice = torch.multinomial(ordered, 1, generator=generator)
    return ids.to(choice.device).gather(-1, choice)[:, 0].to(logits.device)
