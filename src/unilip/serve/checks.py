"""Everything that can be wrong with a job is found here, before it is queued, and without the model's weights.

In:  a job. Out: its units, ready for a batch (pictures already of the size to be read), or a `UniLIPError`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import secrets
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from unilip import sampling, shapes
from unilip.adapters import read_adapter
from unilip.errors import LARGEST, PromptError, UniLIPError, check_choice, check_number
from unilip.fast.loop import Settings
from unilip.fewstep import few_config
from unilip.method.config import TOKEN_PIXELS, UniLIPConfig
from unilip.method.text import Message, Processor, Prompt
from unilip.pictures import fit_picture, load_image, tile
from unilip.serve.jobs import MAX_SEED, Ask, Edit, Generate, Job, Reconstruct
from unilip.serve.tickets import Ticket, Unit
from unilip.shapes import Size

TINY = 1e-6  # a temperature below is greedy, as its limit is; dividing by it would overflow
NEEDS = {
    "generate": ("mllm", "connector", "dit", "pixel_decoder"),
    "edit": ("encoder", "mllm", "connector", "dit", "pixel_decoder"),
    "reconstruct": ("encoder", "latent_head", "pixel_decoder"),
    "ask": ("encoder", "mllm"),
}
VERBS = tuple(NEEDS)


@dataclass(frozen=True)
class Limits:
    """The most that one job may ask for; `image_size`, the side of the largest square: twice the model's own."""

    count: int = 10
    steps: int = 200
    image_size: int | None = None
    new_tokens: int = 1024
    images: int = 16
    tiles: int = 12


Adapters = Mapping[str, tuple[str | os.PathLike[str], float]]  # name: folder, strength where none is asked for


