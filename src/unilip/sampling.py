"""A request becomes a batch, and a batch a result: the one place for the model, the server, commands and evaluation.

In:  a model, checked prompts, features of pictures, settings. Out: features, latents, pixels in [0,1], answers token by
token. Parts bring themselves to the device.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import re
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from tqdm.std import tqdm

from unilip.errors import PromptError, UniLIPError, check_flag, check_number
from unilip.fast import decoder, loop
from unilip.fast.dit import prepare
from unilip.fast.loop import Compiled, Settings
from unilip.fast.offload import HEAD, Offload
from unilip.fast.products import Products
from unilip.method.dit import DiT
from unilip.method.flow import OnStep
from unilip.method.text import IMG_CONTEXT, TEXT_END, TURN_END, TURN_START, Message, Processor, Prompt
from unilip.pictures import each, load_image, tile

if TYPE_CHECKING:
    from unilip.model import UniLIP

Generators = torch.Generator | int | Sequence[torch.Generator | int] | None
Random = torch.Generator | Sequence[torch.Generator] | None  # as `check_generator` makes them
Turn = tuple[str, Any, str, Any]  # who speaks, the words, what errors call them, pictures: none, one or several
Progress = bool | Mapping[str, Any]  # whether to show a bar, or how: arguments of tqdm
MAX_PROMPT_CHARACTERS = 8_000
REWRITE = "Write this out as one description of a picture, with each thing, its colour and its place. Only that: "
words_in = re.compile(r"\w+").findall
WHERE = frozenset(words_in("top bottom upper lower left right middle center centre corner side edge"))
PLACES = WHERE | {"white", "background"}  # what a plan may add to a prompt
SAID = WHERE | {"above", "below", "over", "under"}  # what a prompt says of places by itself
ARTICLES = {"a", "an"}  # of which a plan has those of the prompt
PLAN_TOKENS = 128
CANDIDATES = 32  # likeliest tokens that a plan may go on by; where none fits, there is no plan
SMALL_WORDS = frozenset(  # what a plan may leave out of a prompt, or says by places
    words_in(
        "a an the and of with on in at to is are it me my i draw paint make create show generate please picture image "
        "photo drawing want would like can you could some above below over under next beside near together front"
    )
)
NOT_TAUGHT = "this model has not learned from edits of several pictures: what it draws may be anything"
FORBIDDEN = (TURN_START, TURN_END, TEXT_END, IMG_CONTEXT)  # control tokens, which nobody means as words
SEEN = "Do you see {}?"  # what the best of several pictures is chosen by

F = TypeVar("F", bound=Callable[..., Any])


class Stopped(Exception):
    """Leaves out the steps to come: a callback's raises it with what it returns, and it goes on with the latents."""


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Make tensors there where no device is named, whatever PyTorch's default is."""
    is_usual = torch.get_default_device().type == "cpu"  # else every operation would take a little longer
    with contextlib.nullcontext() if is_usual else torch.device("cpu"):
        yield


def works(function: F, *parts: str, change: bool = False) -> F:
    """Let a method, or a function of a model, have that for itself to its last computation, PARTS on the device."""

    @functools.wraps(function)
    def alone(model: Any, *values: Any, **named: Any) -> Any:
        runtime = getattr(model, "runtime", None)
        if runtime is None:  # a network that nobody else can be using
            return function(model, *values, **named)
        with runtime.taken(change), on_the_cpu(), model.using(*parts) if parts else contextlib.nullcontext():
            if change:
                runtime.forget()
            return function(model, *values, **named)

    return cast(F, alone)


changes = functools.partial(works, change=True)  # of what changes its model; nothing recorded before is used again


