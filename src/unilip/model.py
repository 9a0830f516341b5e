"""UniLIP for users: load, save, generate, edit, reconstruct, ask, encode, decode.

In:  a checkpoint; prompts, pictures and settings as people give them, checked before any work is done. Out: pictures as
Pillow, numpy or torch has them; answers; features (M,N,D) and latents (M,Z,h,w).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import math
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.std import tqdm

from unilip import adapters, pictures, sampling, shapes
from unilip.chat import Chat
from unilip.checkpoints import read, write
from unilip.checkpoints.hub import Adapted, Source, check_fetching
from unilip.errors import ImageError, PromptError, UniLIPError, check_choice, check_flag, check_number
from unilip.fast.choose import choose
from unilip.fast.loop import BUCKET, Compiled, Settings
from unilip.fast.offload import HEAD, Offload, Unmade, empty, give_back
from unilip.fast.quantise import kinds_of, quantise
from unilip.machine import PERFORMANCES, choose_device
from unilip.method.config import TOKEN_PIXELS, UniLIPConfig
from unilip.method.connector import copy_from_llm
from unilip.method.model import PARTS, Network, Reader
from unilip.method.text import Message, Processor, Prompt, Tokens
from unilip.pictures import Fit, ImageLike, fit_picture, to_pixels, unfit_square
from unilip.shapes import Size

logger = logging.getLogger(__name__)

DRAWING = ("pixel_decoder", "mllm", "connector", "dit")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
HOLES = 2**27  # give memory back after quantising so many bytes
MOST_IMAGES, MOST_TILES, LONGEST_BUCKET = 10_000, 1_000, 65_536
MOST_TRIES = 64  # to choose the best of
StepCallback = Callable[["UniLIP", int, Tensor, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(frozen=True)
class ImageOutput:
    """Pictures of a call: Pillow images, an array (B,H,W,3) or tensor (B,3,H,W) in [0,1], or latents; indexable."""

    images: Any
    plans: tuple[str, ...] = ()  # the prompts as the language model wrote them out, one for each, where it did

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.images)

    def _repr_html_(self) -> str:
        if not all(isinstance(image, Image.Image) for image in self.images):
            return f"<pre>{type(self.images).__name__} {list(getattr(self.images, 'shape', ()))}</pre>"
        return pictures.as_html(self.images)


@contextlib.contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Make tensors there where no device is named, whatever PyTorch's default is."""
    with torch.device("cpu"):
        yield


class Part:
    """A part of a `UniLIP`: what moves it, casts it or gives it other weights waits for the model's work."""

    runtime: sampling.Runtime
    _apply = sampling.changes(nn.Module._apply)
    load_state_dict = sampling.changes(nn.Module.load_state_dict)


HELD = {name: type(f"Held{kind.__name__}", (Part, kind), {"__module__": __name__}) for name, kind in PARTS.items()}
globals().update({held.__name__: held for held in HELD.values()})  # where pickle looks for them