class Checker:
    """Checks jobs, in callers' threads with a tokenizer of its own, for a model of this config, parts and adapters."""

    def __init__(
        self, config: UniLIPConfig, parts: Sequence[str], processor: Processor | None, limits: Limits | None = None,
        adapters: Adapters | None = None,
    ) -> None:  # fmt: skip
        limits = limits or Limits()
        self.config = config
        self.adapters, self._few = dict[str, float](), dict[str, tuple[int, ...]]()
        for name, (folder, scale) in (adapters or {}).items():
            self.lend(name, folder, scale)
        self.parts = tuple(parts)
        self.limits = limits if limits.image_size else dataclasses.replace(limits, image_size=2 * config.image_size)
        self._processor = Processor(copy.deepcopy(processor.tokenizer), config) if processor else None
        self._checking = threading.Lock()

    def lend(self, name: str, folder: str | os.PathLike[str], scale: float = 1.0) -> None:
        self._few[name] = read_adapter(folder).few_steps
        self.adapters = {**self.adapters, name: scale}  # others read it meanwhile

    @property
    def verbs(self) -> tuple[str, ...]:
        """Of generate, edit, reconstruct and ask those whose parts are there."""
        text = self._processor is not None
        return tuple(v for v in VERBS if set(NEEDS[v]) <= set(self.parts) and (text or v == "reconstruct"))

    def unread(self, text: str) -> list[str]:
        """Return the words of a text that training never read, as far as the tokenizer knows."""
        find = getattr(self._processor.tokenizer, "unread", None) if self._processor else None
        return list(find(text[: sampling.MAX_PROMPT_CHARACTERS])) if find else []

    def prepare(self, job: Job, deadline: float | None) -> list[Unit]:
        """Check a job and cut it into units."""
        verb = type(job).__name__.lower()
        if verb not in VERBS:
            raise UniLIPError(f"There is no job {type(job).__name__}; give Generate, Edit, Reconstruct or Ask.")
        if missing := [part for part in NEEDS[verb] if part not in self.parts]:
            raise UniLIPError(f"This needs {', '.join(missing)}, but the model has {', '.join(self.parts)} only.")
        for name, scale in job.adapters:
            check_choice("adapter", name, self.adapters)
            check_number(f"The strength of {name}", scale, -LARGEST)
        acting = {name: float(scale) for name, scale in job.adapters if scale}
        job = dataclasses.replace(job, adapters=tuple(sorted(acting.items())))
        units = self._units(job, verb, deadline)
        for unit in units:
            unit.key = (*unit.key, job.adapters)
        if job.adapters:
            units[0].ticket.settings["adapters"] = dict(job.adapters)
        return units

    def _units(self, job: Job, verb: str, deadline: float | None) -> list[Unit]:
        seed = 0
        if not isinstance(job, Reconstruct):
            count = 1 if isinstance(job, Ask) else job.count
            if not 1 <= count <= self.limits.count:
                raise UniLIPError(f"{count} pictures were asked for; between 1 and {self.limits.count} are drawn.")
            seed = secrets.randbelow(2**31) if job.seed is None else job.seed
            if not 0 <= seed <= MAX_SEED - count:
                raise UniLIPError(f"The seed is {seed}; it must be at least 0 and below 2**63 - {count}.")
        if isinstance(job, Ask):
            return self._prepare_ask(job, seed, deadline)
        side = self._check_side(job.image_size)
        source = None if isinstance(job, Generate) else load_image(job.image)
        own = source.size if source is not None and getattr(job, "fit", None) == "resize" else (side, side)
        size = shapes.like(job.size or own, side**2)
        if isinstance(job, Reconstruct):
            assert source is not None
            ticket = Ticket(verb, job, 1, deadline)
            ticket.settings = {"width": size[0], "height": size[1], "fit": job.fit}
            return [Unit(ticket, (verb, size), 0, 0, (fit_picture(source, size, job.fit),), source.size)]
        return self._prepare_drawing(job, verb, source, size, seed, deadline)

    def _prepare_drawing(
        self, job: Generate | Edit, verb: str, source: Image.Image | None, size: Size, seed: int,
        deadline: float | None,
    ) -> list[Unit]:  # fmt: skip
        given: dict[str, Any] = {
            "num_inference_steps": job.steps,
            "guidance_scale": job.guidance_scale,
            "solver": job.solver,
        }
        few = next((self._few[name] for name, _ in job.adapters if self._few[name]), ())
        settings = Settings.of(few_config(self.config, few) if few else self.config, job.preset, **given)
        steps, guidance = settings.num_inference_steps, settings.guidance_scale
        if steps > self.limits.steps:
            raise UniLIPError(f"{steps} steps were asked for; at most {self.limits.steps} are taken here.")
        if not 0 <= job.partials <= 3:
            raise UniLIPError(f"{job.partials} partial pictures were asked for; between 0 and 3 are shown.")
        tries = job.best_of if isinstance(job, Generate) else 1
        if not 1 <= tries <= self.limits.count:
            raise UniLIPError(f"best_of is {tries}; it must be between 1 and {self.limits.count}.")
        if tries > 1 and job.partials:
            raise UniLIPError(f"best_of is {tries}; the best is known at the end, so ask for no partial pictures.")
        words = "prompt" if isinstance(job, Generate) else "instruction"
        text = sampling.check_prompt(job.prompt, words)
        negative = sampling.check_negative(job.negative_prompt, settings)
        processor = self._need_processor()

        beside = [load_image(image) for image in job.others] if isinstance(job, Edit) else []
        if len(beside) >= self.limits.images:
            raise UniLIPError(f"{len(beside) + 1} pictures belong to one edit; at most {self.limits.images} are read.")
        side = self.config.image_size
        own = [shapes.like(o.size, side**2) if getattr(job, "fit", "") == "resize" else (side, side) for o in beside]
        cells = [shapes.cells(one) for one in (size, *own)]
        sampling.check_together(cells, processor)

        def make(words: str) -> Prompt:
            return processor.generate_text(words) if source is None else processor.edit_text(words, cells)

        tokens = self._count_tokens(processor, make(text))
        if negative is not None:
            self._count_tokens(processor, make(negative))
        read: tuple[Image.Image, ...] = ()
        source_size, fit = (0, 0), None
        if isinstance(job, Edit) and source is not None:
            shown = zip((source, *beside), (size, *own), strict=True)
            read = tuple(fit_picture(one, one_size, job.fit) for one, one_size in shown)
            source_size, fit = source.size, job.fit
        ticket = Ticket(verb, job, steps * job.count, deadline)
        ticket.prompt_tokens = tokens
        ticket.settings = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "solver": settings.solver,
            "preset": job.preset,
            "negative_prompt": negative,
            "width": size[0],
            "height": size[1],
        } | ({"plan": sampling.check_plan(job.plan)} if isinstance(job, Generate) else {"fit": fit})
        if tries > 1:
            ticket.settings["best_of"] = tries
        key: tuple[Hashable, ...] = (verb, size, steps, guidance, settings.solver, job.preset, negative)
        key = (*key, ticket.settings.get("plan"), tries, id(ticket) if beside else 0)  # several pictures: a batch alone
        return [Unit(ticket, key, i, seed + i, read, source_size, text) for i in range(job.count)]

    def _prepare_ask(self, job: Ask, seed: int, deadline: float | None) -> list[Unit]:
        limits = self.limits
        for name, value, most in (
            ("max_new_tokens", job.max_new_tokens, limits.new_tokens),
            ("max_tiles", job.max_tiles, limits.tiles),
        ):
            if not 1 <= value <= most:
                raise UniLIPError(f"{name} is {value}; it must be between 1 and {most}.")
        if not 0 <= job.temperature < math.inf:
            raise UniLIPError(f"temperature is {job.temperature}; it must be a number of at least 0 (0 is greedy).")
        if not 0 < job.top_p <= 1:
            raise UniLIPError(f"top_p is {job.top_p}; it must be greater than 0 and at most 1.")
        pictures = sum(len(turn.images) for turn in job.history) + len(job.images)
        if pictures > limits.images:
            raise UniLIPError(f"The conversation has {pictures} pictures; at most {limits.images} are read.")
        processor = self._need_processor()
        squares: list[Image.Image] = []

        def cut(images: Sequence[Image.Image]) -> tuple[int, ...]:
            tiles = [tile(load_image(image), processor.image_size, job.max_tiles) for image in images]
            squares.extend(square for picture in tiles for square in picture)
            return tuple(len(picture) for picture in tiles)

        turns = [
            Message(turn.role, sampling.check_prompt(turn.text, "message"), cut(turn.images)) for turn in job.history
        ]
        turns.append(Message("user", sampling.check_prompt(job.question, "question"), cut(job.images)))
        text = processor.chat_text(turns)
        length = self._count_tokens(processor, text)
        room = self.config.text.max_positions - length
        if job.lower and 0 < room < job.max_new_tokens:
            job = dataclasses.replace(job, max_new_tokens=room)
        if job.temperature < TINY:
            job = dataclasses.replace(job, temperature=0.0)
        if room < job.max_new_tokens:
            raise PromptError(
                f"The conversation has {length} tokens and the answer may have {job.max_new_tokens}; this model reads "
                f"{self.config.text.max_positions} in all. Shorten it, or lower max_new_tokens."
            )
        ticket = Ticket("ask", job, job.max_new_tokens, deadline)
        ticket.prompt_tokens = length
        ticket.settings = {"max_new_tokens": job.max_new_tokens, "temperature": job.temperature, "top_p": job.top_p}
        # a sampled answer draws from one generator, so it has a batch of its own
        key: tuple[Hashable, ...] = ("ask",) if job.temperature == 0 else ("ask", id(ticket))
        return [Unit(ticket, key, 0, seed, tuple(squares), text=text)]

    def _check_side(self, size: int | None) -> int:
        most = self.limits.image_size or self.config.image_size
        if size is None:
            return self.config.image_size
        if not TOKEN_PIXELS <= size <= most or size % TOKEN_PIXELS:
            raise UniLIPError(f"image_size is {size}; it must be a multiple of {TOKEN_PIXELS} up to {most}.")
        return size

    def _need_processor(self) -> Processor:
        if self._processor is None:
            raise UniLIPError("This model has no tokenizer; put the tokenizer files beside the checkpoint.")
        return self._processor

    def _count_tokens(self, processor: Processor, text: str | Prompt) -> int:
        with self._checking:
            return processor.tokenize([text]).input_ids.shape[1]