@dataclass
class Runtime:
    """How a model is run: what comes and goes, what is compiled, a second device for half of the guidance, strips.

    And its lock: one thread at a time works with the model, or changes it; the others wait. A change from within its
    own thread's work, as in a callback, is refused. `changes` counts them, so that an answer taken word by word is not
    finished by another model.
    """

    offload: Offload | None = None
    compiled: Compiled | None = None
    second: torch.device | None = None
    strips: int = 1
    products: Products | None = field(default_factory=Products)
    changes: int = 0
    _works: int = 0
    _twin: DiT | None = None
    _lock: Any = field(default_factory=threading.RLock)

    def __reduce__(self) -> tuple[Any, ...]:
        kept = None if self.products is None else Products()
        return Runtime, (self.offload, None, self.second, self.strips, kept)  # of a copy: the rest knows this model

    @contextlib.contextmanager
    def taken(self, change: bool = False) -> Iterator[None]:
        """Keep other threads out while the caller works with the model, or changes it."""
        with self._lock:
            if change and self._works:
                raise UniLIPError("The model is at work on this very call and cannot be changed; do it afterwards.")
            self.changes += change
            self._works += not change
            try:
                yield
            finally:
                self._works -= not change

    def held(self, *parts: str) -> contextlib.AbstractContextManager[None]:
        """Have parts on the device without keeping the model; to be entered and left within `taken()`."""
        return contextlib.nullcontext() if self.offload is None else self.offload.using(*parts)

    def forget(self) -> None:
        """Drop what was recorded and copied of the model; for whoever changes it."""
        self._twin = None
        for kept in (self.compiled, self.products):
            if kept is not None:
                kept.forget()

    @torch.no_grad()
    def twin(self, dit: DiT) -> DiT | None:
        """Return a copy of the transformer on the second device, if there is one, with the weights of this moment."""
        if self.second is None:
            return None
        types = [one.dtype for one in dit.parameters()]
        if self._twin is None or [one.dtype for one in self._twin.parameters()] != types:
            self._twin = copy.deepcopy(dit).to(self.second).eval()
        for there, here in zip(self._twin.parameters(), dit.parameters(), strict=True):
            there.copy_(here)
        return self._twin


def check_prompt(prompt: object, what: str = "prompt") -> str:
    """Return a prompt stripped of surrounding space.

    Raises PromptError: no string, empty, over 8000 characters, with control tokens of the chat template, or no Unicode.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"The {what} must be a string, not {type(prompt).__name__}.")
    text = prompt.replace("\ufeff", "").strip()  # a byte order mark is no character
    if not text.strip("\u200b\u200c\u200d\u2060"):  # nor is text of zero width
        raise PromptError(f"The {what} is empty; say in words what you want.")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise PromptError(f"The {what} has {len(text)} characters; {MAX_PROMPT_CHARACTERS} are read. Shorten it.")
    if reserved := ", ".join(token for token in FORBIDDEN if token in text):
        raise PromptError(f"The {what} contains {reserved}, which the model reserves for itself; leave it out.")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PromptError(f"The {what} contains half of a surrogate pair, which is no character; send valid Unicode.")
    return text


def check_negative(prompt: object, settings: Settings) -> str | None:
    """Take a negative prompt; None and "" are none. Raises PromptError: bad, or nothing moves away from it (turbo)."""
    if prompt is None or (isinstance(prompt, str) and not prompt.strip()):
        return None
    if settings.jumps:
        raise PromptError("A negative prompt needs guidance, which the preset turbo has none of; leave one out.")
    return check_prompt(prompt, "negative prompt")


def check_path(name: str, value: Any) -> str | os.PathLike[str]:
    """Return a text or path, or say what was given instead."""
    if not isinstance(value, (str, os.PathLike)):
        raise UniLIPError(f"{name} is {value!r}; give a text or a path.")
    return value


def check_joint(value: Any, count: int) -> bool:
    """Return whether COUNT pictures belong to one edit. Raises UniLIPError: that was asked of a single one."""
    if (joint := check_flag("joint", value)) and count == 1:
        raise UniLIPError("A joint edit has several pictures, and there is one; give another, or leave joint out.")
    return joint


def check_together(cells: Sequence[int], processor: Processor) -> None:
    """Raise PromptError where pictures of so many image tokens are more than the model reads."""
    if sum(cells) >= processor.max_tokens:
        raise PromptError(
            f"{len(cells)} pictures have {sum(cells)} image tokens, and the model reads at most {processor.max_tokens} "
            "tokens; give fewer pictures, or smaller ones (max_pixels)."
        )


def check_plan(value: Any) -> bool | str:
    """Take True, False or "auto"."""
    if isinstance(value, bool) or value == "auto":
        return cast("bool | str", value)
    raise UniLIPError(f"plan is {value!r}; it must be True, False or 'auto'.")


def conversation(processor: Processor, turns: Iterable[Turn], max_tiles: int) -> tuple[Prompt, list[Image.Image]]:
    """Return what is read of a conversation: its prompt, and the squares that its pictures are cut into."""
    messages: list[Message] = []
    squares: list[Image.Image] = []
    for role, words, what, images in turns:
        text, given = check_prompt(words, what), [] if images is None else each(images)
        tiles = [tile(load_image(image), processor.image_size, max_tiles) for image in given]
        messages.append(Message(role, text, tuple(map(len, tiles))))
        squares += [square for picture in tiles for square in picture]
    return processor.chat_text(messages), squares


def check_generator(generator: Any) -> torch.Generator | list[torch.Generator] | None:
    """Take generators, or whole numbers as seeds of them; one, or a list with one for each picture."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    if isinstance(generator, (list, tuple)):
        if any(one is None or isinstance(one, (list, tuple)) for one in generator):
            raise UniLIPError("generator holds something else than a torch.Generator or a seed for each picture.")
        return [check_generator(one) for one in generator]  # type: ignore[misc]
    return torch.Generator().manual_seed(check_number("generator", generator, -(2**63), 2**64 - 1, whole=True))


