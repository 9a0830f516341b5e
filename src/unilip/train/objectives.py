"""The three objectives of training, each an object that turns a batch into a loss for the one loop.

`Objective.loss(batch, generator)` returns the scalar and its named terms; `heads` are weights that exist only for
training; `adversary_loss` is the second player's loss where there is one. Batches are what `unilip.train.batches`
makes. Shapes: B batch, K noises per condition, L condition length, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.errors import ConfigError
from unilip.flow import flow_loss, interpolate, logit_normal, train_levels
from unilip.model import UniLIP
from unilip.preprocess import Tokens, normalise
from unilip.train.losses import PatchDiscriminator, discriminator_loss, lecam_penalty, make_perceptual
from unilip.train.recipe import Flow, Recipe, Reconstruct, Understand

Batch = dict[str, Any]
Terms = dict[str, Tensor]


def make_objective(recipe: Recipe, model: UniLIP) -> Objective:
    """Build the objective that a recipe's record names."""
    kinds: dict[type, type[Objective]] = {
        Understand: UnderstandObjective,
        Reconstruct: ReconstructObjective,
        Flow: FlowObjective,
    }
    return kinds[type(recipe.objective)](recipe, model)


class Objective:
    """Interface of the three."""

    parts: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe, model: UniLIP) -> None:
        self.recipe, self.model = recipe, model
        self.heads: nn.Module = nn.Module()
        self.adversary: nn.Module | None = None

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Terms]:
        """Return the loss to minimise and its terms for the log."""
        raise AssertionError("an objective must say how its loss is computed")

    def adversary_loss(self) -> tuple[Tensor, Terms] | None:
        """Return the discriminator's loss on the pictures of the last `loss` call, where there is one."""
        return None

    def samples(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Return picture batches (B,3,H,W) in [0,1] worth looking at."""
        return {}


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> float [0,1]."""
    return images.float() / 255


class UnderstandObjective(Objective):
    """Contrast between pooled features and the LLM's reading of the caption, word prediction, next token."""

    parts = ("encoder", "mllm")

    def __init__(self, recipe: Recipe, model: UniLIP) -> None:
        super().__init__(recipe, model)
        width, vocabulary = model.config.text.hidden_size, model.config.text.vocab_size
        self.weights: Any = recipe.objective
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.heads = nn.ModuleDict(
                {
                    "image": nn.Linear(2 * width, width),
                    "text": nn.Linear(width, width),
                    "words": nn.Linear(2 * width, vocabulary),
                    "scale": nn.ParameterDict({"log": nn.Parameter(torch.tensor(2.3))}),
                }
            )

    def embed_images(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Pool features (B,N,D): -> unit image embedding (B,D), pooled (B,2D)."""
        pooled = torch.cat([features.mean(1), features.amax(1)], -1)
        return F.normalize(self.heads["image"](pooled), dim=-1), pooled

    def embed_texts(self, tokens: Tokens) -> Tensor:
        """Unit embedding (B,D) of captions: the LLM's state at the last valid token."""
        hidden = self.model.mllm(self.model.mllm.embed(tokens.input_ids), tokens.attention_mask)
        last = tokens.attention_mask.cumsum(-1).argmax(-1)
        return F.normalize(self.heads["text"](hidden[torch.arange(len(last)), last]), dim=-1)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Terms]:
        """Weighted sum of the terms whose weight is not zero."""
        weights, terms = self.weights, {}
        total = torch.zeros((), device=self.model.device)
        features = None
        if "images" in batch:
            features = self.model.encoder(normalise(to_unit(batch["images"])))  # B N D
            image, pooled = self.embed_images(features)
            if weights.contrastive:
                text = self.embed_texts(batch["captions"])
                scores = image @ text.T * self.heads["scale"]["log"].clamp(max=4.6).exp()  # B B
                same = batch["same"]  # B B: captions that say the same are all right answers
                target = same / same.sum(-1, keepdim=True)
                both = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
                terms["contrastive"], total = both, total + weights.contrastive * both
                terms["retrieval"] = (same.gather(1, scores.argmax(1, keepdim=True)) > 0).float().mean()
            if weights.words:
                words = F.cross_entropy(self.heads["words"](pooled), batch["words"])
                terms["words"], total = words, total + weights.words * words
        if weights.next_token:
            tokens = batch["conversations"]
            hidden = self.model.mllm(
                self.model.mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask
            )
            labels = batch["labels"][:, 1:]
            chosen = labels != -100
            logits = self.model.mllm.logits(hidden[:, :-1][chosen]).float()
            answers = F.cross_entropy(logits, labels[chosen])
            terms["next_token"], total = answers, total + weights.next_token * answers
            terms["token_accuracy"] = (logits.argmax(-1) == labels[chosen]).float().mean()
        return total, terms


class ReconstructObjective(Objective):
    """Pixels back from features, while the features stay those of the frozen original (paper, section 3.1)."""

    parts = ("encoder", "latent_head", "pixel_decoder")

    def __init__(self, recipe: Recipe, model: UniLIP) -> None:
        super().__init__(recipe, model)
        self.weights: Any = recipe.objective
        needs_teacher = self.weights.distill > 0 or (self.weights.perceptual > 0 and self.weights.perceptual_source == "teacher")
        self.teacher = copy.deepcopy(model.encoder).eval().requires_grad_(False) if needs_teacher else None
        self.perceptual = None
        if self.weights.perceptual > 0:
            self.perceptual = make_perceptual(self.weights.perceptual_source, self.teacher)
        if self.weights.gan > 0:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(recipe.seed)
                self.adversary = PatchDiscriminator()
        self._pair: tuple[Tensor, Tensor] | None = None
        self._means = torch.zeros(2)

    def reconstruct(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pixels (B,3,H,W) -> features (B,N,D), pixels in [0,1] (not clamped)."""
        features = self.model.encoder(normalised)
        rows = normalised.shape[-2] // 28
        pixels = self.model.pixel_decoder(self.model.latent_head(features, rows))
        return features, (pixels.float() + 1) / 2

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Terms]:
        """L2 + perceptual + distillation + (after its start) the generator's hinge term."""
        weights = self.weights
        target = to_unit(batch["images"])
        normalised = normalise(target)
        features, output = self.reconstruct(normalised)
        pixel = F.mse_loss(output, target)
        total = weights.pixel * pixel
        terms: Terms = {"pixel": pixel, "psnr": -10 * pixel.detach().clamp(min=1e-10).log10()}
        if self.perceptual is not None:
            perceptual = self.perceptual(output, target)
            terms["perceptual"], total = perceptual, total + weights.perceptual * perceptual
        if weights.distill > 0:
            assert self.teacher is not None
            with torch.no_grad():
                original = self.teacher(normalised)
            distill = F.mse_loss(features.float(), original.float())
            terms["distill"], total = distill, total + weights.distill * distill
        self._pair = None
        if self.adversary is not None and step >= weights.gan_start:
            self._pair = (target, output.detach())
            self.adversary.requires_grad_(False)
            fool = -self.adversary(output * 2 - 1).mean()
            self.adversary.requires_grad_(True)
            terms["gan"], total = fool, total + weights.gan * fool
        return total, terms

    def adversary_loss(self) -> tuple[Tensor, Terms] | None:
        """Hinge loss with LeCam regularisation on the last real and drawn pictures."""
        if self._pair is None or self.adversary is None:
            return None
        real, fake = (self.adversary(x * 2 - 1) for x in self._pair)
        hinge = discriminator_loss(real, fake)
        penalty = lecam_penalty(real, fake, self._means)
        self._means = 0.99 * self._means + 0.01 * torch.stack([real.detach().mean(), fake.detach().mean()]).cpu()
        return hinge + self.weights.lecam * penalty, {"discriminator": hinge, "lecam": penalty}

    @torch.no_grad()
    def samples(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Input above reconstruction."""
        target = to_unit(batch["images"][:8])
        _, output = self.reconstruct(normalise(target))
        return {"reconstruction": torch.cat([target, output.clamp(0, 1)])}


class FlowObjective(Objective):
    """Velocity of the straight path between latents and noise, under the dual condition (paper, section 3.2)."""

    parts = ("encoder", "latent_head", "mllm", "connector", "dit")

    def __init__(self, recipe: Recipe, model: UniLIP) -> None:
        super().__init__(recipe, model)
        self.settings: Any = recipe.objective
        self.autoencoder: nn.Module | None = None
        if self.settings.target == "dcae":
            source = dict(pair.split("=", 1) for pair in recipe.init).get("autoencoder")
            if source is None:
                raise ConfigError("objective.target=dcae needs init autoencoder=FOLDER, a diffusers AutoencoderDC.")
            from diffusers import AutoencoderDC

            self.autoencoder = AutoencoderDC.from_pretrained(source, local_files_only=True).eval().requires_grad_(False)

    @torch.no_grad()
    def clean_latents(self, images: Tensor) -> Tensor:
        """Return the latents (B,Z,h,w) that the DiT learns, of uint8 pictures (B,3,H,W)."""
        unit = to_unit(images)
        if self.autoencoder is not None:
            side = unit.shape[-1] // 28 * 32
            unit = F.interpolate(unit, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
            return self.autoencoder.encode(unit * 2 - 1).latent * self.autoencoder.config.scaling_factor
        return self.model.to_latent(self.model.encoder(normalise(unit)))

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> tuple[Tensor, Terms]:
        """Mean squared velocity error, K noises for each condition."""
        model, k = self.model, self.settings.noises
        clean = self.clean_latents(batch["targets"])
        features = None
        if "sources" in batch:
            with torch.no_grad():
                features = model.encoder(normalise(to_unit(batch["sources"])))
        prepared = model.dit.prepare(*model.conditions(batch["prompts"], features))
        rows = torch.arange(len(clean), device=clean.device).repeat_interleave(k)
        clean = clean.index_select(0, rows)  # BK Z h w
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        timesteps, sigmas = train_levels(logit_normal(len(rows), generator))
        noisy = interpolate(clean, noise, sigmas.to(clean))
        velocity = model.dit(noisy, timesteps.to(clean.device).long(), prepared.select(rows))
        loss = flow_loss(velocity, clean, noise)
        return loss, {"flow_edit" if features is not None else "flow": loss}

    @torch.no_grad()
    def samples(self, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        """Pictures drawn for the first prompts of the batch, under the targets."""
        from unilip.flow import denoise, draw_noise, make_scheduler

        model = self.model
        if "pixel_decoder" not in model.parts or self.autoencoder is not None:
            return {}
        tokens = batch["prompts"]
        count = min(8, len(tokens.input_ids))
        features = None
        if "sources" in batch:
            features = model.encoder(normalise(to_unit(batch["sources"][:count])))
        first = Tokens(tokens.input_ids[:count], tokens.attention_mask[:count], tokens.image_slots[:count])
        prepared = model.dit.prepare(*model.conditions(first, features))
        grid = model.config.grid
        noise = draw_noise(count, (model.config.dit.latent_channels, grid, grid), generator).to(model.device)
        sampling = model.config.sampling
        latents = denoise(
            lambda x, t: model.dit(x, t, prepared), noise, make_scheduler("dpm++", sampling.flow_shift), 20, 1.0
        )
        rows = [to_unit(batch["targets"][:count]), model.from_latent(latents)]
        if "sources" in batch:
            rows.insert(0, to_unit(batch["sources"][:count]))
        return {"drawn": torch.cat(rows)}



