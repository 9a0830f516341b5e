"""Reading prompts in two passes while only the queries train: the frozen prompt keeps no activations.

The decoder is causal and the queries come last: the prompt is read without gradients into a key-value cache. Numbers
and gradients are those of `MLLM.read_with_queries`, for less time and memory.
"""

import torch
from torch import Tensor

from unilip.method.mllm import MLLM
from unilip.method.qwen2 import KeyValueCache


def read_in_two_passes(mllm: MLLM, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Read prompts (B,T,D) with mask (B,T), then the queries: hidden states (B,T+Q,D) and their mask (B,T+Q)."""
    learns = x.requires_grad or any(p.requires_grad for p in mllm.language_model.parameters())
    if learns or not (torch.is_grad_enabled() and mllm.queries.requires_grad):
        return mllm.read_with_queries(x, mask)
    sequence, whole = mllm.append_queries(x, mask)
    cache, length = KeyValueCache(), mask.shape[1]
    with torch.no_grad():
        prompt = mllm.language_model.model(sequence[:, :length], mask, cache)
    cache.growing = False  # so that a layer may run again in the backward pass
    queries = mllm.language_model.model(sequence[:, length:], whole, cache)
    return torch.cat([prompt, queries], 1), whole
