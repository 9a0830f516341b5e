"""UniLIP: one model that answers, reconstructs, generates and edits, made of the parts of the files before.

    pixels -encoder-> features -latent_head-> latent -pixel_decoder-> pixels                       (reconstruct)
    text, features, queries -mllm-> hidden -connector-> condition; noise -dit, condition-> latent   (generate, edit)
    text, features -mllm-> text                                                                     (ask)

`conditions` is the one place where prompts and pictures become the condition of the diffusion transformer; training
and sampling both call it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from unilip import adapters
from unilip.acceleration import BUCKET, Compiled, Velocity, fingerprint, shortcut
from unilip.checkpoints import read, write
from unilip.checkpoints.infer import Unmade
from unilip.config import TOKEN_PIXELS, SamplingConfig, UniLIPConfig
from unilip.connector import Connector, copy_from_llm, substitute_features
from unilip.decoder import LatentHead, PixelDecoder, resize_to_tokens
from unilip.dit import DiT, PreparedCondition, stack
from unilip.encoder import Encoder, init_encoder
from unilip.errors import PromptError, UniLIPError
from unilip.flow import draw_noise, integrate, plan
from unilip.memory import QUANTIZED, Offload, empty, is_quantized, quantize
from unilip.mllm import MLLM
from unilip.preprocess import (
    Fit,
    ImageLike,
    Message,
    Processor,
    Tokens,
    check_prompt,
    fit_square,
    load_image,
    tile,
    to_images,
    to_pixels,
    unfit_square,
)

PARTS: dict[str, type[nn.Module]] = {
    "encoder": Encoder,
    "latent_head": LatentHead,
    "pixel_decoder": PixelDecoder,
    "mllm": MLLM,
    "connector": Connector,
    "dit": DiT,
}
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Generators = torch.Generator | Sequence[torch.Generator] | None
StepCallback = Callable[["UniLIP", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class ImageOutput:
    """Pictures of a call: a list of Pillow images, an array (B,H,W,3) or tensor (B,3,H,W) in [0,1], or latents."""

    images: Any


class UniLIP(nn.Module):
    """The model. `parts` names what is built; a tokenizer checkpoint, for instance, has no LLM and no DiT."""

    encoder: Encoder
    latent_head: LatentHead
    pixel_decoder: PixelDecoder
    mllm: MLLM
    connector: Connector
    dit: DiT

    def __init__(
        self, config: UniLIPConfig, processor: Processor | None = None, parts: Sequence[str] = tuple(PARTS)
    ) -> None:
        super().__init__()
        unknown = sorted(set(parts) - set(PARTS))
        if unknown:
            raise UniLIPError(f"There are no parts {', '.join(unknown)}; allowed: {', '.join(PARTS)}.")
        self.config = config
        self.processor = processor
        self.parts = tuple(name for name in PARTS if name in parts)
        for name in self.parts:
            self.add_module(name, PARTS[name](config))
        self._compiled: Compiled | None = None
        self._offload: Offload | None = None
        self._twin: list[DiT] = []  # on another device; in a list, so that it is no part of the model
        self._unconditional: tuple[Any, PreparedCondition] | None = None  # what it was made of, and the condition

    # --- making and keeping ---------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: UniLIPConfig, seed: int = 0, parts: Sequence[str] = tuple(PARTS)) -> UniLIP:
        """Build a model with fresh random weights that depend on `seed` alone; the connector copies the LLM's end."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # of the CPU alone, where the weights are drawn
            model = cls(config, parts=parts)
        generator = torch.Generator().manual_seed(seed)
        if "encoder" in model.parts:
            init_encoder(model.encoder, generator)
        if "mllm" in model.parts:
            with torch.no_grad():
                model.mllm.queries.copy_(torch.randn(model.mllm.queries.shape, generator=generator) * 0.02)
            if "connector" in model.parts:
                copy_from_llm(model.connector, model.mllm)
        return model.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        parts: Sequence[str] | None = None,
        quantization: str | None = None,
        low_memory: bool = False,
    ) -> UniLIP:
        """Load a model: nothing for the embedded one, else a folder, a file or a hub id, in any known format.

        Args:
            source: our folder, the authors' folder, a stage-1 or tokenizer checkpoint, or "owner/name".
            dtype: of the weights in memory; float32 by default, "auto" for what is stored (float32 where the processor
                has no instructions for that).
            device: where to put them; the CPU by default.
            parts: load only these (of encoder, latent_head, pixel_decoder, mllm, connector, dit).
            quantization: "int8", "int4" or "fp8": keep the weights of linear layers so; needs the package torchao.
            low_memory: hold only the part that is at work, reading it from the checkpoint each time it is needed, and
                decode one picture at a time, in strips. The pictures stay the same.

        Raises:
            CheckpointError: missing, truncated, of an unknown kind, or not exactly the weights that the model needs.
        """
        opened = read.open_checkpoint(source)
        wanted = opened.parts if parts is None else tuple(parts)
        missing = sorted(set(wanted) - set(opened.parts))
        if missing:
            raise UniLIPError(f"{opened.path} has no {', '.join(missing)}; it holds: {', '.join(opened.parts)}.")
        with Unmade():
            model = cls(opened.config, parts=wanted)
        empty(model)
        where = torch.device(device or "cpu")

        def load(part: str) -> None:
            read.load_into(model, opened, dtype=dtype, device=where, parts=(part,))
            if quantization is not None and part in QUANTIZED:
                quantize(model.get_submodule(part), quantization)
            model.get_submodule(part).eval()

        if quantization is not None:
            quantize(nn.Identity(), quantization)  # complains before anything is read
        if low_memory:
            model.to(read.parse_dtype(dtype))  # nothing is there yet: only what it says of itself changes
            model._offload = Offload(model, model.parts, where, load)
            model.enable_tiling()
        else:
            for part in model.parts:  # one by one, so that no more than one is ever there unquantised
                load(part)
        if opened.tokenizer_path is not None:
            model.processor = Processor.from_folder(opened.tokenizer_path, opened.config)
        return model.eval()

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> None:
        """Write config, weights (sharded above `max_shard_size`) and tokenizer to a folder, whole or not at all."""
        if self._offload is not None or any(is_quantized(part) for part in self.children()):
            raise UniLIPError(
                "An offloaded or quantised model cannot be saved; load the checkpoint plainly to save it."
            )
        tokenizer = self.processor.tokenizer if self.processor else None
        write.save(self, self.config, folder, max_shard_size=max_shard_size, tokenizer=tokenizer, dtype=dtype)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a temporary folder and upload it; returns the address."""
        return write.push_model(self, repo_id, **options)

    def load_adapter(self, folder: str | os.PathLike[str], name: str | None = None, scale: float = 1.0) -> str:
        """Put a LoRA or DoRA adapter (a folder in peft's format) beside the weights; returns its name.

        It acts at once, `scale` times as strongly as trained, together with those loaded before it.

        Raises:
            UniLIPError: it does not fit the model, is damaged, or peft is missing.
        """
        return adapters.load_adapter(self, folder, name, scale)

    def set_adapters(self, scales: Mapping[str, float]) -> None:
        """Make exactly these loaded adapters act, each as strongly as said; an empty mapping switches all off."""
        adapters.set_adapters(self, scales)

    def merge_adapters(self) -> None:
        """Add the acting adapters to the weights for good; the model can then be saved as any other."""
        adapters.merge_adapters(self)

    def unload_adapters(self) -> None:
        """Take all adapters off."""
        adapters.unload_adapters(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UniLIP:
        """Move or cast the model, but keep what is computed rather than learned (positions) in float32.

        Rotary frequencies rounded to bfloat16 turn the far tokens of a prompt by a radian and more.
        """
        if self._offload is not None:
            raise UniLIPError("The parts of this model come and go; give device and type when it is loaded.")
        computed = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and name in module._non_persistent_buffers_set
        }
        super()._apply(fn, recurse)
        self._unconditional = None
        for (module, name), before in computed.items():
            after = module._buffers[name]
            if after is not None and after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the work is done: where the weights are, or where they are brought to."""
        return next(self.parameters()).device if self._offload is None else self._offload.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; of those that are at work where parts come and go."""
        present = () if self._offload is None else sorted(self._offload.present)
        return next((self.get_submodule(present[0]) if present else self).parameters()).dtype

    def require(self, *parts: str) -> None:
        """Raise a clear error when a part is not loaded."""
        missing = [name for name in parts if name not in self.parts]
        if missing:
            raise UniLIPError(
                f"This needs {', '.join(missing)}, but the model was loaded with {', '.join(self.parts)} only; "
                "load a whole UniLIP checkpoint."
            )

    # --- speed and memory -------------------------------------------------------------------------------------------

    def compile(  # type: ignore[override]  # of `nn.Module`, which compiles `forward`; there is none here
        self, *, bucket: int = BUCKET, **options: Any
    ) -> UniLIP:
        """Compile the step of the diffusion transformer and the pixel decoder; on CUDA record the loop as one graph.

        The first picture of each size and each number of pictures at once is slow. Conditions grow to a multiple of
        `bucket` tokens, so that the length of a prompt matters no more. A callback on each step, or a preset that
        reuses blocks, runs compiled steps without the graph. `options` go to `torch.compile`.
        """
        self.require("dit")
        if self._offload is not None:
            raise UniLIPError("A model whose parts come and go cannot be compiled; choose one of the two.")
        decode: Callable[[Tensor], Tensor] = nn.Identity()
        if "pixel_decoder" in self.parts:
            decode = self.pixel_decoder.decode
            if self.device.type == "cuda":  # where convolutions want it so; on the CPU it gains nothing
                self.pixel_decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._compiled = Compiled(self.dit, decode, bucket, **options)
        return self

    def enable_cpu_offload(self, device: torch.device | str = "cuda") -> UniLIP:
        """Keep the weights in main memory and bring each part to a device only while it works."""
        if self._compiled is not None or self._twin or self._offload is not None:
            raise UniLIPError("A compiled, split or offloaded model cannot be offloaded; choose one of them.")
        self._unconditional = None
        self._offload = Offload(self.to("cpu"), self.parts, torch.device(device))
        return self

    def enable_tiling(self, strips: int = 4) -> UniLIP:
        """Decode one picture at a time, in strips where the decoder works locally: the same pixels in less memory."""
        if strips < 1:
            raise UniLIPError(f"strips is {strips}; it must be at least 1.")
        if "pixel_decoder" in self.parts:
            self.pixel_decoder.strips, self.pixel_decoder.sliced = strips, strips > 1
        return self

    def split_guidance(self, device: torch.device | str) -> UniLIP:
        """Put a copy of the diffusion transformer, as it is now, on a second device, for the unconditional half."""
        self.require("dit")
        if self._offload is not None:
            raise UniLIPError("A model whose parts come and go cannot be split over devices; choose one of the two.")
        twin = copy.deepcopy(self.dit)
        self._twin = [twin.to(device).eval()]
        return self

    def quantize(self, kind: str) -> UniLIP:
        """Keep the weights of linear layers as "int8", "int4" or "fp8" from now on; needs the package torchao."""
        if self._offload is not None:
            raise UniLIPError("Quantise before offloading, or give `quantization` to `from_pretrained`.")
        for part in set(self.parts) & set(QUANTIZED):
            quantize(self.get_submodule(part), kind)
        self._unconditional = None
        return self

    def _using(self, *parts: str) -> contextlib.AbstractContextManager[None]:
        """Have these parts on the device for a while, and gone afterwards, if parts come and go at all."""
        return contextlib.nullcontext() if self._offload is None else self._offload.using(*parts)

    def _processor(self, image_size: int | None = None) -> Processor:
        if self.processor is None:
            raise UniLIPError(
                "This model has no tokenizer; put the tokenizer files beside the checkpoint and load it again."
            )
        return self.processor.resized(image_size)

    # --- pieces that training shares --------------------------------------------------------------------------------

    def conditions(self, tokens: Tokens, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turn prompts, and the features (M,N,D) of their pictures, into the DiT's condition (paper, section 3.2).

        Returns the condition (B,L,C) and its mask (B,L), L = T + Q; in ablations Q or T, as `config.condition` says.
        """
        self.require("mllm", "connector")
        with self._using("mllm", "connector"):
            return self._conditions(tokens, features)

    def _conditions(self, tokens: Tokens, features: Tensor | None) -> tuple[Tensor, Tensor]:
        embeddings, mask = self.mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask
        if self.config.condition == "hidden":
            hidden = self.mllm(embeddings, mask)
        else:
            hidden, mask = self.mllm.read_with_queries(embeddings, mask)
        if features is not None and self.config.substitute_features:
            hidden = substitute_features(hidden, tokens.image_slots, features)
        if self.config.condition == "queries":
            prompt = tokens.attention_mask.shape[1]
            hidden, mask = hidden[:, prompt:], mask[:, prompt:]
        return self.connector(hidden, mask), mask

    def to_latent(self, features: Tensor, height: int | None = None) -> Tensor:
        """Return the diffusion-space latent (M,Z,h,w), float32, of features (M,N,D): latent head, mean and factor."""
        with self._using("latent_head"):
            latent = self.latent_head(features, height).float()
        mean, factor = self._latent_scale(latent)
        return (latent - mean) * factor

    def from_latent(self, latent: Tensor) -> Tensor:
        """Return pixels (M,3,H,W) in [0,1] of diffusion-space latents (M,Z,h,w)."""
        mean, factor = self._latent_scale(latent)
        decode = self.pixel_decoder.decode if self._compiled is None else self._compiled.decode
        with self._using("pixel_decoder"):
            decoded = decode((latent / factor + mean).to(self.dtype))
        pixels = resize_to_tokens(decoded.float().clamp(-1, 1))  # clamped before the resize, as the released code does
        return (pixels + 1) / 2

    def _latent_scale(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, factor = (
            torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)
            for value in (self.config.latent_mean, self.config.latent_factor)
        )
        return mean, factor

    # --- the four abilities -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        solver: str | None = None,
        preset: str = "quality",
        image_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
    ) -> ImageOutput:
        """Draw pictures of one prompt or several.

        Args:
            prompt: what to draw.
            negative_prompt: what guidance moves away from, in place of the unconditional prompt.
            num_images_per_prompt: pictures of each prompt; the result is ordered prompt by prompt.
            num_inference_steps, guidance_scale, solver: of the sampler; the model's own defaults when left out.
                Guidance at or below 1 is off and halves the work.
            generator: one, used for the pictures in order, or a list with one for each picture.
            preset: "quality" samples as published; "balanced" and "fast" save evaluations for a part of the quality.
                What is given besides (steps, solver) counts more than the preset.
            image_size: square size in pixels, a multiple of 28; the model's own by default.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as f(model, step, timestep, {"latents": ...}) after each step; may return
                {"latents": ...} to replace them, may raise to stop.
            progress: show a bar on a terminal.

        Raises:
            UniLIPError: a value out of range, an empty or overlong prompt, or a missing part.
        """
        prompts = [check_prompt(p) for p in _as_list(prompt)]
        settings = self._sampling(
            num_inference_steps, guidance_scale, solver, num_images_per_prompt, output_type, preset
        )
        self.require("mllm", "connector", "dit", *(() if output_type == "latent" else ("pixel_decoder",)))
        processor = self._processor(image_size)
        if not prompts:
            return ImageOutput([])
        negative = None if negative_prompt is None else check_prompt(negative_prompt, "negative prompt")
        tokens = processor.tokenize([processor.generate_text(p) for p in prompts]).to(self.device)
        index = torch.arange(len(prompts)).repeat_interleave(num_images_per_prompt).to(self.device)
        with self._using("mllm", "connector"):
            conditions = self.conditions(tokens)
            blank = self._blank_condition(processor, negative) if settings.guidance_scale > 1 else None
        with self._using("dit"):
            prepared = self.dit.prepare(*conditions).select(index)
            if blank is not None:
                prepared = stack([blank().select(torch.zeros_like(index)), prepared])
            latents = self._sample(
                prepared, len(index), settings, preset, processor.image_size, generator, callback_on_step_end, progress
            )
        return ImageOutput(self._output(latents, output_type))

    @torch.no_grad()
    def edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        solver: str | None = None,
        preset: str = "quality",
        fit: Fit = "resize",
        keep_aspect: bool = False,
        image_size: int | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: bool = True,
    ) -> ImageOutput:
        """Change pictures as instructed: one image and one instruction, or equally many of both.

        Args:
            image: the source picture(s), any size and mode.
            prompt: the instruction(s). One instruction may serve several images, and the other way round.
            fit: how a source becomes the model's square: "resize" stretches it, "crop" keeps its centre, "pad" adds a
                white border.
            keep_aspect: return Pillow pictures at the source's aspect ratio (undoes "resize" and "pad").

        The other arguments are those of `generate`.
        """
        sources = [load_image(i) for i in _as_list(image)]
        prompts = [check_prompt(p, "instruction") for p in _as_list(prompt)]
        settings = self._sampling(
            num_inference_steps, guidance_scale, solver, num_images_per_prompt, output_type, preset
        )
        if keep_aspect and output_type != "pil":
            raise UniLIPError(f'keep_aspect needs output_type "pil", not {output_type!r}.')
        self.require("encoder", "mllm", "connector", "dit", *(() if output_type == "latent" else ("pixel_decoder",)))
        processor = self._processor(image_size)
        if not sources or not prompts:
            return ImageOutput([])
        if len(sources) != len(prompts) and 1 not in (len(sources), len(prompts)):
            raise UniLIPError(
                f"{len(sources)} images and {len(prompts)} instructions were given; give one of either, or as many."
            )
        negative = None if negative_prompt is None else check_prompt(negative_prompt, "negative prompt")
        count = max(len(sources), len(prompts))
        source_of = torch.arange(count) if len(sources) == count else torch.zeros(count, dtype=torch.long)
        prompts = prompts * count if len(prompts) == 1 else prompts

        with self._using("encoder"):
            features = self.encoder(processor.pixels(sources, fit).to(self.device))  # M N D
        texts = [processor.edit_text(p) for p in prompts]
        own = features[source_of.to(self.device)]  # B N D
        index = torch.arange(count).repeat_interleave(num_images_per_prompt)
        if settings.guidance_scale > 1:
            texts = [processor.edit_text(negative)] * len(sources) + texts
            features, rows = torch.cat([features, own]), torch.cat([source_of[index], index + len(sources)])
        else:
            features, rows = own, index
        tokens = processor.tokenize(texts).to(self.device)
        conditions = self.conditions(tokens, features)
        with self._using("dit"):
            prepared = self.dit.prepare(*conditions).select(rows.to(self.device))
            latents = self._sample(
                prepared, len(index), settings, preset, processor.image_size, generator, callback_on_step_end, progress
            )
        images = self._output(latents, output_type)
        if keep_aspect:
            sizes = [sources[source].size for source in source_of[index]]
            images = [unfit_square(picture, size, fit) for picture, size in zip(images, sizes, strict=True)]
        return ImageOutput(images)

    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        fit: Fit = "resize",
        keep_aspect: bool = False,
        image_size: int | None = None,
        output_type: str = "pil",
    ) -> ImageOutput:
        """Encode pictures to features and draw them again; what is lost is what the encoder does not know.

        `output_type` "latent" gives the latent (B,Z,h,w) in the diffusion transformer's scale.
        """
        if output_type not in OUTPUT_TYPES:
            raise UniLIPError(f"There is no output type {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}.")
        if keep_aspect and output_type != "pil":
            raise UniLIPError(f'keep_aspect needs output_type "pil", not {output_type!r}.')
        self.require("encoder", "latent_head", *(() if output_type == "latent" else ("pixel_decoder",)))
        sources = [load_image(i) for i in _as_list(image)]
        if not sources:
            return ImageOutput([])
        size = self.config.image_size if image_size is None else self.config.replace(image_size=image_size).image_size
        pixels = to_pixels([fit_square(source, size, fit) for source in sources]).to(self.device)
        with self._using("encoder"):
            features = self.encoder(pixels)
        images = self._output(self.to_latent(features), output_type)
        if keep_aspect:
            images = [unfit_square(picture, source.size, fit) for picture, source in zip(images, sources, strict=True)]
        return ImageOutput(images)

    @torch.no_grad()
    def ask(
        self,
        image: ImageLike | Sequence[Any] | None,
        question: str | Sequence[str],
        *,
        history: Sequence[Mapping[str, Any]] = (),
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        max_tiles: int = 1,
        stream: bool = False,
    ) -> str | list[str] | Iterator[str]:
        """Answer a question about pictures.

        Args:
            image: a picture, a list of pictures that one question is about, or None. With a list of questions, a list
                with an entry of that kind for each.
            question: one question, or a list of them (answered as a batch).
            history: earlier turns as {"role": "user" | "assistant", "content": text, "images": [...]}.
            temperature, top_p, generator: greedy at temperature 0, else sampled.
            max_tiles: cut each picture into up to this many squares plus a thumbnail (dynamic resolution).
            stream: return an iterator of text pieces instead (one question only).

        Raises:
            UniLIPError: a value out of range, a list of another length, a missing part.
        """
        self.require("encoder", "mllm")
        processor = self._processor()
        if not 0 <= temperature < math.inf:
            raise UniLIPError(f"temperature is {temperature}; it must be a number of at least 0 (0 is greedy).")
        if not 0 < top_p <= 1:
            raise UniLIPError(f"top_p is {top_p}; it must be greater than 0 and at most 1 (1 keeps every token).")
        for name, value in (("max_new_tokens", max_new_tokens), ("max_tiles", max_tiles)):
            if value < 1:
                raise UniLIPError(f"{name} is {value}; it must be at least 1.")
        questions = _as_list(question)
        single = not isinstance(question, (list, tuple))
        if single:
            pictures = [image]
        else:
            pictures = list(image) if isinstance(image, (list, tuple)) else [image] * len(questions)
            if len(pictures) != len(questions):
                raise UniLIPError(
                    f"{len(pictures)} images and {len(questions)} questions were given; give one for each."
                )
        if stream and not single:
            raise UniLIPError("Streaming answers one question at a time; give a string, not a list.")
        if not questions:
            return []

        squares: list[Image.Image] = []

        def cut(images: Any) -> tuple[int, ...]:
            given = [] if images is None else _as_list(images)
            tiles = [tile(load_image(image), processor.image_size, max_tiles) for image in given]
            squares.extend(square for picture in tiles for square in picture)
            return tuple(len(picture) for picture in tiles)

        texts = []
        for text, images in zip(questions, pictures, strict=True):
            turns = [_turn(turn, cut) for turn in history]
            turns.append(Message("user", check_prompt(text, "question"), cut(images)))
            texts.append(processor.chat_text(turns))
        tokens = processor.tokenize(texts).to(self.device)
        features = None
        if squares:
            with self._using("encoder"):
                features = self.encoder(to_pixels(squares).to(self.device))

        def answer() -> Iterator[Tensor]:
            with self._using("mllm"):
                yield from self.mllm.answer(
                    self.mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask,
                    end_id=processor.end_id, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
                    generator=generator,
                )  # fmt: skip

        columns = answer()
        if stream:
            return _stream(columns, processor)
        answers = processor.decode(torch.stack(list(columns), 1))
        return answers[0] if single else answers

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _sampling(
        self, steps: int | None, guidance: float | None, solver: str | None, images: int, output_type: str, preset: str
    ) -> SamplingConfig:
        short = shortcut(preset)
        given: dict[str, Any] = {
            "num_inference_steps": short.steps if steps is None else steps,
            "guidance_scale": guidance,
            "solver": short.solver if solver is None else solver,
            "flow_shift": short.shift,
        }
        settings = dataclasses.replace(self.config.sampling, **{k: v for k, v in given.items() if v is not None})
        if images < 1:
            raise UniLIPError(f"num_images_per_prompt is {images}; it must be at least 1.")
        if output_type not in OUTPUT_TYPES:
            raise UniLIPError(f"There is no output type {output_type!r}; allowed: {', '.join(OUTPUT_TYPES)}.")
        return settings

    def _blank_condition(self, processor: Processor, negative: str | None) -> Callable[[], PreparedCondition]:
        """Return a function that gives the condition (1 row) of what guidance moves away from; needs the DiT at hand.

        It is the same from call to call, so the last one is kept as long as the weights stay as they are.
        """
        weights = None if self.training else fingerprint([self.mllm, self.connector, self.dit])
        key = (negative, weights)
        if weights is not None and self._unconditional is not None and self._unconditional[0] == key:
            kept = self._unconditional[1]
            return lambda: kept
        conditions = self.conditions(processor.tokenize([processor.generate_text(negative)]).to(self.device))

        def prepare() -> PreparedCondition:
            prepared = self.dit.prepare(*conditions)
            self._unconditional = None if weights is None or self._offload is not None else (key, prepared)
            return prepared

        return prepare

    def _sample(
        self,
        prepared: PreparedCondition,
        count: int,
        settings: SamplingConfig,
        preset: str,
        image_size: int,
        generator: Generators,
        callback: StepCallback | None,
        progress: bool,
    ) -> Tensor:
        """Denoise `count` latents, one for each row of the condition; under guidance unconditional rows come first."""
        grid, steps = image_size // TOKEN_PIXELS, settings.num_inference_steps
        noise = draw_noise(count, (self.config.dit.latent_channels, grid, grid), generator).to(self.device)
        short, compiled = shortcut(preset), self._compiled
        guided, reused = short.guided_steps(steps), short.reused_steps(steps)
        twin = self._twin[0] if self._twin else None

        def make(
            condition: PreparedCondition, on_step: Callable[[int, Tensor, Tensor], Tensor | None] | None = None
        ) -> Callable[[Tensor], Tensor]:
            planned = plan(settings.solver, settings.flow_shift, steps).to(self.device)
            modulations = self.dit.modulate(planned.timesteps)
            step = None if compiled is None else compiled.step
            velocity = Velocity(self.dit, condition, modulations, count, reused, step, twin)
            return lambda start: integrate(velocity, start, planned, settings.guidance_scale, on_step, guided)

        if compiled is not None:
            prepared = compiled.fit(prepared)
            if callback is None and not reused and twin is None:
                return compiled.loop((settings, preset), fingerprint([self.dit]), make, noise, prepared)
        bar = tqdm(total=steps, disable=None if progress else True, leave=False, unit="step")

        def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
            bar.update()
            result = callback(self, step, timestep, {"latents": latents}) if callback else None
            return None if result is None else result.get("latents")

        guidance = len(prepared.mask) > count
        calls = sum(i not in reused and (not guidance or now) for i, now in enumerate(guided))
        if compiled is not None or self._offload is not None:  # code of its own; little memory
            calls = 0
        rows = len(prepared.mask) * grid * grid
        with contextlib.closing(bar), self.dit.with_packed_weights(rows, calls):
            return make(prepared, on_step)(noise)

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pixels = self.from_latent(latents)
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return np.ascontiguousarray(pixels.movedim(1, -1).cpu().numpy())
        return to_images(pixels)


def _as_list(value: Any) -> list[Any]:
    """Take one or several as a list: a list or tuple is several, anything else is one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _turn(turn: Any, cut: Callable[[Any], tuple[int, ...]]) -> Message:
    """Read an earlier turn of a conversation; `cut` takes its pictures and counts the squares of each."""
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise PromptError('A turn of the history must be {"role": ..., "content": text}, with "images" if it has any.')
    return Message(turn["role"], check_prompt(turn["content"], "message"), cut(turn.get("images")))


def _stream(columns: Iterator[Tensor], processor: Processor) -> Iterator[str]:
    """Yield text as it becomes final: a piece is held back while it may still be half a character."""
    ids: list[Tensor] = []
    shown = text = ""
    for column in columns:
        ids.append(column)
        text = processor.decode(torch.stack(ids, 1))[0]
        if text.startswith(shown) and not text.endswith("\ufffd") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if text.startswith(shown) and len(text) > len(shown):
        yield text[len(shown) :]