class UniLIP(Network):
    """The model. `parts` names what is built; a tokenizer checkpoint, for instance, has no LLM and no DiT."""

    kinds = HELD

    def __init__(
        self, config: UniLIPConfig, processor: Processor | None = None, parts: Sequence[str] = tuple(PARTS)
    ) -> None:
        super().__init__(config, parts)
        self.processor = processor
        self.runtime = sampling.Runtime()
        children: Any = self.children()
        for part in children:
            part.runtime = sampling.Runtime(gate=self.runtime.gate)

    # --- making and keeping ---

    @classmethod
    @_on_the_cpu()
    @torch.no_grad()
    def from_config(cls, config: UniLIPConfig, seed: int = 0, parts: Sequence[str] = tuple(PARTS)) -> UniLIP:
        """Build a float32 model with random weights that depend on `seed` alone; the connector copies the LLM's end."""
        if not isinstance(config, UniLIPConfig):
            raise UniLIPError(f"config is {config!r}; give a UniLIPConfig, for instance preset('tiny').")
        seed, parts = check_number("seed", seed, -(2**63), 2**64 - 1, whole=True), _names(parts)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # of the CPU alone, where the weights are drawn
                model = cls(config, parts=parts)
        finally:
            torch.set_default_dtype(usual)
        generator = torch.Generator().manual_seed(seed)
        if "encoder" in parts:
            tower = model.encoder.vision_tower
            draw_small(tower, generator, tower.embeddings.cls_token, tower.embeddings.position_embeddings)
        if "mllm" in parts:
            draw_small(model.mllm.language_model, generator, model.mllm.queries)
            if "connector" in parts:
                copy_from_llm(model.connector, model.mllm)
        return model.eval()

    @classmethod
    @_on_the_cpu()
    def from_pretrained(
        cls,
        source: Source | read.Checkpoint = None,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        parts: Sequence[str] | None = None,
        quantization: str | Mapping[str, str] | None = None,
        low_memory: bool | None = None,
        performance: str = "exact",
        decoder: str | os.PathLike[str] | None = None,
        **fetching: Any,
    ) -> UniLIP:
        """Load a model: nothing for the embedded one, else a folder, a file or a hub id, in any known format.

        Args:
            source: our folder, the authors' folder, a stage-1 or tokenizer checkpoint, "owner/name", or one opened; an
                adapter's folder stands for the model that it names, with the adapter beside it.
            dtype: of the weights in memory; float32 by default, "auto" for what is stored (float32 where the processor
                has no instructions for that).
            device: where to put them; the CPU by default, "auto" for CUDA where there is one.
            parts: load only these (of encoder, latent_head, pixel_decoder, mllm, connector, dit), or "drawing": the
                last four, without the language head where pictures have no use for it.
            quantization: "int8", "int4" or "fp8": weight-only quantisation of linear layers; "int8_dynamic": as
                int8, and in connector and DiT products in int8, whose inputs are rounded as they come; or a kind for
                each of some parts, as a mapping or "dit=int8_dynamic,mllm=int8"; "none". Needs torchao.
            low_memory: hold only the part that is at work, reading it from the checkpoint each time it is needed, and
                decode one picture at a time, in strips. The pictures stay the same.
            performance: what counts, where the options above are left out: "exact" is float32, all in memory; "auto"
                is that, with low_memory where it would not fit, and pictures within 60 dB of exact ones; "speed" takes
                the types in which this machine was measured to be fastest, which may make another picture of some;
                "memory" needs the least. A line of the log says what was chosen.
            decoder: another pixel decoder, as the recipe SIZE/small_decoder makes one: its folder, or "small" for the
                folder small_decoder beside the weights. Saved, the model has it as its own.
            fetching: of the hub: revision, token, cache_dir, local_files_only; and variant, in the names of the files.

        Raises CheckpointError: missing, truncated, of an unknown kind, or not exactly the weights that the model needs.
        """
        if not (source is None or isinstance(source, (str, os.PathLike, Adapted, read.Checkpoint))):
            raise UniLIPError(f"source is {source!r}; give a folder, a file or a hub id as text or path.")
        where = _device("cpu" if device is None else device)
        low_memory = None if low_memory is None else check_flag("low_memory", low_memory)
        check_choice("performance", performance, PERFORMANCES)
        kinds = None if quantization is None else kinds_of(quantization)
        if isinstance(source, read.Checkpoint) and (late := check_fetching(fetching)):
            raise UniLIPError(f"{source.path} is opened already; give {', '.join(late)} to open_checkpoint.")
        opened = source if isinstance(source, read.Checkpoint) else read.open_checkpoint(source, **fetching)
        if kinds:
            opened.require_plain(f"cannot be quantised to {quantization} anew", alone=False)
        drawing = isinstance(parts, str) and parts == "drawing"
        wanted = opened.parts if parts is None else DRAWING if drawing else _names(parts)
        beside = [adapters.read_adapter(folder) for folder, _ in opened.adapters]
        wanted = tuple(dict.fromkeys([*wanted, *(part for adapter in beside for part in adapter.parts)]))
        if not wanted:
            raise UniLIPError(f"parts is {parts!r}; name one or more of {', '.join(opened.parts)}.")
        if missing := sorted(set(wanted) - set(opened.parts)):
            raise UniLIPError(f"{opened.path} has no {', '.join(missing)}; it holds: {', '.join(opened.parts)}.")
        if decoder is not None and "pixel_decoder" not in wanted:
            raise UniLIPError(f"decoder is {str(decoder)!r}, but parts leaves pixel_decoder out; give one of the two.")
        other = None if decoder is None else read.open_decoder(opened, decoder)
        if performance != "exact":
            numbers = sum(math.prod(opened.shape(n)) for n in opened.names if n.partition(".")[0] in wanted)
            dtype, kinds, low_memory, said = choose(
                performance, opened.config, numbers, where, low_memory=low_memory,
                dtype=None if dtype is None else read.parse_dtype(dtype),
                quantization={} if opened.quantized else kinds,
            )  # fmt: skip
            logger.info("%s", said)
        config = opened.config if other is None else opened.config.replace(decoder=other.config.decoder)
        with Unmade():
            model = cls(config, None if opened.tokenizer is None else Processor(opened.tokenizer, config), wanted)
        drawing = drawing and not beside and not opened.config.sampling.plan  # which the head writes
        for adapter in beside:
            adapters.fitting(model, adapter, opened.tensor)  # complains before weights are read
        if drawing and not opened.config.text.tie_embeddings:
            del model.mllm.language_model.lm_head
        later = (f"{HEAD}.weight",) if low_memory or drawing else ()

        holes = 0  # bytes of weights that were quantised since their memory was last given back

        def settle(model: nn.Module, name: str, layer: nn.Module) -> None:
            nonlocal holes
            adapters.take_in(model, name, layer)
            if kind := (kinds or {}).get(name.partition(".")[0]):
                holes += sum(p.nbytes for p in layer.parameters())
                quantise(layer, kind)
                if holes > HOLES:
                    holes = give_back()

        def load(model: nn.Module, part: str) -> None:
            source = other if other is not None and part == "pixel_decoder" else opened
            leave = later if part == "mllm" else ()
            own = functools.partial(settle, model)  # of a copy, whose adapters are its own
            read.load_into(model, source, dtype=dtype, device=where, parts=(part,), leave=leave, settle=own)
            give_back()

        if low_memory:
            empty(model.to(read.parse_dtype(dtype)))  # nothing is there yet: only what it says of itself changes
            offload = model.runtime.offload = Offload(model, model.parts, where, load)
            offload.stored, offload.quantized = opened.tensor, bool(opened.weights.quantized)
            model.enable_tiling()
        else:
            for part in model.parts:
                load(model, part)
        if performance == "memory":
            model.runtime.products = None
        for adapter, (folder, scale) in zip(beside, opened.adapters, strict=True):
            taken, name = adapters.adapter_names(model), adapters.called(folder)
            adapters.load_adapter(model, adapter, name if name not in taken else f"{name}{len(taken)}", scale)
        return model.eval()

    @sampling.works
    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        max_shard_size: str = "5GB",
        to: str = "unilip",
    ) -> None:
        """Write config, weights (sharded above `max_shard_size`) and tokenizer, whole; `to` "diffusers", too."""
        check_choice("format to save in", to, ("unilip", "diffusers"))
        self._check_resting("A model whose parts come and go cannot be saved; load it plainly to save it.")
        if beside := adapters.adapter_names(self):
            raise UniLIPError(f"{', '.join(beside)}: adapters lie beside the weights; merge or unload them, then save.")
        write.save(
            self, self.config, sampling.check_path("folder", folder), max_shard_size=max_shard_size, dtype=dtype, to=to,
            tokenizer=self.processor.tokenizer if self.processor else None,
        )  # fmt: skip

    push_to_hub = write.push_model
    load_adapter, set_adapters = adapters.load_adapter, adapters.set_adapters
    merge_adapters, unload_adapters = adapters.merge_adapters, adapters.unload_adapters

    @sampling.changes
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._check_resting("The parts of this model come and go; give device and type when it is loaded.")
        return super()._apply(fn, recurse)

    @sampling.changes
    def load_state_dict(self, *values: Any, **named: Any) -> Any:
        """Take other weights; see `torch.nn.Module`."""
        self._check_resting("The parts of this model come and go; save these weights and load the folder instead.")
        return super().load_state_dict(*values, **named)

    def _check_resting(self, otherwise: str) -> None:
        """Raise an error where parts come and go."""
        if self.runtime.offload is not None:
            raise UniLIPError(otherwise)

    @property
    def device(self) -> torch.device:
        """Where the work is done: where the weights are, or where they are brought to."""
        offload = self.runtime.offload
        return next(self.parameters()).device if offload is None else offload.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights; of those that are at work where parts come and go."""
        offload = self.runtime.offload
        present = () if offload is None else sorted(offload.present)
        return next((self.get_submodule(present[0]) if present else self).parameters()).dtype

    def require(self, *parts: str) -> None:
        """Raise a clear error when a part is not loaded."""
        if missing := [name for name in map(str, parts) if name not in self.parts]:
            raise UniLIPError(
                f"This needs {', '.join(missing)}, but the model was loaded with {', '.join(self.parts)} only; "
                "load a whole UniLIP checkpoint."
            )

    def using(self, *parts: str) -> contextlib.AbstractContextManager[None]:
        """Have parts on the device within the block; for whoever calls `model.encoder` and its like directly."""
        self.require(*(part.partition(".")[0] for part in parts))
        return self.runtime.using(*parts)

    # --- speed and memory ---

    @sampling.changes
    def compile(self, *, bucket: int = BUCKET, **options: Any) -> UniLIP:  # type: ignore[override]  # has no `forward`
        """Compile the step of the diffusion transformer and the pixel decoder; on CUDA record the loop as one graph.

        The first picture of each size and number of pictures at once is slow. Conditions are left-padded to a multiple
        of `bucket` tokens. A callback on each step runs without the graph. `options` go to `torch.compile`.
        """
        self.require("dit")
        bucket = check_number("bucket", bucket, 1, LONGEST_BUCKET, whole=True)
        self._check_resting("A model whose parts come and go cannot be compiled; choose one of the two.")
        if "pixel_decoder" in self.parts and self.device.type == "cuda":  # convolutions want it so there
            self.pixel_decoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.runtime.compiled = Compiled(self, bucket, **options)
        return self

    @sampling.changes
    def enable_cpu_offload(self, device: torch.device | str = "cuda") -> UniLIP:
        """CPU offload: keep the weights in main memory and bring each part to a device only while it works."""
        runtime = self.runtime
        if runtime.compiled is not None or runtime.second is not None or runtime.offload is not None:
            raise UniLIPError("A compiled, split or offloaded model cannot be offloaded; choose one of them.")
        where = _device(device)
        runtime.offload = Offload(self.to("cpu"), self.parts, where)
        return self

    @sampling.changes
    def enable_tiling(self, strips: int = 4) -> UniLIP:
        """Decode one picture at a time, in strips where the decoder works locally: the same pixels in less memory."""
        self.runtime.strips = check_number("strips", strips, 1, whole=True)
        return self

    @sampling.changes
    def split_guidance(self, device: torch.device | str) -> UniLIP:
        """Draw the unconditional half by a copy of the diffusion transformer on a second device, kept up to date."""
        self.require("dit")
        self._check_resting("A model whose parts come and go cannot be split over devices; choose one of the two.")
        self.runtime.second = _device(device)
        return self

    @sampling.changes
    def quantize(self, kind: str | Mapping[str, str]) -> UniLIP:
        """Quantise linear layers from now on: a kind, or one for each of some parts; see `from_pretrained`."""
        self._check_resting("Quantise before offloading, or give `quantization` to `from_pretrained`.")
        for part, its in kinds_of(kind).items():
            if part in self.parts:
                quantise(self.get_submodule(part), its)
                give_back()
        return self

    # --- features and latents ---

    @sampling.works
    @torch.no_grad()
    def encode(
        self, image: Any, *, fit: Fit = "resize", height: int | None = None, width: int | None = None,
        image_size: int | None = None, max_pixels: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the features (M,N,D) of pictures, N = (height / 28)(width / 28), row by row; one size for all."""
        self.require("encoder")
        sources, sizes = self._sources(image, fit, height, width, image_size, max_pixels)
        if not sources:
            return torch.empty(0, self.config.num_image_tokens, self.config.text.hidden_size, device=self.device)
        _check_alike(sizes)
        return self._features(sources, sizes, fit)

    def features(self, pixels: Tensor) -> Tensor:
        """Return the features (M,N,D) of normalised pixels (M,3,H,W), as `pictures.to_pixels` makes them."""
        if not isinstance(pixels, Tensor) or pixels.dim() != 4 or pixels.shape[1] != 3:
            raise ImageError(f"features takes pixels (M,3,H,W), not {_shape(pixels)}.")
        with self.using("encoder"):
            return sampling.check_finite(self.encoder(pixels.to(self.device)), "encoder")

    def _features(self, sources: Sequence[Image.Image], sizes: Sequence[Size], fit: Fit) -> Tensor:
        return self.features(to_pixels([fit_picture(s, size, fit) for s, size in zip(sources, sizes, strict=True)]))

    @sampling.works
    @torch.no_grad()
    def decode(self, values: Tensor, *, height: int | None = None, output_type: str = "pil") -> ImageOutput:
        """Draw features (M,N,D), or latents (M,Z,h,w) in the diffusion transformer's scale.

        `height` in pixels, a multiple of 28, belongs to features of pictures that were not square.
        """
        latents = isinstance(values, Tensor) and values.dim() == 4
        self.require("pixel_decoder", *(() if latents else ("latent_head",)))
        self._check_output(output_type)
        rows = None
        if height is not None:
            rows, rest = divmod(check_number("height", height, TOKEN_PIXELS, whole=True), TOKEN_PIXELS)
            if latents or rest:
                why = "latents know their shape" if latents else f"it must be a multiple of {TOKEN_PIXELS}"
                raise UniLIPError(f"height is {height}, but {why}.")
        self._check_latent(values) if latents else self._check_features(values, rows)
        values = values.to(self.device)
        if not len(values):
            return ImageOutput([])
        return ImageOutput(self._output(values if latents else self._latent(values, rows), output_type))

    def to_latent(self, features: Tensor, height: int | None = None) -> Tensor:
        """Return the latent (M,Z,h,w) in the diffusion transformer's scale, float32, of features (M,N,D)."""
        self._check_features(features, height)
        with self.using("latent_head"):
            return super().to_latent(features, height)

    def _latent(self, features: Tensor, rows: int | None = None) -> Tensor:
        """Do what `to_latent` does, and look at the result, for which training does not wait."""
        with self.runtime.using("latent_head"):
            dtype = next(self.latent_head.parameters()).dtype
            return sampling.check_finite(self.to_latent(features, rows), "latent_head", dtype)

    def from_latent(self, latent: Tensor, decode: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Return pixels (M,3,H,W) in [0,1] of latents (M,Z,h,w) in the diffusion transformer's scale."""
        self._check_latent(latent)
        if decode is not None or torch.is_grad_enabled():
            return super().from_latent(latent, decode)
        with self.using("pixel_decoder"):
            return super().from_latent(latent, lambda scaled: sampling.decode(self, self.runtime, scaled))

    def condition(
        self, tokens: Tokens, features: Tensor | None = None, read: Reader | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turn prompts, and the features (M,N,D) of their pictures, into the DiT's condition; see `Network`."""
        if not isinstance(tokens, Tokens):
            raise PromptError(f"condition takes Tokens, as processor.tokenize makes them, not {_shape(tokens)}.")
        with self.using("mllm", "connector"):
            return super().condition(tokens, features, read)

    draw = sampling.works(Network.draw, "mllm", "connector", "dit")
    flow_loss = sampling.works(Network.flow_loss, "encoder", "latent_head", "mllm", "connector", "dit")
    tokenizer_loss = sampling.works(Network.tokenizer_loss, "encoder", "latent_head", "pixel_decoder")

    # --- the four abilities ---

    @sampling.works
    @torch.no_grad()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: sampling.Generators = None,
        solver: str | None = None,
        preset: str = "quality",
        height: int | None = None,
        width: int | None = None,
        image_size: int | None = None,
        latents: Tensor | None = None,
        plan: bool | str = "auto",
        best_of: int = 1,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: sampling.Progress = True,
    ) -> ImageOutput:
        """Draw pictures of one prompt or several.

        Args:
            negative_prompt: what guidance moves away from, in place of the unconditional prompt, for all or one for
                each; "" means none.
            num_images_per_prompt: pictures of each prompt; the result is ordered prompt by prompt.
            num_inference_steps, guidance_scale, solver: of the sampler; the model's own defaults when left out.
                Guidance at or below 1 is off and halves the work.
            generator: one or a seed, used for the pictures in order, or a list with one for each picture.
            preset: "quality" samples as published; "balanced" and "fast" save evaluations for a part of the quality;
                "turbo" draws in a few jumps, with a model that was trained for them, and without guidance. What is
                given besides (steps, solver) counts more than the preset.
            height, width: in pixels, rounded to multiples of 28; of one alone, a square; the model's own by default.
            image_size: both of them, a multiple of 28.
            latents: noise (B,Z,h,w) to begin with, one for each picture, in place of what `generator` would draw.
            plan: let the language model write the prompt out, and draw that (thinking before drawing); the result's
                `plans` say what was drawn. "auto" does so where the model was trained for it (`config.sampling.plan`),
                in squares, and draws a prompt as it is when its plan lost or swapped words of it.
            best_of: draw so many for each picture, one after the other from its generator, and keep the one in which
                the model itself, asked, most surely sees the prompt. Costs as much as so many pictures.
            output_type: "pil", "np", "pt" or "latent".
            callback_on_step_end: called as f(model, step, timestep, {"latents": ...}) after each step; may return
                {"latents": ...} to replace them, may raise to stop.
            progress: show a bar on a terminal; a mapping holds tqdm's arguments for it.

        Raises UniLIPError: values out of range, an empty or overlong prompt, an infinite or NaN result, a missing part.
        """
        prompts, plan = [sampling.check_prompt(p) for p in _as_list(prompt)], sampling.check_plan(plan)
        settings = Settings.of(
            self.config, preset, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, solver=solver
        )
        copies = check_number("num_images_per_prompt", num_images_per_prompt, 1, MOST_IMAGES, whole=True)
        generator, progress = sampling.check_generator(generator), check_progress(progress)
        self._check_output(output_type, "mllm", "connector", "dit")
        side, processor = self.config.image_size, self._processor()
        size = shapes.targets([(side, side)], side, height=height, width=width, image_size=image_size)[0]
        negatives, on_step = _negatives(negative_prompt, len(prompts), settings), self._step(callback_on_step_end)
        latents = _noise(latents)
        if plan is True and not hasattr(self.mllm.language_model, "lm_head"):
            raise UniLIPError("plan is True, but the model was loaded for drawing, without its head; load all parts.")
        best_of = check_number("best_of", best_of, 1, MOST_TRIES, whole=True)
        if best_of > 1:
            self.require("encoder", "pixel_decoder")
            if latents is not None:
                raise UniLIPError(f"best_of is {best_of}, but latents are given, which leave no choice; drop one.")
            generator = [one for one in generator for _ in range(best_of)] if isinstance(generator, list) else generator
        if not prompts:
            return ImageOutput([])
        processor.tokenize([processor.generate_text(text) for text in prompts])  # complains before anything is computed
        noise = torch.stack(self._noises([size] * (len(prompts) * copies * best_of), generator, latents))
        plans: tuple[str, ...] = ()
        if plan is True or (plan == "auto" and self.config.sampling.plan and size[0] == size[1]):
            plans = tuple(sampling.write_out(self, self.runtime, processor, prompts))
            if plan == "auto":
                plans = tuple(new if sampling.keeps(new, old) else old for new, old in zip(plans, prompts, strict=True))
        latents = sampling.draw(
            self, self.runtime, processor, plans or prompts, settings, noise, negatives=negatives, on_step=on_step,
            progress=progress,
        )  # fmt: skip
        if best_of > 1:
            latents = self._best(latents, processor, [text for text in prompts for _ in range(copies)], best_of)
        return ImageOutput(self._output(latents, output_type), plans)

    def _best(self, latents: Tensor, processor: Processor, prompts: Sequence[str], count: int) -> Tensor:
        """Keep one of each COUNT latents (M COUNT,Z,h,w) of prompts (M): where the model best sees its prompt."""
        pixels, side = self.from_latent(latents), self.config.image_size
        if pixels.shape[-2:] != (side, side):  # as `ask` reads pictures
            pixels = nn.functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        features = self.features(pictures.normalise(pixels))
        asked = [prompt for prompt in prompts for _ in range(count)]
        liked = sampling.liking(self, self.runtime, processor, asked, features).view(-1, count)
        chosen = liked.argmax(1) + count * torch.arange(len(prompts), device=liked.device)
        return latents[chosen.to(latents.device)]

    @sampling.works
    @torch.no_grad()
    def edit(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: sampling.Generators = None,
        solver: str | None = None,
        preset: str = "quality",
        fit: Fit = "resize",
        keep_aspect: bool = False,
        height: int | None = None,
        width: int | None = None,
        image_size: int | None = None,
        max_pixels: int | None = None,
        joint: bool = False,
        latents: Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
        progress: sampling.Progress = True,
    ) -> ImageOutput:
        """Change pictures as instructed: one image and one instruction, or equally many of both.

        Args:
            image: the source picture(s), any size and mode; batches (B,3,H,W) and (B,H,W,3) too.
            prompt: the instruction(s). One instruction may serve several images, and the other way round.
            fit: how a source gets its size: "resize" stretches it, "crop" keeps its centre, "pad" adds a white border;
                the last two make a square where no size is given.
            keep_aspect: return Pillow pictures at the source's exact aspect ratio (undoes "resize" and "pad").
            height, width: in pixels, rounded to multiples of 28; the other of one alone follows the source's shape. By
                default a picture keeps its source's shape, as far as multiples of 28 do, and has about as many pixels
                as the model's own square. Sources that differ in shape are drawn one shape after the other.
            max_pixels: of a picture that keeps its source's shape, in place of the model's own number.
            joint: the pictures belong to one instruction, or to each: the first is changed, with the help of the
                others ("put the hat of image 2 on the cat"), which are read at their own shapes. A model that has not
                learned that (`config.sampling.joint`) draws anything; a warning says so. A single one is an error.

        The other arguments are those of `generate`.
        """
        prompts = [sampling.check_prompt(p, "instruction") for p in _as_list(prompt)]
        settings = Settings.of(
            self.config, preset, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, solver=solver
        )
        copies = check_number("num_images_per_prompt", num_images_per_prompt, 1, MOST_IMAGES, whole=True)
        generator, progress = sampling.check_generator(generator), check_progress(progress)
        self._check_output(output_type, "encoder", "mllm", "connector", "dit", keep_aspect=keep_aspect)
        processor, on_step, latents = self._processor(), self._step(callback_on_step_end), _noise(latents)
        sources, sizes = self._sources(image, fit, height, width, image_size, max_pixels)
        if not sources or not prompts:
            return ImageOutput([])
        if sampling.check_joint(joint, len(sources)):
            sizes = [sizes[0], *self._sources(sources[1:], fit, None, None, None, max_pixels)[1]]
            sampling.check_together([shapes.cells(size) for size in sizes], processor)
            if not self.config.sampling.joint:
                logger.warning("%s", sampling.NOT_TAUGHT)
        changed = [0] if joint else range(len(sources))  # the others of a joint edit are only read
        if len(changed) != len(prompts) and 1 not in (len(changed), len(prompts)):
            raise UniLIPError(f"{len(sources)} images and {len(prompts)} instructions: give one of either, or as many.")
        count = max(len(changed), len(prompts))
        negatives = _negatives(negative_prompt, count, settings)
        source_of = list(range(count)) if len(changed) == count else [0] * count
        prompts = prompts * count if len(prompts) == 1 else prompts
        if output_type != "pil" or latents is not None:
            _check_alike([sizes[source] for source in changed])
        cells = [shapes.cells(size) for size in sizes]
        for own_cells in (cells,) if joint else {(one,) for one in cells}:  # complains before anything is computed
            processor.tokenize([processor.edit_text(text, own_cells) for text in (*prompts, *negatives)])
        wanted = [sizes[source] for source in source_of for _ in range(copies)]
        noises = self._noises(wanted, generator, latents)

        def draw(size: Size, places: list[int]) -> Any:
            own = [place // copies for place in places[::copies]]
            used = sorted({source_of[i] for i in own})
            if joint:
                read = [self._features([one], [own_size], fit) for one, own_size in zip(sources, sizes, strict=True)]
                features = torch.cat(read, 1)  # 1, N of all, D
            else:
                features = self._features([sources[i] for i in used], [size] * len(used), fit)
            latents = sampling.draw(
                self, self.runtime, processor, [prompts[i] for i in own], settings,
                torch.stack([noises[place] for place in places]),
                features=features, cells=cells if joint else None,
                source_of=[used.index(source_of[i]) for i in own], negatives=[negatives[i] for i in own],
                on_step=on_step, progress=progress,
            )  # fmt: skip
            return self._output(latents, output_type)

        images = _by_shape(wanted, draw)
        if keep_aspect:
            found = [sources[source].size for source in source_of for _ in range(copies)]
            images = [unfit_square(picture, size, fit) for picture, size in zip(images, found, strict=True)]
        return ImageOutput(images)

    @sampling.works
    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageLike | Sequence[ImageLike],
        *,
        fit: Fit = "resize",
        keep_aspect: bool = False,
        height: int | None = None,
        width: int | None = None,
        image_size: int | None = None,
        max_pixels: int | None = None,
        output_type: str = "pil",
    ) -> ImageOutput:
        """Encode pictures to features and draw them again; what is lost is what the encoder does not know.

        Sizes are chosen as in `edit`. `output_type` "latent" gives (B,Z,h,w) in the diffusion transformer's scale.
        """
        self._check_output(output_type, "encoder", "latent_head", keep_aspect=keep_aspect)
        sources, sizes = self._sources(image, fit, height, width, image_size, max_pixels)
        if not sources:
            return ImageOutput([])
        if output_type != "pil":
            _check_alike(sizes)

        def draw(size: Size, places: list[int]) -> Any:
            features = self._features([sources[i] for i in places], [size] * len(places), fit)
            return self._output(self._latent(features, size[1] // TOKEN_PIXELS), output_type)

        images = _by_shape(sizes, draw)
        if keep_aspect:
            images = [unfit_square(picture, source.size, fit) for picture, source in zip(images, sources, strict=True)]
        return ImageOutput(images)

    @sampling.works
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
        generator: torch.Generator | int | None = None,
        max_tiles: int = 1,
        stream: bool = False,
    ) -> str | list[str] | Iterator[str]:
        """Answer a question about pictures.

        Args:
            image: a picture, several that one question is about, or None; of several questions, one for each or all.
            question: one question, or a list of them (answered as a batch).
            history: earlier turns as {"role": "user" | "assistant", "content": text, "images": [...]}.
            temperature, top_p, generator: greedy at temperature 0, else sampled.
            max_tiles: cut each picture into up to this many squares plus a thumbnail (dynamic resolution).
            stream: return an iterator of text pieces instead (one question only).

        Raises UniLIPError: a value out of range, a list of another length, a missing part; logits that are no numbers,
        or a model that was changed while a stream of it was read.
        """
        self.require("encoder", "mllm")
        processor = self._processor()
        temperature = check_number("temperature", temperature, 0)
        top_p = check_number("top_p", top_p, 0, 1)
        if top_p == 0:
            raise UniLIPError(f"top_p is {top_p}; it must be greater than 0 and at most 1 (1 keeps every token).")
        most = check_number("max_new_tokens", max_new_tokens, 1, whole=True)
        max_tiles = check_number("max_tiles", max_tiles, 1, MOST_TILES, whole=True)
        chosen, stream = sampling.check_generator(generator), check_flag("stream", stream)
        if not isinstance(history, (list, tuple)):
            raise PromptError(f"The history is {history!r}; give a list of turns.")
        if isinstance(chosen, list):
            raise UniLIPError("ask takes one generator or seed, not a list of them.")
        questions, several = _as_list(question), isinstance(question, (list, tuple))
        given = pictures.each(image) if several else [image]
        subjects = given * len(questions) if len(given) == 1 else given
        if len(subjects) != len(questions):
            raise UniLIPError(f"{len(subjects)} images and {len(questions)} questions were given; give as many.")
        if stream and several:
            raise UniLIPError("Streaming answers one question at a time; give a string, not a list.")
        if not questions:
            return []

        squares: list[Image.Image] = []

        def cut(images: Any) -> tuple[int, ...]:
            given = [] if images is None else _pictures(images)
            tiles = [pictures.tile(picture, processor.image_size, max_tiles) for picture in given]
            squares.extend(itertools.chain.from_iterable(tiles))
            return tuple(map(len, tiles))

        texts: list[Prompt] = []
        for text, images in zip(questions, subjects, strict=True):
            turns = [_turn(turn, cut) for turn in history]
            turns.append(Message("user", sampling.check_prompt(text, "question"), cut(images)))
            texts.append(processor.chat_text(turns))
        processor.tokenize(texts)  # complains before anything is computed
        columns = sampling.answer(
            self, self.runtime, processor, texts, self.features(to_pixels(squares)) if squares else None,
            max_new_tokens=most, temperature=temperature, top_p=top_p, generator=chosen,
        )  # fmt: skip
        answers = [sampling.TextStream(processor, most) for _ in texts]
        if stream:
            return self._stream(columns, answers[0])
        for column in columns:
            sampling.take(self, answers, column)
        return [answer.text for answer in answers] if several else answers[0].text

    def _stream(self, columns: Generator[list[int], None, None], answer: sampling.TextStream) -> Iterator[str]:
        with contextlib.closing(columns):
            for column in columns:
                if piece := sampling.take(self, [answer], column)[0]:
                    yield piece
        if piece := answer.rest():
            yield piece

    def chat(self, *, seed: int | None = None, from_original: bool = False, **settings: Any) -> Chat:
        """Begin a conversation that draws, changes and answers, and keeps pictures, answers and seeds; see `Chat`."""
        return Chat(self, seed, from_original, settings)

    # --- checks and results ---

    def _check_output(self, output_type: str, *parts: str, keep_aspect: bool = False) -> None:
        check_choice("output type", output_type, OUTPUT_TYPES)
        if check_flag("keep_aspect", keep_aspect) and output_type != "pil":
            raise UniLIPError(f'keep_aspect needs output_type "pil", not {output_type!r}.')
        self.require(*parts, *(() if output_type == "latent" else ("pixel_decoder",)))

    def _check_features(self, features: Any, height: int | None = None) -> None:
        width = self.config.text.hidden_size
        if not isinstance(features, Tensor) or features.dim() != 3 or features.shape[-1] != width:
            raise UniLIPError(f"Features are (M,N,{width}), and latents (M,Z,h,w), not {_shape(features)}.")
        count = features.shape[1]
        if height is None and math.isqrt(count) ** 2 != count:
            raise UniLIPError(f"{count} features make no square picture; give `height` to to_latent.")
        if height is not None and count % check_number("height", height, 1, max(1, count), whole=True):
            raise UniLIPError(f"height is {height}; it must divide the {count} features of a picture.")

    def _check_latent(self, latent: Any) -> None:
        channels = self.config.dit.latent_channels
        if not isinstance(latent, Tensor) or latent.dim() != 4 or latent.shape[1] != channels:
            raise UniLIPError(f"Latents are (M,{channels},h,w), not {_shape(latent)}.")

    def _processor(self) -> Processor:
        if self.processor is None:
            raise UniLIPError("This model has no tokenizer; put its files beside the checkpoint and load again.")
        return self.processor

    def _sources(
        self, image: Any, fit: Fit, height: Any, width: Any, image_size: Any, max_pixels: Any
    ) -> tuple[list[Image.Image], list[Size]]:
        """Load pictures, and say at which size each is read."""
        given = {"height": height, "width": width, "image_size": image_size, "max_pixels": max_pixels}
        side, sources = self.config.image_size, _pictures(image, fit)
        return sources, shapes.targets([s.size if fit == "resize" else (side, side) for s in sources], side, **given)

    def _noises(self, sizes: Sequence[Size], generator: Any, given: Tensor | None) -> list[Tensor]:
        """Draw the noise of each picture; or take what is given, for pictures of one size."""
        channels = self.config.dit.latent_channels
        wanted = [(channels, size[1] // TOKEN_PIXELS, size[0] // TOKEN_PIXELS) for size in sizes]
        if given is None:
            return sampling.draw_noises(wanted, generator)
        if tuple(given.shape) != (expected := (len(wanted), *wanted[0])):
            raise UniLIPError(f"latents are {list(given.shape)}; noise for these pictures is {list(expected)}.")
        return list(given.float())

    def _step(self, callback: StepCallback | None) -> sampling.OnStep | None:
        if callback is None:
            return None
        if not callable(callback):
            raise UniLIPError(f"callback_on_step_end is {callback!r}; give f(model, step, timestep, values).")

        def on_step(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
            stopped = False
            try:
                given = callback(self, step, timestep, {"latents": latents.clone()})  # which it may write into
            except sampling.Stopped as told:
                given, stopped = told.args[0], True
            if not isinstance(result := {} if given is None else given, Mapping):
                raise UniLIPError(f"callback_on_step_end returned {type(result).__name__}; give {{'latents': tensor}}.")
            changed, wanted = result.get("latents"), list(latents.shape)
            if changed is not None and _shape(changed) != str(wanted):
                raise UniLIPError(f"callback_on_step_end returned latents {_shape(changed)}; they must be {wanted}.")
            if stopped:
                raise sampling.Stopped(latents if changed is None else changed.to(latents))
            return changed

        return on_step

    def _output(self, latents: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        pixels = self.from_latent(latents)
        if output_type == "pt":
            return pixels
        if output_type == "np":
            return np.ascontiguousarray(pixels.movedim(1, -1).cpu().numpy())
        return pictures.to_images(pixels)


def draw_small(module: nn.Module, generator: torch.Generator, *others: Tensor) -> None:
    """Draw a module's linear layers, convolutions and embeddings, then others, from N(0, 0.02); biases are 0."""
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Embedding))]
    for weight in (*(layer.weight for layer in layers), *others):
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float32) * 0.02)
    for layer in layers:
        if isinstance(bias := getattr(layer, "bias", None), Tensor):
            bias.zero_()


def _names(parts: Sequence[str]) -> tuple[str, ...]:
    """Take names of parts: a list of them, or a single one."""
    names = (parts,) if isinstance(parts, str) else parts
    if not isinstance(names, (list, tuple, set)):
        raise UniLIPError(f"parts is {parts!r}; give a list of names out of {', '.join(PARTS)}.")
    for name in names:
        check_choice("part", name, PARTS)
    return tuple(names)


def _device(device: torch.device | str) -> torch.device:
    try:
        chosen = choose_device(str(device) if isinstance(device, torch.device) else device)
        if torch.device(chosen).type not in ("cpu", "cuda", "mps"):
            raise ValueError(device)
        return device if isinstance(device, torch.device) else torch.device(chosen)
    except UniLIPError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UniLIPError(f"There is no device {device!r}; allowed: auto, cpu, cuda, cuda:N, mps.") from error


def _as_list(value: Any) -> list[Any]:
    """Take one or several as a list: a list or tuple is several, anything else is one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _pictures(value: Any, fit: str = "resize") -> list[Image.Image]:
    """Load one picture or several."""
    check_choice("way to fit an image called", fit, pictures.FITS, ImageError)
    return [pictures.load_image(image) for image in pictures.each(value)]


def _check_alike(sizes: Sequence[Size]) -> None:
    if len(found := shapes.grouped(sizes)) > 1:
        named = ", ".join(f"{width}x{height}" for width, height in found)
        raise ImageError(f"One tensor cannot hold pictures of {named} px; give height and width, or a picture a call.")


def _by_shape(sizes: Sequence[Size], draw: Callable[[Size, list[int]], Any]) -> Any:
    """Draw pictures of one size after the other, and put them in order; of one size alone, as they are."""
    made = {size: draw(size, places) for size, places in shapes.grouped(sizes).items()}
    if len(made) == 1:
        return made[sizes[0]]
    left = {size: iter(images) for size, images in made.items()}
    return [next(left[size]) for size in sizes]


def _shape(values: Any) -> str:
    """Name what was given in place of a tensor of another shape."""
    return str(list(values.shape)) if isinstance(values, Tensor) else type(values).__name__


def _negatives(given: Any, count: int, settings: Settings) -> list[str | None]:
    """Take a negative prompt for all, or one for each; None and an empty one, which many programs send, are none."""
    several = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(several) != count:
        raise PromptError(f"{len(several)} negative prompts were given for {count} prompts; give one, or as many.")
    return [sampling.check_negative(prompt, settings) for prompt in several]


def _noise(latents: Any) -> Tensor | None:
    """Take noise to begin with: a tensor of numbers, or none."""
    if latents is None or (isinstance(latents, Tensor) and latents.is_floating_point() and latents.isfinite().all()):
        return latents
    raise UniLIPError(f"latents is {_shape(latents)}; give a tensor of floating-point numbers, none infinite or NaN.")


def check_progress(value: Any) -> sampling.Progress:
    """Take whether to show a bar, or tqdm's arguments for it."""
    if not isinstance(value, Mapping):
        return check_flag("progress", value)
    known = inspect.signature(tqdm.__init__).parameters
    for name in value:
        check_choice("argument of a progress bar", name, [n for n in known if n not in ("self", "total", "kwargs")])
    return value


def _turn(turn: Any, cut: Callable[[Any], tuple[int, ...]]) -> Message:
    """Read an earlier turn of a conversation; `cut` takes its pictures and counts the squares of each."""
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise PromptError('A turn of the history must be {"role": ..., "content": text}, with "images" if it has any.')
    return Message(turn["role"], sampling.check_prompt(turn["content"], "message"), cut(turn.get("images")))
