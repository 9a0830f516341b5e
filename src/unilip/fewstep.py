"""Few-step weights: a second timestep embedder, which tells a diffusion transformer where a jump goes."""

import dataclasses

import torch

from unilip.method.config import UniLIPConfig
from unilip.method.dit import DiT, TimeEmbedder


def few_config(config: UniLIPConfig, steps: tuple[int, ...], guided: bool = True) -> UniLIPConfig:
    """Return the config of a model that draws in so many jumps; GUIDED: its velocity holds what guidance would do."""
    dit, sampling = dataclasses.replace(config.dit, few_steps=steps), config.sampling
    return config.replace(dit=dit, sampling=dataclasses.replace(sampling, guidance_scale=1.0) if guided else sampling)


@torch.no_grad()
def add_embedder(dit: DiT) -> None:
    """Give a transformer its second timestep embedder, always the same: an adapter's base is drawn here, not stored."""
    net = dit.transformer
    fresh, generator = TimeEmbedder(net.d.hidden_size), torch.Generator().manual_seed(0)
    for parameter in fresh.parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.02
        parameter.copy_(drawn if parameter.dim() > 1 else torch.zeros_like(drawn))
    net.time_embed_2 = fresh.to(net.scale_shift_table).train(net.training)
