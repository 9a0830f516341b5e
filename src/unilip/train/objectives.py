"""The objectives of training, each an object that turns a batch into a loss for the one loop.

Out: `Objective.loss(batch, step)`, a scalar and its named terms; `heads`, weights that exist only for training; and
`adversary_loss`, the second player's where there is one. B batch, K noises per condition, V vocabulary.
"""

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilip.checkpoints.hub import resolve
from unilip.errors import CheckpointError, ConfigError, install
from unilip.fast.loop import PRESETS
from unilip.fast.mllm import read_in_two_passes
from unilip.method import flow
from unilip.method.config import DECODER_PIXELS, TOKEN_PIXELS
from unilip.method.dit import DiT
from unilip.method.encoder import Encoder
from unilip.method.qwen2 import TextLayer
from unilip.method.text import Tokens
from unilip.model import UniLIP
from unilip.pictures import normalise
from unilip.recipes.record import FewSteps, Flow, Recipe, Reconstruct, Shrink, Understand
from unilip.sampling import draw_noise
from unilip.train import lessons, losses

Batch = dict[str, Any]
Terms = dict[str, Tensor]
Condition = tuple[Tensor, Tensor]  # (B,L,C) and its mask (B,L)
LESSON_NOISE = 0.7  # beside conditions of unit size: what is told through it is told clearly
SHOWN = 8  # pictures in a sample sheet


class Objective:
    """Interface of all. `sources` says where weights beside the model come from: teacher, autoencoder."""

    def __init__(self, recipe: Recipe, model: UniLIP) -> None:
        self.model = model
        self.settings: Any = recipe.objective
        self.heads = nn.ModuleDict()
        self.adversary: nn.Module | None = None
        self.adversary_start = 0
        self.looks_ahead = False

    def to(self, device: torch.device) -> None:
        """Move everything that the objective owns; the model moves by itself."""
        for value in vars(self).values():
            if isinstance(value, nn.Module) and value is not self.model:
                value.to(device)

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """Return the loss to minimise and its terms for the log."""
        raise NotImplementedError

    def weighed(self, terms: Terms) -> Tensor:
        """Return the sum of terms, each by the weight of its name in the objective's settings."""
        none = torch.zeros((), device=self.model.device)
        return sum((getattr(self.settings, name) * term for name, term in terms.items()), none)

    def adversary_loss(self) -> tuple[Tensor, Terms] | None:
        """Return the discriminator's loss on the pictures of the last `loss` call, where there is one."""
        return None

    def ahead(self, batch: Batch, step: int) -> Batch:
        """Return what `loss` needs of the averaged weights, which are in the model now; asked if `looks_ahead`."""
        raise NotImplementedError

    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Return sheets worth looking at, by name: rows of pictures (R,n,3,H,W) in [0,1]."""
        return {}


def make_objective(recipe: Recipe, model: UniLIP, sources: Mapping[str, str]) -> Objective:
    """Build the objective that a recipe's record names."""
    kinds: dict[type, Callable[..., Objective]] = {
        Understand: UnderstandObjective, Reconstruct: ReconstructObjective, Shrink: ShrinkObjective,
        Flow: FlowObjective, FewSteps: FewStepsObjective,
    }  # fmt: skip
    return kinds[type(recipe.objective)](recipe, model, sources)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw what is new inside the block from a seed, and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def needed_parts(objective: Understand | Reconstruct | Flow) -> tuple[str, ...]:
    """Return the parts of the model that an objective runs."""
    if isinstance(objective, Understand):
        words = objective.contrastive + objective.next_token + objective.bind + objective.ground
        return ("encoder", *(("mllm",) if words else ()))
    if isinstance(objective, Reconstruct):
        return ("encoder", "latent_head", "pixel_decoder", *(("mllm",) if objective.contrastive else ()))
    own_latents = () if objective.target == "dcae" else ("latent_head",)
    return ("encoder", *own_latents, *(("pixel_decoder",) if objective.redraw else ()), "mllm", "connector", "dit")


def to_unit(images: Tensor) -> Tensor:
    """uint8 (B,3,H,W) -> float [0,1]."""
    return images.float() / 255


def held_error(found: Tensor, wanted: Tensor, held: Tensor) -> Tensor:
    """Mean squared difference of the rows (B,...) that are held (B,); zero where none is."""
    errors = (found.float() - wanted.float()).square().flatten(1).mean(1)
    return (errors * held).sum() / held.sum().clamp(min=1)