def draw_noise(count: int, shape: Sequence[int], generator: Random) -> Tensor:
    """Draw float32 CPU noise (count, *shape), the same in any batch: by one generator in order, or one for each."""
    draws = draw_noises([shape] * count, generator)
    return torch.stack(draws) if draws else torch.empty(0, *shape)


def draw_noises(shapes: Sequence[Sequence[int]], generator: Random) -> list[Tensor]:
    """Draw the noise of each of several pictures, whose shapes may differ, as `draw_noise` does."""
    generators: list[torch.Generator | None]
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * len(shapes)
    if len(generators) != len(shapes):
        raise UniLIPError(f"{len(generators)} generators were given for {len(shapes)} pictures; give 1 or as many.")
    return [
        torch.randn(*shape, generator=g, device="cpu" if g is None else g.device, dtype=torch.float32).cpu()
        for shape, g in zip(shapes, generators, strict=True)
    ]


def check_finite(values: Tensor, part: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return values that are numbers. Raises UniLIPError, naming the part: NaN or infinity, which would draw black."""
    if not bool(torch.isfinite(values).all()):
        raise not_finite(part, dtype or values.dtype)
    return values


def not_finite(part: str, dtype: torch.dtype, where: str = "") -> UniLIPError:
    """Make the error of a part whose results are no numbers."""
    return UniLIPError(
        f"The {part} computed NaN or infinite values in {str(dtype).removeprefix('torch.')}{where}: its weights are "
        "damaged, or overflow in this precision; load with dtype bfloat16 or float32."
    )


def take(model: UniLIP, answers: Sequence[TextStream], ids: Sequence[int]) -> list[str]:
    """Add the next id to each answer; return the text that became final by it. Raises UniLIPError: -1, no number."""
    if broken := [str(row) for row, token in enumerate(ids, 1) if token < 0]:
        where = f" for answer {', '.join(broken)} of {len(ids)}" if len(ids) > 1 else ""
        raise not_finite("mllm", next(model.mllm.parameters()).dtype, where)
    return [answer.take(token) for answer, token in zip(answers, ids, strict=True)]


def decode(model: UniLIP, latent: Tensor) -> Tensor:
    """Decode latents (M,Z,h,w) in the decoder's own scale: -> (M,3,H,W), about in [-1,1]."""
    runtime = model.runtime
    if runtime.compiled is not None and runtime.strips == 1:
        return check_finite(runtime.compiled.decode(latent), "pixel_decoder")
    return check_finite(decoder.decode(model.pixel_decoder.decoder, latent, runtime.strips), "pixel_decoder")


def liking(model: UniLIP, processor: Processor, prompts: Sequence[str], features: Tensor) -> Tensor:
    """How much likelier is yes than no, in log-probability (M,), asked whether pictures (M,N,D) show prompts (M)."""
    questions = [SEEN.format(prompt.rstrip(" .!?")) for prompt in prompts]
    tokens = processor.tokenize([processor.chat_text([Message("user", text, (1,))]) for text in questions])
    tokens = tokens.to(features.device)
    with model.using("mllm", HEAD):
        mllm = model.mllm
        hidden = mllm(mllm.embed(tokens.input_ids, tokens.image_slots, features), tokens.attention_mask)[:, -1]
        logits = check_finite(mllm.logits(hidden), "mllm", hidden.dtype)
    yes, no = ([processor.ids(word)[0] for word in words] for words in (("yes", "Yes"), ("no", "No")))
    return logits[:, yes].logsumexp(-1) - logits[:, no].logsumexp(-1)


def draw(
    model: UniLIP,
    processor: Processor,
    prompts: Sequence[str],
    settings: Settings,
    noise: Tensor,
    *,
    features: Tensor | None = None,
    cells: Sequence[int] | None = None,
    source_of: Sequence[int] = (),
    negatives: Sequence[str | None] | None = None,
    on_step: OnStep | None = None,
    progress: Progress = True,
) -> Tensor:
    """Draw latents from noise (R,Z,h,w), R a multiple of the prompts, prompt by prompt; edits where there are features.

    Args: features: (S,N,D), of the sources that are edited. cells: how many of the N each picture has, of a source that
    is several. source_of: which source each prompt edits. negatives: what guidance moves each away from (None: the
    unconditional prompt). on_step: f(step, timestep, latents) after each step; may return latents in their place.
    """
    device, runtime = model.device, model.runtime
    index = torch.arange(len(prompts)).repeat_interleave(len(noise) // len(prompts))
    write: Callable[[str | None], Prompt] = processor.generate_text
    if features is not None:
        write = functools.partial(processor.edit_text, cells=cells or features.shape[1])
    sources, rows = source_of if features is not None else [0] * len(prompts), index
    asked: list[tuple[int, str | None]] = list(zip(sources, prompts, strict=True))
    if settings.guidance_scale > 1:  # the unconditional rows, each once, are read together with the prompts
        pairs = list(zip(sources, negatives or [None] * len(prompts), strict=True))
        unique = list(dict.fromkeys(pairs))
        asked = [*unique, *asked]
        rows = torch.cat([torch.tensor([unique.index(pair) for pair in pairs])[index], index + len(unique)])
    if features is not None:
        features = features.to(device)[torch.tensor([source for source, _ in asked], device=device)]
    tokens = processor.tokenize([write(text) for _, text in asked]).to(device)
    with model.using("mllm", "connector"):
        condition, mask = model.condition(tokens, features)
        check_finite(condition, "mllm or connector")
    with model.using("dit"):
        prepared = prepare(model.dit.transformer, condition, mask)[rows.to(device)]
        # a bar alone does not keep the loop from being recorded as one graph
        shown = progress is not False
        watched = on_step is not None or (shown and runtime.compiled is None)
        options: dict[str, Any] = {"disable": None, "leave": False, "unit": "step"}
        options |= progress if isinstance(progress, Mapping) else {}
        options |= {} if shown and watched else {"disable": True}
        with tqdm(total=settings.num_inference_steps, **options) as bar:

            def after(step: int, timestep: Tensor, latents: Tensor) -> Tensor | None:
                bar.update()
                return None if on_step is None else on_step(step, timestep, latents)

            try:
                latents = loop.denoise(
                    model.dit, prepared, noise.to(device), settings, compiled=runtime.compiled,
                    twin=runtime.twin(model.dit), on_step=after if watched else None,
                    products=None if runtime.offload is not None else runtime.products,
                )  # fmt: skip
            except Stopped as stopped:
                latents = stopped.args[0]
        return check_finite(latents, "dit", prepared.keys_values[0][0].dtype)


def answer(
    model: UniLIP,
    processor: Processor,
    prompts: Sequence[str | Prompt],
    features: Tensor | None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    adjust: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> Generator[list[int], None, None]:
    """Continue conversations as text: yield the next id of each until all have ended; -1 where it is no number.

    `adjust` may change logits (B,V) before an id is chosen. Between two ids others may use the model. Raises
    UniLIPError: it was changed since the call.
    """
    runtime = model.runtime
    tokens, state = processor.tokenize(prompts).to(model.device), runtime.changes

    def rows() -> Generator[list[int], None, None]:
        held = contextlib.ExitStack()
        try:
            with runtime.taken(), torch.no_grad():
                held.enter_context(runtime.held("mllm", HEAD))
                embeddings = model.mllm.embed(tokens.input_ids, tokens.image_slots, features)
            columns = model.mllm.answer(
                embeddings, tokens.attention_mask, end_id=processor.end_id, max_new_tokens=max_new_tokens,
                temperature=temperature, top_p=top_p, generator=generator, adjust=adjust,
            )  # fmt: skip
            while True:
                with runtime.taken():
                    if runtime.changes != state:
                        raise UniLIPError("The model was changed while it gave this answer; ask again.")
                    column = next(columns, None)
                if column is None:
                    return
                yield column.tolist()
        finally:
            with runtime.taken():
                held.close()

    return rows()


def write_out(model: UniLIP, processor: Processor, prompts: Sequence[str]) -> list[str]:
    """Let the language model write prompts out, greedily; one that comes to nothing stays what it was.

    A model that was trained for it decodes under lexical constraints, where a prompt says no place by itself: all words
    of the prompt in their order, and besides them places alone. What does not come to an end so comes to nothing.
    """
    asked = model.config.sampling.plan or REWRITE
    texts = [processor.chat_text([Message("user", asked + prompt)]) for prompt in prompts]
    answers = [TextStream(processor, PLAN_TOKENS) for _ in texts]
    held = [model.config.sampling.plan and SAID.isdisjoint(words_in(one.lower())) for one in prompts]

    def constrained(logits: Tensor) -> Tensor:
        for row, written, prompt, is_held in zip(logits, answers, prompts, held, strict=True):
            if is_held and not written.reason:
                likeliest = row.topk(min(CANDIDATES, len(row))).indices.tolist()
                best = next((token for token in likeliest if may_follow(written, token, prompt)), None)
                written.reason = "" if best is not None else "length"  # cut short
                row[processor.end_id if best is None else best] = torch.finfo(row.dtype).max
        return logits

    for column in answer(model, processor, texts, None, max_new_tokens=PLAN_TOKENS, adjust=constrained):
        take(model, answers, column)
    plans = []
    for written, prompt, is_held in zip(answers, prompts, held, strict=True):
        try:
            plans.append(prompt if is_held and written.reason != "stop" else check_prompt(written.text))
        except PromptError:
            plans.append(prompt)
    return plans


def keeps(plan: str, prompt: str) -> bool:
    """Say whether PLAN has all words of PROMPT, in their order, but for small ones; it may add, not lose or swap."""
    rest = iter(words_of(plan))
    return all(word in rest for word in words_of(prompt))


def may_follow(plan: TextStream, token: int, prompt: str) -> bool:
    """Say whether a plan may go on by TOKEN: a word of PROMPT at its turn, a place; the end after both have come."""
    if token == plan.processor.end_id:
        return keeps(plan.text, prompt) and not WHERE.isdisjoint(words_of(plan.text))
    text = plan.processor.decode([[*plan.ids, token]])[0].lower()
    wanted, found = words_in(prompt.lower()), words_in(text)
    for i, word in enumerate(found):
        turn = next((n for n, other in enumerate(wanted) if other not in SMALL_WORDS), len(wanted))
        if word in wanted[turn : turn + 1]:
            wanted = wanted[turn + 1 :]
        elif word in ARTICLES and turn < len(wanted):
            if next((other for other in reversed(wanted[:turn]) if other in ARTICLES), word) != word:
                return False
        elif word not in PLACES | SMALL_WORDS:
            begun = i == len(found) - 1 and text.endswith(word)
            return begun and any(other.startswith(word) for other in (*wanted[turn : turn + 1], *PLACES))
    return True


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without small ones."""
    return [word for word in words_in(text.lower()) if word not in SMALL_WORDS]


class TextStream:
    """The text of one answer as it grows, never half a character; `reason`: "", then "stop" or "length"."""

    def __init__(self, processor: Processor, limit: int) -> None:
        self.processor, self.limit = processor, limit
        self.ids: list[int] = []
        self.text = self.reason = self._shown = ""

    def take(self, token: int) -> str:
        """Add a token; return the text that became final by it."""
        if self.reason:
            return ""
        if token == self.processor.end_id:
            self.reason = "stop"
        else:
            self.ids.append(token)
            self.text = self.processor.decode([self.ids])[0]
            self.reason = "length" if len(self.ids) >= self.limit else ""
        return "" if not self.reason and self.text.endswith("\ufffd") else self.rest()

    def rest(self) -> str:
        """Return the text that was held back so far."""
        if not self.text.startswith(self._shown):
            return ""
        piece, self._shown = self.text[len(self._shown) :], self.text
        return piece
