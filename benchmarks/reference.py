"""The reference path: the specification done plainly with modules of transformers and diffusers, for comparison.

In:  a model of ours, whose weights are shared, not copied. Out: latents and pictures of prompts, as the released code
makes them: a Python loop over the steps, every module as its library runs it, nothing kept from step to step or from
call to call, prompt and unconditional prompt in one padded batch, the language model with its head and all its hidden
states, one condition for each picture.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from torch import Tensor, nn

from unilip import UniLIP
from unilip.method.connector import bidirectional_mask
from unilip.method.text import Tokens


def plain_transformer(model: UniLIP) -> SanaTransformer2DModel:
    """Build diffusers' own transformer around the weights of ours."""
    d = model.config.dit
    with torch.device("meta"):
        plain = SanaTransformer2DModel(
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
    ours = model.dit.transformer
    plain.load_state_dict(ours.state_dict(), assign=True)
    plain.patch_embed.pos_embed = ours.patch_embed.pos_embed  # computed, so in no state dict
    return plain.eval()


class Reference(nn.Module):
    """Generation and editing, plainly."""

    def __init__(self, model: UniLIP) -> None:
        super().__init__()
        self.model = [model]  # its parts are used, not owned
        self.transformer = plain_transformer(model)

    @torch.no_grad()
    def sample(self, tokens: Tokens, features: Tensor | None, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Return latents (B,Z,h,w) of noise (B,Z,h,w) for prompts (2B,T), the unconditional ones first."""
        model = self.model[0]
        llm, connector = model.mllm.language_model, model.connector
        embeddings = llm.get_input_embeddings()(tokens.input_ids)
        if features is not None:
            embeddings[tokens.image_slots] = features.flatten(0, 1).to(embeddings)
        queries = model.mllm.queries.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        embeddings = torch.cat([embeddings, queries], 1)
        mask = F.pad(tokens.attention_mask, (0, queries.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = llm(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        hidden = output.hidden_states[-1]
        if features is not None:
            slots = F.pad(tokens.image_slots, (0, queries.shape[1]))
            hidden[slots] = features.flatten(0, 1).to(hidden)
        rotary, bias = connector.rotary(hidden, positions), bidirectional_mask(mask, hidden.dtype)
        for layer in connector.layers:
            hidden = layer(hidden, attention_mask=bias, position_ids=positions, position_embeddings=rotary)
        condition = connector.to_dit(connector.norm(hidden))

        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=model.config.sampling.flow_shift,
        )  # fmt: skip
        scheduler.set_timesteps(steps, device=noise.device)
        latents = noise
        for timestep in scheduler.timesteps:
            rows = torch.cat([latents, latents]).to(condition.dtype)
            predicted = self.transformer(
                rows, encoder_hidden_states=condition, encoder_attention_mask=mask,
                timestep=timestep.expand(len(rows)), return_dict=False,
            )[0].float()  # fmt: skip
            without, conditional = predicted.chunk(2)
            latents = scheduler.step(without + guidance * (conditional - without), timestep, latents)[0]
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels (B,3,H,W) in [0,1] of latents (B,Z,h,w)."""
        model = self.model[0]
        mean, factor = model._latent_scale(latents)
        pixels = model.pixel_decoder.decoder((latents / factor + mean).to(model.dtype)).float().clamp(-1, 1)
        size = [side // 32 * 28 for side in pixels.shape[-2:]]
        return (F.interpolate(pixels, size=size, mode="bilinear") + 1) / 2

    def run(
        self, prompts: list[str], images: list[Any] | None, noise: Tensor, steps: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """Return latents and pixels of prompts, or of instructions for as many images; guidance must be above 1."""
        model = self.model[0]
        processor, features = model.processor, None
        assert processor is not None
        if images is None:
            texts = [processor.generate_text(None)] * len(prompts) + [processor.generate_text(p) for p in prompts]
        else:
            texts = [processor.edit_text(None)] * len(prompts) + [processor.edit_text(p) for p in prompts]
            with torch.no_grad():
                features = model.encoder(processor.pixels(images).to(model.device)).repeat(2, 1, 1)
        tokens = processor.tokenize(texts).to(model.device)
        latents = self.sample(tokens, features, noise.to(model.device), steps, guidance)
        return latents, self.decode(latents)