def contrast_heads(model: UniLIP) -> dict[str, nn.Module]:
    """Return what joins pooled features and texts in one space, for training only; `scale` as a row, to be shared."""
    width, scale = model.config.text.hidden_size, nn.ParameterDict({"log": nn.Parameter(torch.tensor([2.3]))})
    return {"image": nn.Linear(2 * width, width), "text": nn.Linear(width, width), "scale": scale}


def embed_texts(model: UniLIP, heads: nn.ModuleDict, tokens: Tokens) -> Tensor:
    """Read right-padded texts (B,T) with the LLM: -> unit embedding (B,D) of the last token."""
    hidden = model.mllm(model.mllm.embed(tokens.input_ids), tokens.attention_mask)  # B T D
    last = tokens.attention_mask.sum(-1) - 1
    return F.normalize(heads["text"](hidden[torch.arange(len(last), device=last.device), last]).float(), dim=-1)


def contrast(model: UniLIP, heads: nn.ModuleDict, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Contrastive loss between features (B,N,D) and the LLM's reading of their captions, and the share found."""
    image = F.normalize(heads["image"](pool(features)).float(), dim=-1)
    scale = heads.get_parameter("scale.log").clamp(max=4.6).exp()
    return losses.contrastive_loss(image, embed_texts(model, heads, batch["captions"]), batch["same"], scale)


def pool(features: Tensor) -> Tensor:
    """Mean and maximum over the tokens: (B,N,D) -> (B,2D)."""
    return torch.cat([features.mean(1), features.amax(1)], -1)


class UnderstandObjective(Objective):
    """Contrast between pooled features and the LLM's reading of the caption, word prediction, next token."""

    def __init__(self, recipe: Recipe, model: UniLIP, sources: Mapping[str, str]) -> None:
        super().__init__(recipe, model)
        weights, width, vocabulary = self.settings, model.config.text.hidden_size, model.config.text.vocab_size
        with seeded(recipe.seed):
            self.heads = nn.ModuleDict({**contrast_heads(model), "words": nn.Linear(2 * width, vocabulary)})
            if weights.local and recipe.lessons:
                self.heads["local"] = heads = lessons.cell_heads(width)
                heads["place"] = nn.Linear(width, model.config.num_image_tokens)  # features tell their own, too
            if weights.bind and recipe.lessons:
                self.heads["bind"] = lessons.bind_heads(width)
            if weights.ground and recipe.lessons:
                self.heads["ground"] = nn.Linear(width, model.config.num_image_tokens)
        self.words: dict[str, Tensor] = {}
        self.middle: list[Tensor] = []  # states halfway through the language model, while they are wanted
        if weights.ground and recipe.lessons and model.processor is not None:
            self.words = lessons.slot_words(model.processor)
            layers = model.mllm.language_model.model.layers
            layers[len(layers) // 2 - 1].register_forward_hook(lambda _, __, out: self.middle.append(out))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """Weighted sum of the terms whose weight is not zero."""
        weights, heads = self.settings, self.heads
        learned, told = Terms(), Terms()
        if "features" in batch:
            features = batch["features"].to(self.model.dtype)  # B N D
        else:
            features = self.model.encoder(normalise(to_unit(batch["images"])))
        if weights.contrastive:
            learned["contrastive"], told["retrieval"] = contrast(self.model, heads, features, batch)
        if weights.words:
            learned["words"] = F.cross_entropy(heads["words"](pool(features)).float(), batch["words"])
        if weights.local and "cells" in batch:
            learned["local"], found = lessons.local_loss(heads["local"], features, batch["cells"])
            told |= found
        if weights.next_token:
            states = self.read(batch["conversations"], features)
            learned["next_token"], told["token_accuracy"] = self.answer_loss(states, batch["labels"])
            if "grounds" in batch:
                told["grounding"], found = lessons.ground_loss(heads["ground"], states, batch["grounds"])
                told["looking"], seen = self.look(batch, self.middle.pop())
                learned["ground"] = told["grounding"] + told["looking"]
                told |= found | seen
        if weights.bind and "lessons" in batch:
            states = self.read(batch["lessons"])
            learned["bind"], found = lessons.bind_loss(heads["bind"], states, batch, states.shape[1])
            told |= found
        self.middle.clear()
        return self.weighed(learned), learned | told  # "ground" is told as the share of words that are right

    def look(self, batch: Batch, halfway: Tensor) -> tuple[Tensor, Terms]:
        """What image tokens say, and where words look next, by states (B,T,D) halfway through the language model."""
        text, tokens = self.model.mllm.language_model.model, batch["conversations"]
        slots = text.norm(halfway[tokens.image_slots]).unflatten(0, batch["cells"].shape[:2])
        said, terms = lessons.slot_loss(self.model.mllm.logits(slots), batch["cells"], self.words)
        layer = cast(TextLayer, list(text.layers)[len(text.layers) // 2])
        words = batch["grounds"][batch["grounds"][:, 2:4].any(-1)]
        own = self.model.mllm.logits(text.norm(halfway[words[:, 0], words[:, 1]]))
        named, more = lessons.word_loss(own, words, self.words)
        looked, found = lessons.look_loss(layer, halfway, tokens, words, text.t)
        return said + named + looked, {**terms, **more, **found}

    def read(self, tokens: Tokens, features: Tensor | None = None) -> Tensor:
        """Hidden states (B,T,D) of texts, or of conversations about pictures with these features (B,N,D)."""
        mllm = self.model.mllm
        return mllm(mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask)

    def answer_loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of the tokens of answers (labels (B,T) of 0 and above), and the share guessed right."""
        chosen = labels[:, 1:] >= 0
        wanted = labels[:, 1:][chosen]
        logits = self.model.mllm.logits(hidden[:, :-1][chosen]).float()
        return F.cross_entropy(logits, wanted), (logits.argmax(-1) == wanted).float().mean()


class ReconstructObjective(Objective):
    """Pixels back from features, while the features stay those of the frozen original (paper, section 3.1)."""

    teacher: Any = None
    kept_head: Any = None
    perceptual: nn.Module | None = None
    adversary: losses.PatchDiscriminator | None = None
    _pair: tuple[Tensor, Tensor] | None = None

    def __init__(self, recipe: Recipe, model: UniLIP, sources: Mapping[str, str]) -> None:
        super().__init__(recipe, model)
        weights = self.settings
        if weights.distill or weights.anchor or (weights.perceptual and weights.perceptual_source == "teacher"):
            start = model
            if "teacher" in sources:
                both = ("encoder", "latent_head") if weights.anchor else ("encoder",)
                start = UniLIP.from_pretrained(sources["teacher"], parts=both)
            self.teacher = copy.deepcopy(start.encoder).eval().requires_grad_(False)
            if weights.anchor:
                self.kept_head = copy.deepcopy(start.latent_head).eval().requires_grad_(False)
        if weights.contrastive:
            with seeded(recipe.seed):
                self.heads = nn.ModuleDict(contrast_heads(model))
        if weights.perceptual:
            lpips = weights.perceptual_source == "lpips"
            self.perceptual = losses.LPIPSConvNeXt() if lpips else losses.TeacherPerceptual(self.teacher)
        if weights.gan:
            self.adversary_start = weights.gan_start
            with seeded(recipe.seed):
                self.adversary = losses.PatchDiscriminator()

    def reconstruct(self, normalised: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels (B,3,H,W) -> features (B,N,D) unless given, latents, pixels in [0,1] (not clamped)."""
        features = self.model.encoder(normalised) if features is None else features.to(self.model.dtype)
        latents = self.model.latent_head(features, normalised.shape[-2] // TOKEN_PIXELS)
        return features, latents, (self.model.pixel_decoder(latents).float() + 1) / 2

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """L2 + perceptual + distillation + anchor + contrast + (from its start on) the generator's hinge term."""
        weights, target = self.settings, to_unit(batch["images"])
        normalised = normalise(target)
        features, latents, output = self.reconstruct(normalised, batch.get("features"))
        learned, told = self.pixel_loss(output, target)
        if self.perceptual is not None:
            learned["perceptual"] = self.perceptual(output, target)
        if weights.distill or weights.anchor:
            held = batch.get("held", torch.ones(len(target), dtype=torch.bool, device=target.device))
            with torch.no_grad():
                original = batch["teacher"] if "teacher" in batch else self.teacher(normalised)
            if weights.distill:
                learned["distill"] = held_error(features, original, held)
            if self.kept_head is not None:
                with torch.no_grad():
                    wanted = self.kept_head(original.to(features), normalised.shape[-2] // TOKEN_PIXELS).float()
                learned["anchor"] = held_error(latents, wanted, held) / wanted.var()
        if weights.contrastive:
            learned["contrastive"], told["retrieval"] = contrast(self.model, self.heads, features, batch)
        self._pair = None
        if self.adversary is not None and step >= weights.gan_start:
            self._pair = (target, output.detach())
            self.adversary.requires_grad_(False)  # this term moves the pictures, not their judge
            learned["gan"] = -self.adversary(output * 2 - 1).float().mean()
            self.adversary.requires_grad_(True)
        return self.weighed(learned), learned | told

    def pixel_loss(self, output: Tensor, target: Tensor) -> tuple[Terms, Terms]:
        """The L2 of pictures in [0,1], which is learned, and their mean PSNR: means of means stay the same."""
        errors = (output.detach() - target).square().mean((1, 2, 3))  # of each picture
        return {"pixel": F.mse_loss(output, target)}, {"psnr": -10 * errors.clamp(min=1e-10).log10().mean()}

    def adversary_loss(self) -> tuple[Tensor, Terms] | None:
        """Hinge loss with LeCam regularisation on the last real and drawn pictures."""
        if self._pair is None or self.adversary is None:
            return None
        real, fake = (self.adversary(x * 2 - 1).float() for x in self._pair)
        hinge = losses.discriminator_loss(real, fake)
        penalty = losses.lecam_penalty(real, fake, self.adversary.means.clone())
        self.adversary.remember(real, fake)
        return hinge + self.settings.lecam * penalty, {"discriminator": hinge, "lecam": penalty}

    @torch.no_grad()
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        target = to_unit(batch["images"][:SHOWN])
        *_, output = self.reconstruct(normalise(target))
        return {"reconstruction": torch.stack([target, output.clamp(0, 1)])}


class ShrinkObjective(ReconstructObjective):
    """A smaller pixel decoder, from latents of pictures to what the full one draws of them."""

    def __init__(self, recipe: Recipe, model: UniLIP, sources: Mapping[str, str]) -> None:
        super().__init__(recipe, model, {})
        other = UniLIP.from_pretrained(sources["teacher"], parts=("pixel_decoder",))
        self.full = other.pixel_decoder.eval().requires_grad_(False)
        stages = [list(decoder.decoder.up_blocks)[-3:] for decoder in (model.pixel_decoder, self.full)]
        self.states: tuple[list[Tensor], list[Tensor]] = ([], [])  # of the stages, in a pass through either decoder
        for kept, ours in zip(self.states, stages, strict=True):
            for stage in ours:
                stage.register_forward_hook(lambda _, inputs, out, kept=kept: kept.append(out))
        with seeded(recipe.seed):
            small, large = (d.block_out_channels[-3:] for d in (model.config.decoder, other.config.decoder))
            joined = [nn.Conv2d(a, b, 1) for a, b in zip(small, large, strict=True)]
            self.heads["states"] = nn.ModuleList(reversed(joined))  # as they run, from coarse to fine

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """L2 + perceptual + distance of the stages' states, each in units of the full one's spread."""
        model, normalised = self.model, normalise(to_unit(batch["images"]))
        with torch.no_grad():
            features = model.encoder(normalised) if "features" not in batch else batch["features"].to(model.dtype)
            latent = model.latent_head(features, normalised.shape[-2] // TOKEN_PIXELS)
            for kept in self.states:
                kept.clear()
            target = (self.full(latent).float() + 1) / 2
        output = (model.pixel_decoder(latent).float() + 1) / 2
        learned, told = self.pixel_loss(output, target)
        if self.perceptual is not None:
            learned["perceptual"] = self.perceptual(output, target.clamp(0, 1))
        pairs = zip(self.heads["states"], *self.states, strict=True)  # type: ignore[call-overload]
        away = [F.mse_loss(head(ours).float(), theirs.float()) / theirs.float().var() for head, ours, theirs in pairs]
        learned["states"] = torch.stack(away).mean()
        return self.weighed(learned), learned | told

    @torch.no_grad()
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """What the full one draws above what the smaller one does."""
        normalised = normalise(to_unit(batch["images"][:SHOWN]))
        latent = self.model.latent_head(self.model.encoder(normalised), normalised.shape[-2] // TOKEN_PIXELS)
        rows = [(decoder(latent).float() + 1) / 2 for decoder in (self.full, self.model.pixel_decoder)]
        return {"decoders": torch.stack(rows).clamp(0, 1)}


class FlowObjective(Objective):
    """Velocity of the straight path between latents and noise, under the dual condition (paper, section 3.2)."""

    def __init__(self, recipe: Recipe, model: UniLIP, sources: Mapping[str, str]) -> None:
        super().__init__(recipe, model)
        settings = self.settings
        with seeded(recipe.seed):
            if settings.bind and recipe.lessons:
                c = model.config
                if c.condition != "dual" or c.num_queries != c.num_image_tokens:  # which stand for each other
                    raise ConfigError(
                        "objective.bind needs a dual condition with as many queries as image tokens; the config has "
                        f"condition={c.condition}, {c.num_queries} queries and {c.num_image_tokens} image tokens."
                    )
                width = model.config.dit.caption_channels
                self.heads["bind"], self.heads["cells"] = lessons.bind_heads(width), lessons.cell_heads(width)
            if settings.repa:
                width, wanted = model.config.dit.hidden_size, model.config.text.hidden_size
                layers = nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, wanted)
                self.heads["repa"] = nn.Sequential(*layers)
        self.repa_end = round(settings.repa_until * recipe.steps)
        self.middle: list[Tensor] = []  # states of the tokens a third through the transformer, while they are wanted
        if settings.repa:
            blocks = model.dit.transformer.transformer_blocks
            blocks[(len(blocks) - 1) // 3].register_forward_hook(lambda _, __, out: self.middle.append(out))
        self.target_encoder: Encoder | None = None  # of another tokenizer; None: the model's own
        self.autoencoder: Any = None
        needed = {"separate": "SOURCE, another tokenizer", "dcae": "FOLDER, a diffusers AutoencoderDC"}
        if settings.target in needed and "autoencoder" not in sources:
            raise ConfigError(f"objective.target={settings.target} needs init autoencoder={needed[settings.target]}.")
        if settings.target == "separate":
            other = UniLIP.from_pretrained(sources["autoencoder"], parts=("encoder",)).encoder
            self.target_encoder = other.eval().requires_grad_(False)
        if settings.target == "dcae":
            self.autoencoder = load_autoencoder(sources["autoencoder"])

    @torch.no_grad()
    def clean_latents(self, images: Tensor, features: Tensor | None = None) -> Tensor:
        """Return the latents (B,Z,h,w) that the DiT learns, of uint8 pictures (B,3,H,W) with these features (B,N,D)."""
        unit = to_unit(images)
        if self.autoencoder is None:
            if features is None or self.target_encoder is not None:
                features = (self.target_encoder or self.model.encoder)(normalise(unit))
            return self.model.to_latent(features, unit.shape[-2] // TOKEN_PIXELS)
        size = self.model.config.grid * DECODER_PIXELS
        if unit.shape[-1] != size:  # a source that draws in one size only
            unit = F.interpolate(unit, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return self.autoencoder.encode(unit * 2 - 1).latent.float() * self.autoencoder.config.scaling_factor

    @torch.no_grad()
    def source_features(self, batch: Batch) -> Tensor | None:
        """Return the frozen encoder's features (B,N,D) of the pictures to be edited, if this is a batch of edits."""
        if "features" in batch:
            return batch["features"].to(self.model.dtype)
        if "sources" not in batch:
            return None
        features: Tensor = self.model.encoder(normalise(to_unit(batch["sources"])))
        each = len(features) // len(batch["prompts"].input_ids)
        redrawn = [i for i, seed in enumerate(batch.get("seeds", ())) if seed % 1000 < 1000 * self.settings.redraw]
        if redrawn:
            rows = torch.tensor([i * each + j for i in redrawn for j in range(each)], device=features.device)
            height = batch["sources"].shape[-2] // TOKEN_PIXELS
            drawn = self.model.from_latent(self.model.to_latent(features[rows], height)).clamp(0, 1)
            features = features.index_copy(0, rows, self.model.encoder(normalise(drawn)))
        return features

    def conditions(self, batch: Batch, features: Tensor | None) -> Condition:
        """Return the condition (B,T+Q,C) of a batch whose sources have these features (B,N,D), and its mask (B,T+Q)."""
        if "conditions" in batch:
            return batch["conditions"].to(self.model.dtype), batch["condition_mask"]
        return self.model.condition(batch["prompts"], features, partial(read_in_two_passes, self.model.mllm))

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """Mean squared velocity error, K noises for each condition; before and beside it what else is to be learned."""
        model, settings, k = self.model, self.settings, self.settings.noises
        condition, mask = self.conditions(batch, None if "conditions" in batch else self.source_features(batch))
        extra, terms = torch.zeros((), device=condition.device), Terms()
        if "marks" in batch:
            extra, terms = self.lesson(condition, batch)
            if step < settings.lesson_steps:
                return extra, terms
            extra = settings.bind * extra
        likeness = settings.repa > 0 and step < self.repa_end and "targets" in batch
        with torch.no_grad():
            seen = model.encoder(normalise(to_unit(batch["targets"]))) if likeness else None  # B N D
        clean = batch["latents"].float() if "latents" in batch else self.clean_latents(batch["targets"], seen)
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        noise = draw_noise(len(clean), (k, *clean.shape[1:]), generators).flatten(0, 1).to(clean)  # BK Z h w
        timesteps, sigmas = flow.train_levels(torch.cat([flow.logit_normal(k, g) for g in generators]))
        clean = clean.repeat_interleave(k, 0)  # BK Z h w
        noisy = flow.interpolate(clean, noise, sigmas.to(clean))
        self.middle.clear()
        loss = flow.flow_loss(model.dit(noisy, timesteps.to(clean.device), condition, mask), clean, noise)
        terms["flow_edit" if "sources" in batch or "edits" in batch else "flow"] = loss
        if seen is not None:
            told = self.heads["repa"](self.middle.pop())  # BK N D
            away = 1 - F.cosine_similarity(told.float(), seen.float().repeat_interleave(k, 0), dim=-1).mean()
            terms["repa"], extra = away, extra + settings.repa * away
        return loss + extra, terms

    def lesson(self, condition: Tensor, batch: Batch) -> tuple[Tensor, Terms]:
        """What words say and what the queries (the last Q of (B,T+Q,C)) know of the picture, through noise."""
        heard = condition.float() * condition.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        noise = torch.randn(heard.shape, generator=torch.Generator().manual_seed(batch["seeds"][0]))
        heard = heard + LESSON_NOISE * noise.to(heard)
        length = batch["prompts"].input_ids.shape[1]
        bound, terms = lessons.bind_loss(self.heads["bind"], heard, batch, length)
        if "sources" in batch:
            del terms["bind_place"]  # instructions name no places of their own
        known, found = lessons.cell_loss(self.heads["cells"], heard[:, length:], batch["cells"])
        return bound + 4 * known, {**terms, **found, "lesson": bound + 4 * known}

    @torch.no_grad()
    def samples(self, batch: Batch) -> dict[str, Tensor]:
        """Pictures drawn for the first prompts of the batch (without guidance), under the targets."""
        model = self.model
        if self.autoencoder is None and "pixel_decoder" not in model.parts:
            return {}
        prompts = batch["prompts"]
        few: Batch = {name: value[:SHOWN] for name, value in batch.items() if isinstance(value, Tensor)}
        if "sources" in batch:  # one or several for each prompt
            each = len(batch["sources"]) // len(prompts.input_ids)
            few["sources"] = batch["sources"][: each * SHOWN]
        few["prompts"] = Tokens(*(tensor[:SHOWN] for tensor in vars(prompts).values()))
        condition = self.conditions(few, None if "conditions" in few else self.source_features(few))
        clean = few["latents"] if "latents" in few else self.clean_latents(few["targets"])
        noise = draw_noise(len(clean), clean.shape[1:], torch.Generator().manual_seed(0)).to(model.device)
        drawn = self.pixels(self.drawn(noise, condition))
        above = [to_unit(few["sources"][i::each]) for i in range(each)] if "sources" in few else []
        above += [to_unit(few["targets"])] if "targets" in few else []
        above += [self.pixels(few["latents"].float())] if "latents" in few else []  # of a cache, without pictures
        rows = [F.interpolate(row, drawn.shape[-2:], mode="bilinear") for row in above]
        return {"drawn": torch.stack([*rows, drawn]).clamp(0, 1)}

    def drawn(self, noise: Tensor, condition: Condition) -> Tensor:
        """Latents (B,Z,h,w) of noise, in 20 steps of the published solver."""
        dit, schedule = self.model.dit, flow.make_schedule("dpm++", self.model.config.sampling.flow_shift, 20)
        return flow.sample(lambda x, t: dit(x, t.to(x.device).expand(len(x)), *condition).float(), noise, schedule)

    def pixels(self, latents: Tensor) -> Tensor:
        """Return pictures (B,3,H,W) in about [0,1] of latents (B,Z,h,w) of the kind that is learned."""
        if self.autoencoder is None:
            return self.model.from_latent(latents)
        return (self.autoencoder.decode(latents / self.autoencoder.config.scaling_factor).sample + 1) / 2


PAIRS = 8  # jumps that are learned of each way of the teacher


class FewStepsObjective(FlowObjective):
    """Mean velocity of jumps, learned from a frozen teacher's guided velocity and from shorter jumps (RCGM).

    A jump from x_s to x_r, s and r in [0,1], is x_s - (s - r) F(x_s, s, r), and F(x, s, s) is a velocity. The
    differences are small, so the diffusion transformer computes in float32 whatever the precision of the rest. With
    `path` the jumps are instead read off the teacher's whole way from noise to picture, PAIRS of each.
    """

    def __init__(self, recipe: Recipe, model: UniLIP, sources: Mapping[str, str]) -> None:
        super().__init__(recipe, model, sources)
        self.looks_ahead = not self.settings.path  # at the averaged weights, of which a teacher's path needs nothing
        dit = copy.deepcopy(model.dit)
        if other := sources.get("teacher"):
            dit, own = UniLIP.from_pretrained(other, parts=("dit",)).dit, dit.state_dict()
            if any(tensor.shape != own[name].shape for name, tensor in dit.state_dict().items() if name in own):
                raise ConfigError(f"init teacher={other} has a diffusion transformer of another size.")
        self.teacher = dit.eval().requires_grad_(False)

    def levels(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Noise (BK,Z,h,w) of a batch with latents, and levels s > r (BK,): the whole way, hardly any, any."""
        clean, k = batch["latents"], self.settings.noises
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        noise = draw_noise(len(clean), (k, *clean.shape[1:]), generators).flatten(0, 1).to(clean)
        u, v = torch.stack([torch.rand(2, k, generator=g) for g in generators]).movedim(1, 0).flatten(1)  # BK each
        kinds = torch.tensor([(seed + i) % 3 for seed in batch["seeds"] for i in range(k)])
        s = torch.where(kinds == 0, 1.0, u)
        r = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, s * (1 - 0.05 * v), s * v))
        return noise, s.to(clean.device), r.to(clean.device)

    def jump(self, dit: DiT, x: Tensor, s: Tensor, r: Tensor | None, condition: Condition) -> Tensor:
        """F(x_s, s, r) of a transformer, or its velocity without r: (BK,Z,h,w), float32."""
        with torch.autocast(x.device.type, enabled=self.settings.path > 0 and torch.is_autocast_enabled(x.device.type)):
            there = None if r is None else r * flow.TRAIN_TIMESTEPS
            return dit(x, s * flow.TRAIN_TIMESTEPS, condition[0].float(), condition[1], there).float()

    @torch.no_grad()
    def ahead(self, batch: Batch, step: int) -> Batch:
        """Return where the jumps of a batch start, the velocity there, and how far shorter jumps lead from its end.

        A `target` velocity v (BK,Z,h,w) is the teacher's, guided; `rest` is the way (BK,Z,h,w) that the model goes, in
        `rollouts` jumps, from x_s - h v at level s - h to level r; h is `stride`, or s - r where that is less.
        """
        settings = self.settings
        found: Batch = {}
        if "conditions" in batch:
            condition = self.conditions(batch, None)
            blank = (batch["unconditional"].to(self.model.dtype), batch["unconditional_mask"])
        else:
            features = self.source_features(batch)
            condition, blank = (self.conditions({"prompts": batch[name]}, features) for name in ("prompts", "blanks"))
            trained = (p.requires_grad for part in (self.model.mllm, self.model.connector) for p in part.parameters())
            if not any(trained):
                found |= {"conditions": condition[0], "condition_mask": condition[1]}
        found["latents"] = batch["latents"].float() if "latents" in batch else self.clean_latents(batch["targets"])
        if settings.path:
            return found | self.path(batch | found, condition, blank)
        noise, s, r = self.levels(batch | found)
        start = flow.interpolate(found["latents"].repeat_interleave(settings.noises, 0), noise, s)
        target = self.guided(batch, start, s, condition, blank)
        h = (s - r).clamp(max=settings.stride)
        x, rest, times = start - wide(h) * target, torch.zeros_like(start), s - h
        for left in range(settings.rollouts, 0, -1):
            until = times + (r - times) / left
            way = wide(times - until) * self.jump(self.model.dit, x, times, until, condition)
            x, rest, times = x - way, rest + way, until
        return found | {"start": start, "levels": torch.stack([s, r, h]), "target": target, "rest": rest}

    def guided(self, batch: Batch, x: Tensor, s: Tensor, told: Condition, blank: Condition) -> Tensor:
        """Return the teacher's guided velocity (BK,Z,h,w) under a condition (B,L,C) and one without words (B or 1)."""
        scale = self.settings.edit_guidance if "sources" in batch or "edits" in batch else self.settings.guidance
        blank = (blank[0].expand(len(told[0]), -1, -1), blank[1].expand(len(told[0]), -1))
        free, said = (self.jump(self.teacher, x, s, None, condition) for condition in (blank, told))
        return free + scale * (said - free)

    def path(self, batch: Batch, condition: Condition, blank: Condition) -> Batch:
        """Return jumps to states of the teacher's way (UniPC, by turbo's schedule): PAIRS for each noise.

        A third go from anywhere on it to anywhere below. The others are jumps that the model is to make (`steps`), half
        of them from where the model itself has jumped to by then, so that a jump mends what those before it missed.
        """
        steps, k = self.settings.path, self.settings.noises
        generators = [torch.Generator().manual_seed(seed) for seed in batch["seeds"]]
        x = draw_noise(len(generators), (k, *batch["latents"].shape[1:]), generators).flatten(0, 1).to(batch["latents"])
        schedule, states = turbo("unipc", steps), [x]

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            return self.guided(batch, x, (timestep / flow.TRAIN_TIMESTEPS).to(x).expand(len(x)), condition, blank)

        flow.sample(velocity, x, schedule, lambda i, timestep, state: states.append(state))
        levels = torch.tensor([1.0, *schedule.levels[1:]], device=x.device)
        jumps, own = [], []
        for n in self.settings.counts:
            y, ends = x, [i * steps // n for i in range(n + 1)]
            for a, b in itertools.pairwise(ends):
                jumps.append((a, b))
                own.append(len(states) - 1 if a else 0)
                if b < steps:
                    here, there = (levels[i].expand(len(x)) for i in (a, b))
                    y = y - wide(here - there) * self.jump(self.model.dit, y, here, there, condition)
                    states.append(y)
        picks = []
        for generator in generators:
            for i in range(k * PAIRS):
                wish = int(torch.randint(len(jumps), (1,), generator=generator))
                first, last = torch.rand(2, generator=generator).mul(steps + 1).long().sort().values.tolist()
                start, end = jumps[wish] if i % 3 or first == last else (first, last)
                picks.append((start, end, own[wish] if i % 3 == 2 else start))
        start, end, where = (torch.tensor(ends, device=x.device) for ends in zip(*picks, strict=True))  # BKP each
        way, row = torch.stack(states), torch.arange(len(picks), device=x.device) // PAIRS
        s, r = levels[torch.stack([start, end])]
        begin = way[where, row]
        return {"start": begin, "levels": torch.stack([s, r, s - r]), "target": (begin - way[end, row]) / wide(s - r)}

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """Distance of jumps from a short step along the velocity and the shorter jumps after it, by Charbonnier."""
        if "start" not in batch:
            batch = batch | self.ahead(batch, step)
        s, r, h = batch["levels"]
        condition = self.conditions(batch, None if "conditions" in batch else self.source_features(batch))
        mean = self.jump(self.model.dit, batch["start"], s, r, condition)
        name = "few_edit" if "sources" in batch or "edits" in batch else "few"
        if self.settings.path:  # the root: else the longest jumps, which are furthest off, alone would count
            errors = (mean - batch["target"]).square().flatten(1).mean(1)
            return ((errors.detach() + 1e-3).rsqrt() * errors).mean(), {name: errors.mean()}
        stretch = wide((s - r) / h.clamp(min=1e-9)).where(wide(s - r > h), torch.ones(()).to(mean))
        off = (stretch * mean.detach() - batch["rest"] / wide(h.clamp(min=1e-9)) - batch["target"]).clamp(-1, 1)
        errors = (mean - (mean - off).detach()).square().flatten(1).mean(1)  # BK
        weights = (torch.tan((1 - (s - r)) * math.pi / 2.5) + 1) / (errors.detach() + 1e-6).sqrt()
        return (weights * errors).mean(), {name: errors.mean()}

    def drawn(self, noise: Tensor, condition: Condition) -> Tensor:
        """Latents (B,Z,h,w) of noise, in the model's own number of jumps."""
        x = noise
        for s, r in itertools.pairwise(turbo("euler", self.settings.counts[0]).levels):
            here, there = (torch.full((len(x),), level, device=x.device) for level in (s, r))
            x = x - (s - r) * self.jump(self.model.dit, x, here, there, condition)
        return x


def turbo(solver: str, steps: int) -> flow.Schedule:
    """Return a solver's schedule with the shift that few steps are drawn with."""
    return flow.make_schedule(solver, PRESETS["turbo"]["flow_shift"], steps)


def wide(levels: Tensor) -> Tensor:
    """(R,) -> (R,1,1,1)."""
    return levels[:, None, None, None]


def load_autoencoder(source: str) -> Any:
    """Open a whole diffusers AutoencoderDC, frozen; the model itself keeps only a decoder."""
    try:
        from diffusers import AutoencoderDC
    except ImportError as error:
        raise ConfigError(f"objective.target=dcae needs the package diffusers; {install('hosts')}.") from error
    path = resolve(source)
    try:
        whole = AutoencoderDC.from_pretrained(str(path), local_files_only=True, low_cpu_mem_usage=False)
        return whole.eval().requires_grad_(False)
    except Exception as error:  # what diffusers raises for a folder of another kind is not documented
        raise CheckpointError(
            f"init autoencoder={source} is not a diffusers AutoencoderDC ({str(error).splitlines()[0]})."
        ) from error
