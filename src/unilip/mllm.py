"""Text, image features and learned queries -> hidden states; and text answers with a KV cache (paper, section 3.2).

In:  embeddings (B,T,D) with image slots filled by features (M,N,D), queries appended -> (B,T+Q,D), mask (B,T+Q).
Out: hidden (B,T+Q,D) after the final norm of the causal Qwen2 decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from unilip.config import TextConfig, UniLIPConfig


def qwen2_config(text: TextConfig, **changes: Any) -> Qwen2Config:
    """Translate a `TextConfig` for transformers."""
    values: dict[str, Any] = dict(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        intermediate_size=text.intermediate_size,
        max_position_embeddings=text.max_positions,
        rms_norm_eps=text.norm_eps,
        tie_word_embeddings=text.tie_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        attn_implementation="sdpa",
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen2Config(**(values | changes))


def position_ids(mask: Tensor) -> Tensor:
    """Positions that count valid tokens only, so that padding on either side changes nothing: (B,L) -> (B,L)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def fill_slots(embeddings: Tensor, slots: Tensor, features: Tensor) -> Tensor:
    """Return (B,T,D) with the positions marked in `slots` (B,T) replaced, in order, by features (M,N,D)."""
    values = features.reshape(-1, features.shape[-1]).to(embeddings.dtype)
    return embeddings.masked_scatter(slots.unsqueeze(-1).expand_as(embeddings), values)


class MLLM(nn.Module):
    """Qwen2 decoder with its language head, and the learned queries that ask it for a picture."""

    def __init__(self, config: UniLIPConfig) -> None:
        super().__init__()
        self.language_model = Qwen2ForCausalLM(qwen2_config(config.text))
        self.queries = nn.Parameter(torch.zeros(1, config.num_queries, config.text.hidden_size))

    def embed(self, input_ids: Tensor, image_slots: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """Return token embeddings (B,T,D), image slots filled."""
        embeddings = self.language_model.model.embed_tokens(input_ids)
        if features is None or image_slots is None:
            return embeddings
        return fill_slots(embeddings, image_slots, features)

    def forward(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """Return hidden states (B,L,D) of embeddings (B,L,D) under the causal mask and padding mask (B,L)."""
        output = self.language_model.model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
        )
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Return next-token logits (...,V) of hidden states (...,D)."""
        return self.language_model.lm_head(hidden)

    def append_queries(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Append the learned queries: (B,T,D), (B,T) -> (B,T+Q,D), (B,T+Q)."""
        b = embeddings.shape[0]
        queries = self.queries.to(embeddings.dtype).expand(b, -1, -1)
        return torch.cat([embeddings, queries], 1), torch.cat([mask, mask.new_ones(b, queries.shape[1])], 1)

    def read_with_queries(self, embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Read prompts (B,T,D) with mask (B,T), then the queries: hidden states (B,T+Q,D) and their mask (B,T+Q).

        The decoder is causal and the queries come last. So where nothing before them learns (a frozen language model,
        frozen features), the prompts are read without gradients into a key-value cache, and only the queries' positions
        keep activations: the same numbers and gradients for less time and memory.
        """
        sequence, whole = self.append_queries(embeddings, mask)
        learns = embeddings.requires_grad or any(p.requires_grad for p in self.language_model.parameters())
        if learns or not (torch.is_grad_enabled() and self.queries.requires_grad):
            return self(sequence, whole), whole
        positions = position_ids(whole)
        length, total = mask.shape[1], whole.shape[1]
        causal = torch.ones(total, total, dtype=torch.bool, device=mask.device).tril()
        own = causal.triu()  # padding sees itself, so that no row of the attention is empty
        visible = causal & (whole.bool()[:, None, None, :] | own)  # B 1 T+Q T+Q
        cache = DynamicCache(config=self.language_model.config)
        hidden = []
        for part, grad in ((slice(0, length), False), (slice(length, total), True)):
            with torch.set_grad_enabled(grad):
                output = self.language_model.model(
                    inputs_embeds=sequence[:, part], attention_mask=visible[:, :, part, : part.stop],
                    position_ids=positions[:, part], past_key_values=cache, use_cache=True,
                )  # fmt: skip
            hidden.append(output.last_hidden_state)
        return torch.cat(hidden, 1), whole

    @torch.no_grad()
    def answer(
        self,
        embeddings: Tensor,
        mask: Tensor,
        *,
        end_id: int,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue left-padded embeddings (B,T,D) as text, yielding the next token ids (B,) until every row has ended.

        Greedy at temperature 0, else sampled from the smallest set of tokens with probability `top_p`. A row that has
        ended yields `end_id`.
        """
        cache = DynamicCache(config=self.language_model.config)
        positions = position_ids(mask)
        ended = torch.zeros(embeddings.shape[0], dtype=torch.bool, device=embeddings.device)
        for _ in range(max_new_tokens):
            output = self.language_model.model(
                inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            logits = self.logits(output.last_hidden_state[:, -1]).float()  # B V
            ids = next_token(logits, temperature, top_p, generator).masked_fill(ended, end_id)
            ended |= ids == end_id
            yield ids
            if bool(ended.all()):
                return
            embeddings = self.language_model.model.embed_tokens(ids)[:, None]
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
            positions = positions[:, -1:] + 1


def next_token(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """Choose one id per row of logits (B,V): the largest at temperature 0, else nucleus sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits - logits.max(-1, keepdim=True).values  # so that a tiny temperature gives -inf, not NaN
    probabilities = (logits / temperature).softmax(-1).to(generator.device if generator is not None else "cpu")
    ordered, ids = probabilities.sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)  # the first token always stays
    choice = torch.multinomial(ordered, 1, generator=generator)
    return ids.gather(-1, choice)[:, 0].to(logits.device)
