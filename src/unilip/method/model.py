"""UniLIP on one page: the tokenizer, the dual condition, sampling and the losses (paper, sections 3 and 4).

pixels -encoder-> features -latent_head-> latent -pixel_decoder-> pixels                 (reconstruct)
words, features, queries -mllm-> hidden -connector-> condition                           (the dual condition)
noise -dit, condition-> latent -pixel_decoder-> pixels                                   (generate, edit)
words, features -mllm-> words                                                            (ask)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from unilip.errors import check_choice
from unilip.method.config import UniLIPConfig
from unilip.method.connector import Connector
from unilip.method.decoder import LatentHead, PixelDecoder, resize_to_tokens
from unilip.method.dit import DiT
from unilip.method.encoder import Encoder
from unilip.method.flow import flow_loss, guide, interpolate, make_schedule, sample, train_levels
from unilip.method.mllm import MLLM, fill_slots
from unilip.method.text import Tokens

PARTS: dict[str, type[nn.Module]] = {
    "encoder": Encoder, "latent_head": LatentHead, "pixel_decoder": PixelDecoder, "mllm": MLLM,
    "connector": Connector, "dit": DiT,
}  # fmt: skip
Reader = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # does what `MLLM.read_with_queries` does


class Network(nn.Module):
    """The networks and what they compute together. A tokenizer, for instance, has no `mllm`, `connector` and `dit`."""

    encoder: Encoder
    latent_head: LatentHead
    pixel_decoder: PixelDecoder
    mllm: MLLM
    connector: Connector
    dit: DiT
    kinds = PARTS  # what the parts are built as; a subclass may have more to them

    def __init__(self, config: UniLIPConfig, parts: Sequence[str] = tuple(PARTS)) -> None:
        super().__init__()
        for name in parts:
            check_choice("part", name, PARTS)
        self.config, self.parts = config, tuple(name for name in PARTS if name in parts)
        for name in self.parts:
            self.add_module(name, self.kinds[name](config))

    # --- the tokenizer ---

    def to_latent(self, features: Tensor, height: int | None = None) -> Tensor:
        """Features (M,N,D) -> latent (M,Z,h,w) in the DiT's scale, float32; `height` is h, if not square."""
        latent = self.latent_head(features, height).float()
        mean, factor = self.latent_scale(latent)
        return (latent - mean) * factor

    def from_latent(self, latent: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Latent (M,Z,h,w) in the DiT's scale -> pixels (M,3,H,W) in [0,1]."""
        mean, factor = self.latent_scale(latent)
        decoded = (decode or self.pixel_decoder.decode)(latent / factor + mean)
        return (resize_to_tokens(decoded.float().clamp(-1, 1)) + 1) / 2  # clamped first, as the released code does

    def latent_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and factor, one number or (Z,1,1), between the latent head and the DiT."""
        both = (self.config.latent_mean, self.config.latent_factor)
        mean, factor = (torch.as_tensor(v, dtype=like.dtype, device=like.device).reshape(-1, 1, 1) for v in both)
        return mean, factor

    # --- the dual condition ---

    def condition(
        self, tokens: Tokens, features: Tensor | None = None, read: Reader | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prompts (B,T), and the features (M,N,D) of their pictures -> condition (B,L,C) and mask (B,L).

        L = T + Q: hidden states of the prompt *and* of the queries; in ablations one of the two, as `config.condition`
        says. In edits the connector reads the encoder's features where the source picture stands (section 3.2).
        """
        x, mask = self.mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask
        if self.config.condition == "hidden":
            hidden = self.mllm(x, mask)
        else:
            hidden, mask = (read or self.mllm.read_with_queries)(x, mask)
        if features is not None and self.config.substitute_features:
            hidden = fill_slots(hidden, tokens.image_slots, features)
        if self.config.condition == "queries":
            hidden, mask = hidden[:, tokens.attention_mask.shape[1] :], mask[:, tokens.attention_mask.shape[1] :]
        return self.connector(hidden, mask), mask

    # --- sampling ---

    @torch.no_grad()
    def draw(
        self, tokens: Tokens, noise: Tensor, steps: int = 20, guidance: float = 4.5, features: Tensor | None = None
    ) -> Tensor:
        """Draw latents (B,Z,h,w) from noise, for prompts (2B,T) of which the first B are unconditional.

        `features` (2B,N,D) are those of the pictures that edits start from.
        """
        condition, mask = self.condition(tokens, features)

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            both = torch.cat([x, x])
            return guide(self.dit(both, timestep.expand(len(both)), condition, mask).float(), guidance)

        sampling = self.config.sampling
        return sample(velocity, noise, make_schedule(sampling.solver, sampling.flow_shift, steps))

    # --- the losses ---

    def flow_loss(
        self, tokens: Tokens, targets: Tensor, noise: Tensor, u: Tensor, sources: Tensor | None = None
    ) -> Tensor:
        """Velocity error at u (B,) of normalised targets (B,3,H,W); `sources` are the pictures that edits change."""
        with torch.no_grad():
            clean = self.to_latent(self.encoder(targets), targets.shape[-2] // 28)
            features = None if sources is None else self.encoder(sources)
        timestep, level = train_levels(u)
        velocity = self.dit(interpolate(clean, noise, level), timestep, *self.condition(tokens, features))
        return flow_loss(velocity, clean, noise)

    def tokenizer_loss(self, pixels: Tensor, target: Tensor, original: Encoder, distill: float = 1.0) -> Tensor:
        """Error of the pictures (B,3,H,W) in [0,1], and distance of the features from the frozen original's.

        The loss of section 3.1 without its perceptual and adversarial terms, which need other networks.
        """
        features = self.encoder(pixels)
        latent = self.latent_head(features, pixels.shape[-2] // 28)
        with torch.no_grad():
            wanted = original(pixels)
        made = (self.pixel_decoder(latent).float() + 1) / 2
        return (made - target).square().mean() + distill * (features - wanted).square().mean()
