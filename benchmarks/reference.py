"""The reference path: the specification done plainly with networks of transformers and diffusers, for comparison.

In:  a model of ours, whose weights are shared, not copied. Out: latents and pictures of prompts, as the released code
makes them: a Python loop over the steps, every network as its library runs it, nothing kept from step to step or from
call to call, prompt and unconditional prompt in one padded batch, the language model with its head and all its hidden
states, one condition for each picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel, Qwen2Config, Qwen2ForCausalLM

from unilip import UniLIP
from unilip.method.config import DecoderConfig, DiTConfig, TextConfig, VisionConfig
from unilip.method.text import Tokens
from unilip.pictures import fit_square, load_image, to_pixels


def dressed(library: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Give a network of a library, empty but for what it computes, our very weights; linear layers become 1x1 ones."""
    shapes = {name: value.shape for name, value in library.state_dict().items()}
    values = {name: value.view(shapes[name]) for name, value in weights.items()}
    library.load_state_dict(values, assign=True)
    if hasattr(library, "tie_weights"):
        library.tie_weights()
    return library.eval()


@init_empty_weights()
def library_vision(v: VisionConfig) -> Any:
    """InternVL's vision tower."""
    return InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=v.hidden_size, num_hidden_layers=v.num_layers, num_attention_heads=v.num_heads,
            intermediate_size=v.intermediate_size, image_size=(v.image_size, v.image_size),
            patch_size=(v.patch_size, v.patch_size), layer_scale_init_value=v.layer_scale_init,
            layer_norm_eps=v.norm_eps, attention_bias=True,
        )
    )  # fmt: skip


@init_empty_weights()
def library_language(t: TextConfig, layers: int | None = None) -> Any:
    """Qwen2, with as many layers as said or as the config has."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=t.vocab_size, hidden_size=t.hidden_size, num_hidden_layers=layers or t.num_layers,
            num_attention_heads=t.num_heads, num_key_value_heads=t.num_kv_heads,
            intermediate_size=t.intermediate_size, max_position_embeddings=t.max_positions, rms_norm_eps=t.norm_eps,
            tie_word_embeddings=t.tie_embeddings, rope_parameters={"rope_type": "default", "rope_theta": t.rope_theta},
            use_sliding_window=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip


@init_empty_weights()
def library_dit(d: DiTConfig) -> Any:
    """SANA; the position embedding is on because the scale is an argument of the constructor."""
    return SanaTransformer2DModel(
        in_channels=d.latent_channels, out_channels=d.latent_channels, num_attention_heads=d.num_heads,
        attention_head_dim=d.head_dim, num_layers=d.num_layers, num_cross_attention_heads=d.num_cross_heads,
        cross_attention_head_dim=d.cross_head_dim, cross_attention_dim=d.hidden_size,
        caption_channels=d.caption_channels, mlp_ratio=d.mlp_ratio, sample_size=d.sample_size,
        interpolation_scale=d.interpolation_scale,
    )  # fmt: skip


@init_empty_weights()
def library_decoder(d: DecoderConfig) -> Any:
    """The decoder half of DC-AE."""
    return AutoencoderDC(
        latent_channels=d.latent_channels, attention_head_dim=d.attention_head_dim,
        encoder_block_out_channels=(8,) * 6, encoder_layers_per_block=(1,) * 6, encoder_block_types="ResBlock",
        encoder_qkv_multiscales=((),) * 6, decoder_block_types=d.block_types,
        decoder_block_out_channels=d.block_out_channels, decoder_layers_per_block=d.layers_per_block,
        decoder_qkv_multiscales=d.qkv_multiscales, decoder_norm_types="rms_norm", decoder_act_fns="silu",
        upsample_block_type=d.upsample_block_type,
    ).decoder  # fmt: skip


class Reference(nn.Module):
    """Generation, editing and the condition of training, plainly."""

    def __init__(self, model: UniLIP) -> None:
        super().__init__()
        self.model = [model]  # its weights are used, not owned
        config, language = model.config, model.mllm.language_model
        layers = {n: p for n, p in model.connector.state_dict().items() if not n.startswith("to_dit")}
        layers["embed_tokens.weight"] = language.model.embed_tokens.weight.detach()
        self.language: Any = dressed(library_language(config.text), language.state_dict())
        connector = library_language(config.text, config.connector_layers).model
        self.connector: Any = dressed(connector, layers)
        plain = {n: p for n, p in model.dit.transformer.state_dict().items() if not n.startswith("time_embed_2.")}
        self.transformer: Any = dressed(library_dit(config.dit), plain)  # which knows nothing of few steps
        self.decoder = dressed(library_decoder(config.decoder), model.pixel_decoder.decoder.state_dict())
        if "encoder" in model.parts:
            self.vision = dressed(library_vision(config.vision), model.encoder.vision_tower.state_dict())
        self.to(model.device)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return features (M,N,D) of normalised pixels (M,3,H,W)."""
        model = self.model[0]
        patches = self.vision(pixels.to(model.dtype)).last_hidden_state[:, 1:]
        m, _, e = patches.shape
        rows, columns = (side // model.config.vision.patch_size for side in pixels.shape[-2:])
        blocks = patches.view(m, rows // 2, 2, columns // 2, 2, e).transpose(2, 3)
        features: Tensor = model.encoder.projector(blocks.reshape(m, -1, 4 * e))
        return features

    def condition(self, tokens: Tokens, features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the condition (B,L,C) of prompts (B,T), with the features of pictures to edit, and its mask (B,L)."""
        model = self.model[0]
        embeddings = self.language.get_input_embeddings()(tokens.input_ids).clone()
        if features is not None:
            embeddings[tokens.image_slots] = features.flatten(0, 1).to(embeddings)
        queries = model.mllm.queries.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        embeddings = torch.cat([embeddings, queries], 1)
        mask = F.pad(tokens.attention_mask, (0, queries.shape[1]), value=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        output = self.language(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, output_hidden_states=True
        )
        hidden = output.hidden_states[-1]
        if features is not None:
            hidden = hidden.clone()
            hidden[F.pad(tokens.image_slots, (0, queries.shape[1]))] = features.flatten(0, 1).to(hidden)
        bias = (1 - mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
        bias = bias.expand(-1, 1, mask.shape[1], -1)
        read = self.connector(inputs_embeds=hidden, attention_mask=bias, position_ids=positions, use_cache=False)
        return model.connector.to_dit(read.last_hidden_state), mask

    @torch.no_grad()
    def sample(self, tokens: Tokens, features: Tensor | None, noise: Tensor, steps: int, guidance: float) -> Tensor:
        """Return latents (B,Z,h,w) of noise (B,Z,h,w) for prompts (2B,T), the unconditional ones first."""
        model = self.model[0]
        condition, mask = self.condition(tokens, features)
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
        mean, factor = (
            torch.tensor(value, device=latents.device).reshape(-1, 1, 1)
            for value in (model.config.latent_mean, model.config.latent_factor)
        )
        pixels = self.decoder((latents / factor + mean).to(model.dtype)).float().clamp(-1, 1)
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
            squares = [fit_square(load_image(image), processor.image_size) for image in images]
            features = self.encode(to_pixels(squares).to(model.device)).repeat(2, 1, 1)
        tokens = processor.tokenize(texts).to(model.device)
        latents = self.sample(tokens, features, noise.to(model.device), steps, guidance)
        return latents, self.decode(latents)
