"""Everything that can be wrong with a job is found here, before it is queued, and without the model's weights."""

import copy
import dataclasses
import os
import secrets
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from unilip import sampling, shapes
from unilip.adapters import read_adapter
from unilip.errors import PromptError, UniLIPError, check_choice, check_number
from unilip.fast.loop import Settings
from unilip.fewstep import few_config
from unilip.method.config import TOKEN_PIXELS, UniLIPConfig
from unilip.method.text import Processor, Prompt
from unilip.pictures import fit_picture, load_image
from unilip.serve.jobs import MAX_SEED, Ask, Edit, Generate, Job, Reconstruct
from unilip.serve.tickets import Ticket, Unit
from unilip.shapes import Size

TINY = 1e-6  # a temperature below is greedy, as its limit is; dividing by it would overflow
MAX_STRENGTH = 100.0  # of an adapter: far beyond, the model overflows, and would count as broken
NEEDS = {
    "generate": ("mllm", "connector", "dit", "pixel_decoder"),
    "edit": ("encoder", "mllm", "connector", "dit", "pixel_decoder"),
    "reconstruct": ("encoder", "latent_head", "pixel_decoder"),
    "ask": ("encoder", "mllm"),
}


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
        able = [verb for verb, needed in NEEDS.items() if set(needed) <= set(parts)]
        self.verbs = tuple(verb for verb in able if processor or verb == "reconstruct")  # which needs no words
        self._checking = threading.Lock()

    def lend(self, name: str, folder: str | os.PathLike[str], scale: float = 1.0) -> None:
        self._few[name] = read_adapter(folder).few_steps
        self.adapters = {**self.adapters, name: scale}  # others read it meanwhile

    def unread(self, text: str) -> list[str]:
        """Return the words of a text that training never read, as far as the tokenizer knows."""
        find = getattr(self._processor.tokenizer, "unread", None) if self._processor else None
        return list(find(text[: sampling.MAX_PROMPT_CHARACTERS])) if find else []

    def prepare(self, job: Job, deadline: float | None) -> list[Unit]:
        """Return the units of a job, their pictures already of the size to be read. Raises UniLIPError: it is wrong."""
        verb = type(job).__name__.lower()
        if verb not in NEEDS:
            raise UniLIPError(f"There is no job {type(job).__name__}; give Generate, Edit, Reconstruct or Ask.")
        if missing := [part for part in NEEDS[verb] if part not in self.parts]:
            raise UniLIPError(f"This needs {', '.join(missing)}, but the model has {', '.join(self.parts)} only.")
        for name, scale in job.adapters:
            check_choice("adapter", name, self.adapters)
            check_number(f"The strength of {name}", scale, -MAX_STRENGTH, MAX_STRENGTH)
        acting = {name: float(scale) for name, scale in job.adapters if scale}
        job = dataclasses.replace(job, adapters=tuple(sorted(acting.items())))
        ticket = Ticket(verb, job, deadline)
        if isinstance(job, Reconstruct):
            units = self._picture(ticket, job, 0)
        elif self._processor is None:
            raise UniLIPError("This model has no tokenizer; put the tokenizer files beside the checkpoint.")
        else:
            count = 1 if isinstance(job, Ask) else check_number("count", job.count, 1, self.limits.count, whole=True)
            seed = secrets.randbelow(2**31) if job.seed is None else job.seed
            seed = check_number("seed", seed, 0, MAX_SEED - count, whole=True)
            units = self._answer(ticket, job, seed) if isinstance(job, Ask) else self._picture(ticket, job, seed)
        for unit in units:
            unit.key = (*unit.key, job.adapters)
        if job.adapters:
            ticket.settings["adapters"] = dict(job.adapters)
        return units

    def _picture(self, ticket: Ticket, job: Generate | Edit | Reconstruct, seed: int) -> list[Unit]:
        side = most = self.config.image_size
        if job.image_size is not None:
            side, most = job.image_size, self.limits.image_size or most
            if not TOKEN_PIXELS <= side <= most or side % TOKEN_PIXELS:
                raise UniLIPError(f"image_size is {side}; it must be a multiple of {TOKEN_PIXELS} up to {most}.")

        def own(source: Image.Image, side: int) -> Size:
            return shapes.like(source.size if getattr(job, "fit", "") == "resize" else (side, side), side**2)

        if isinstance(job, Generate):
            return self._drawing(ticket, job, [], [shapes.like(job.size or (side, side), side**2)], seed)
        source = load_image(job.image)
        size = shapes.like(job.size, side**2) if job.size else own(source, side)
        if isinstance(job, Edit):
            beside = [load_image(image) for image in job.others]
            sizes = [size, *(own(one, self.config.image_size) for one in beside)]
            return self._drawing(ticket, job, [source, *beside], sizes, seed)
        ticket.settings = {"width": size[0], "height": size[1], "fit": job.fit}
        return [Unit(ticket, (ticket.verb, size), 0, 0, (fit_picture(source, size, job.fit),), source.size)]

    def _drawing(
        self, ticket: Ticket, job: Generate | Edit, sources: Sequence[Image.Image], sizes: Sequence[Size], seed: int
    ) -> list[Unit]:
        limits, processor = self.limits, self._processor
        assert processor is not None
        few = next((self._few[name] for name, _ in job.adapters if self._few[name]), ())
        settings = Settings.of(
            few_config(self.config, few) if few else self.config, job.preset, num_inference_steps=job.steps,
            guidance_scale=job.guidance_scale, solver=job.solver,
        )  # fmt: skip
        steps = check_number("steps", settings.num_inference_steps, 1, limits.steps, whole=True)
        check_number("partials", job.partials, 0, 3, whole=True)
        tries = check_number("best_of", getattr(job, "best_of", 1), 1, limits.count, whole=True)
        if tries > 1 and job.partials:
            raise UniLIPError(f"best_of is {tries}; the best is known at the end, so ask for no partial pictures.")
        text = sampling.check_prompt(job.prompt, "instruction" if sources else "prompt")
        negative = sampling.check_negative(job.negative_prompt, settings)
        if len(sources) > limits.images:
            raise UniLIPError(f"{len(sources)} pictures belong to one edit; at most {limits.images} are read.")
        cells = [shapes.cells(one) for one in sizes]
        sampling.check_together(cells, processor)
        write: Callable[[str | None], Prompt] = processor.generate_text
        if sources:
            write = partial(processor.edit_text, cells=cells)
        ticket.total, ticket.prompt_tokens = steps * job.count, self._count_tokens(write(text))
        if negative is not None:
            self._count_tokens(write(negative))
        size, read, seen = sizes[0], (), (0, 0)  # type: tuple[Size, tuple[Image.Image, ...], Size]
        ticket.settings = {"num_inference_steps": steps, "guidance_scale": settings.guidance_scale}
        ticket.settings |= {"solver": settings.solver, "preset": job.preset, "negative_prompt": negative}
        ticket.settings |= {"width": size[0], "height": size[1]}
        if isinstance(job, Edit):
            read = tuple(fit_picture(one, own, job.fit) for one, own in zip(sources, sizes, strict=True))
            ticket.settings["fit"], seen = job.fit, sources[0].size
        else:
            ticket.settings["plan"] = sampling.check_plan(job.plan)
        ticket.settings |= {"best_of": tries} if tries > 1 else {}
        # all of one key share a batch; an edit of several pictures is one alone
        key = (ticket.verb, *(v for k, v in ticket.settings.items() if k != "fit"), len(read) > 1 and id(ticket))
        return [Unit(ticket, key, i, seed + i, read, seen, text) for i in range(job.count)]

    def _answer(self, ticket: Ticket, job: Ask, seed: int) -> list[Unit]:
        limits, processor = self.limits, self._processor
        assert processor is not None
        check_number("max_new_tokens", job.max_new_tokens, 1, limits.new_tokens, whole=True)
        check_number("max_tiles", job.max_tiles, 1, limits.tiles, whole=True)
        check_number("temperature", job.temperature, 0)
        if check_number("top_p", job.top_p, 0, 1) == 0:
            raise UniLIPError(f"top_p is {job.top_p}; it must be greater than 0 and at most 1.")
        pictures = sum(len(turn.images) for turn in job.history) + len(job.images)
        if pictures > limits.images:
            raise UniLIPError(f"The conversation has {pictures} pictures; at most {limits.images} are read.")

        said = [(turn.role, turn.text, "message", turn.images) for turn in job.history]
        said.append(("user", job.question, "question", job.images))
        text, squares = sampling.conversation(processor, said, job.max_tiles)
        ticket.prompt_tokens = length = self._count_tokens(text)
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
        ticket.job, ticket.total = job, job.max_new_tokens
        ticket.settings = {name: getattr(job, name) for name in ("max_new_tokens", "temperature", "top_p")}
        # a sampled answer draws from one generator, so it has a batch of its own
        key: tuple[Hashable, ...] = ("ask",) if job.temperature == 0 else ("ask", id(ticket))
        return [Unit(ticket, key, 0, seed, tuple(squares), text=text)]

    def _count_tokens(self, text: str | Prompt) -> int:
        assert self._processor is not None
        with self._checking:
            return self._processor.tokenize([text]).input_ids.shape[1]
