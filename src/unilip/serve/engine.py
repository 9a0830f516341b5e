"""One model behind a queue: jobs of many callers in, batches through the model, results back to each.

In:  jobs (`unilip.serve.jobs`), from any thread, each with a deadline. Out: a `Ticket` for each: events, a result.
A single worker thread owns the model. It takes the oldest waiting picture and every other one that can share its batch
(same verb, steps, guidance, solver, size, negative prompt), so a batch forms whenever several callers wait. Each
picture has a generator of its own: what it looks like does not depend on what it was batched with, up to rounding.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import math
import queue as queues
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unilip.config import TOKEN_PIXELS
from unilip.errors import PromptError, UniLIPError
from unilip.model import UniLIP
from unilip.preprocess import (
    FITS,
    Message,
    Processor,
    check_prompt,
    fit_square,
    load_image,
    tile,
    to_pixels,
    unfit_square,
)
from unilip.serve.jobs import (
    MAX_SEED,
    Ask,
    Cancelled,
    DeadlineExceeded,
    Draining,
    Edit,
    EngineFailed,
    Event,
    Generate,
    Job,
    QueueFull,
    Reconstruct,
    Result,
)

logger = logging.getLogger(__name__)

VERBS = ("generate", "edit", "reconstruct", "ask")
NEEDS = {
    "generate": ("mllm", "connector", "dit", "pixel_decoder"),
    "edit": ("encoder", "mllm", "connector", "dit", "pixel_decoder"),
    "reconstruct": ("encoder", "latent_head", "pixel_decoder"),
    "ask": ("encoder", "mllm"),
}


@dataclass(frozen=True)
class Limits:
    """The most that one job may ask for; whoever asks for more gets a `UniLIPError` that names the limit.

    `image_size` is the largest square drawn, in pixels; None is twice the model's own.
    """

    count: int = 10
    steps: int = 200
    image_size: int | None = None
    new_tokens: int = 1024
    images: int = 16
    tiles: int = 12


@dataclass(frozen=True)
class Stats:
    """A snapshot of an engine: pictures and questions waiting and being worked on, and counts since it started."""

    queued: int
    running: int
    served: Mapping[str, int]
    failed: Mapping[str, int]
    batches: int
    seconds_per_unit: float


class Ticket:
    """A job that was accepted: follow it, wait for it, or give it up. Every method may be called from any thread."""

    def __init__(self, verb: str, job: Job, total: int, deadline: float | None) -> None:
        self.verb = verb
        self.job = job
        self.submitted = time.monotonic()
        self.deadline = deadline
        self.started: float | None = None
        self.settings: dict[str, Any] = {}
        self._total = total  # steps of all its pictures
        self._steps: Counter[int] = Counter()
        self._made: dict[int, _Unit] = {}
        self._past: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._result: Result | None = None
        self._error: UniLIPError | None = None
        self._lock = threading.RLock()
        self._done = threading.Event()
        self._on_cancel: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        """Whether there is a result, or an error."""
        return self._done.is_set()

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event, past ones at once.

        Later ones come from the worker's thread, under its locks: put them somewhere and return, and do not call the
        engine from there.
        """
        with self._lock:
            for event in self._past:
                listener(event)
            self._listeners.append(listener)

    def cancel(self) -> bool:
        """Give the job up: a waiting one leaves the queue, a running one stops after its present step.

        Returns whether it was still unfinished. Waiting callers get `Cancelled`.
        """
        if not self._fail(Cancelled("The request was cancelled.")):
            return False
        self._on_cancel()
        return True

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result.

        Raises:
            UniLIPError: the job failed: `Cancelled`, `DeadlineExceeded`, `EngineFailed`, `Draining`.
            TimeoutError: `timeout` seconds passed; the job goes on.
        """
        if not self._done.wait(timeout):
            raise TimeoutError(f"no result within {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def events(self) -> Iterator[Event]:
        """Yield events until the end, waiting for each. Ask `result()` afterwards; the job goes on if you stop."""
        waiting: queues.SimpleQueue[Event] = queues.SimpleQueue()
        self.listen(waiting.put)
        while (event := waiting.get()).kind != "end":
            yield event

    async def events_async(self) -> AsyncIterator[Event]:
        """Yield events until the end, in an event loop."""
        loop, waiting = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def forward(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(waiting.put_nowait, event)

        self.listen(forward)
        while (event := await waiting.get()).kind != "end":
            yield event

    async def result_async(self) -> Result:
        """Wait for the result in an event loop; a task that is cancelled meanwhile cancels the job."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def forward(event: Event) -> None:
            if event.kind == "end" and not loop.is_closed():
                loop.call_soon_threadsafe(ended.set)

        self.listen(forward)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self.result(0)

    # --- for the engine

    def _emit(self, event: Event) -> None:
        with self._lock:
            if self.done and event.kind != "end":
                return
            self._past.append(event)
            for listener in self._listeners:
                try:
                    listener(event)
                except Exception:  # a caller that went away must not stop the others of the batch
                    logger.debug("a listener failed", exc_info=True)

    def _start(self) -> None:
        with self._lock:
            if self.started is None and not self.done:
                self.started = time.monotonic()
                self._emit(Event("start", 0, self._total))

    def _step(self, picture: int) -> None:
        self._steps[picture] += 1

    def _tell_step(self) -> None:
        self._emit(Event("step", sum(self._steps.values()), self._total))

    def _fail(self, error: UniLIPError) -> bool:
        with self._lock:
            if self.done:
                return False
            self._error = error
            self._done.set()
            self._emit(Event("end"))
            return True

    def _succeed(self, **values: Any) -> None:
        with self._lock:
            if self.done:
                return
            now = time.monotonic()
            waited = (self.started or now) - self.submitted
            self._result = Result(settings=self.settings, waited=waited, seconds=now - self.submitted, **values)
            self._done.set()
            self._emit(Event("end"))


@dataclass
class _Unit:
    """One picture, or one answer, of a job: what the queue holds and a batch is made of."""

    ticket: Ticket
    key: tuple[Hashable, ...]
    index: int
    seed: int
    squares: tuple[Image.Image, ...] = ()
    source_size: tuple[int, int] = (0, 0)
    text: str = ""
    output: Any = None

    @property
    def alive(self) -> bool:
        return not self.ticket.done


class _Stop(Exception):
    """Raised in a step when nobody wants the batch any more."""


class Engine:
    """Serves one model to many callers.

    Args:
        model: a loaded `UniLIP`; from now on the engine's worker thread alone may use it.
        max_queue: pictures and questions that may wait; beyond that `submit` raises `QueueFull`.
        max_batch: pictures or questions in one batch, at the model's own size; larger pictures make smaller batches.
        batch_wait: seconds to wait for company when less than a batch is waiting; a lonely request is so much later.
        deadline: seconds that a job may take, waiting included, when it does not say so itself; None is for ever.
        limits: the most that one job may ask for.
        on_batch: called from the worker as f(verb, size, seconds) after each batch, for metrics.

    Use:

        engine = Engine(UniLIP.from_pretrained())
        ticket = engine.submit(Generate("three yellow stars", seed=7), deadline=60)
        for event in ticket.events():              # or: async for event in ticket.events_async()
            if event.kind == "step":
                print(event.step, "of", event.steps)
        picture = ticket.result().images[0]        # or: await ticket.result_async()
        answer = engine.submit(Ask("What color is it?", (picture,))).result().text
        engine.close()

    Everything of a job is checked by `submit`, in the caller's thread, so that a bad one cannot spoil a batch. Should a
    batch fail nevertheless, its members are tried one by one. An engine is also a context manager that closes itself.
    """

    def __init__(
        self,
        model: UniLIP,
        *,
        max_queue: int = 64,
        max_batch: int = 8,
        batch_wait: float = 0.005,
        deadline: float | None = 300.0,
        limits: Limits | None = None,
        on_batch: Callable[[str, int, float], None] | None = None,
    ) -> None:
        for name, value in (("max_queue", max_queue), ("max_batch", max_batch)):
            if value < 1:
                raise UniLIPError(f"{name} is {value}; it must be at least 1.")
        if batch_wait < 0 or (deadline is not None and deadline <= 0):
            raise UniLIPError("batch_wait must be at least 0 seconds, and deadline more than 0.")
        self.model = model
        self.config = model.config
        self.max_queue = max_queue
        self.max_batch = max_batch
        self.batch_wait = batch_wait
        self.deadline = deadline
        own = model.config.image_size
        limits = limits or Limits()
        self.limits = limits if limits.image_size else dataclasses.replace(limits, image_size=2 * own)
        self.on_batch = on_batch
        # a tokenizer of its own: callers check prompts while the worker uses the model's
        self._processor = Processor(copy.deepcopy(model.processor.tokenizer), model.config) if model.processor else None
        self._checking = threading.Lock()
        self._queue: deque[_Unit] = deque()
        self._running: list[_Unit] = []
        self._changed = threading.Condition()
        self._draining = self._closed = False
        self._served: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._batches = 0
        self._pace = 0.0  # seconds per unit, a moving average
        self._worker = threading.Thread(target=self._work, name="unilip-engine", daemon=True)
        self._worker.start()

    # --- for callers

    @property
    def verbs(self) -> tuple[str, ...]:
        """What this model can do: of generate, edit, reconstruct, ask, those whose parts are loaded."""
        text = self.model.processor is not None
        return tuple(
            verb for verb in VERBS if set(NEEDS[verb]) <= set(self.model.parts) and (text or verb == "reconstruct")
        )

    @property
    def alive(self) -> bool:
        """Whether the worker runs."""
        return self._worker.is_alive()

    @property
    def draining(self) -> bool:
        """Whether the engine takes nothing new."""
        return self._draining

    def stats(self) -> Stats:
        """Return counts for metrics and health pages."""
        with self._changed:
            return Stats(
                len(self._queue), len(self._running), dict(self._served), dict(self._failed), self._batches, self._pace
            )

    def submit(self, job: Job, *, deadline: float | None = None) -> Ticket:
        """Check a job and put it into the queue.

        Args:
            job: what to do.
            deadline: seconds from now after which nobody wants it any more; the engine's own by default.

        Raises:
            UniLIPError: something in the job is out of range; nothing was queued.
            QueueFull: too much is waiting; `retry_after` says for how long, in seconds.
            Draining: the engine is being shut down.
        """
        seconds = self.deadline if deadline is None else deadline
        if seconds is not None and not 0 < seconds < math.inf:
            raise UniLIPError(f"The deadline is {seconds} s; it must be more than 0 seconds.")
        units = self._prepare(job, None if seconds is None else time.monotonic() + seconds)
        ticket = units[0].ticket
        ticket._on_cancel = self._forget
        with self._changed:
            if self._draining:
                raise Draining("The server is shutting down; send the request again to another one, or later.", 5.0)
            self._sweep()
            if len(self._queue) + len(units) > self.max_queue:
                wait = self._estimate(len(self._queue) + len(self._running))
                raise QueueFull(
                    f"{len(self._queue)} of at most {self.max_queue} pictures are waiting, and this request adds "
                    f"{len(units)}; send it again in {wait:.0f} s.",
                    wait,
                )
            self._queue.extend(units)
            self._changed.notify_all()
        return ticket

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new and finish what was accepted; after `timeout` seconds the rest is cancelled.

        Returns whether everything was finished.
        """
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            finished = self._changed.wait_for(lambda: not self._queue and not self._running, timeout)
            rest = [*self._queue, *self._running]
        for unit in rest:
            unit.ticket._fail(Draining("The server shut down before the request was done; send it again.", 5.0))
        self._forget()
        return finished

    def close(self, timeout: float = 0.0) -> None:
        """Drain for at most `timeout` seconds, and end the worker."""
        self.drain(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join(60)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- checking

    def _prepare(self, job: Job, deadline: float | None) -> list[_Unit]:
        """Check a job and cut it into units."""
        verb = type(job).__name__.lower()
        if verb not in VERBS:
            raise UniLIPError(f"There is no job {type(job).__name__}; give Generate, Edit, Reconstruct or Ask.")
        self.model.require(*NEEDS[verb])
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
        size = self._check_size(job.image_size)
        if isinstance(job, Reconstruct):
            source = self._check_fit(job)
            ticket = Ticket(verb, job, 1, deadline)
            ticket.settings = {"image_size": size, "fit": job.fit}
            square = fit_square(source, size, job.fit)
            return [_Unit(ticket, (verb, size), 0, 0, (square,), source.size)]
        return self._prepare_drawing(job, verb, size, seed, deadline)

    def _prepare_drawing(
        self, job: Generate | Edit, verb: str, size: int, seed: int, deadline: float | None
    ) -> list[_Unit]:
        settings = self.model._sampling(job.steps, job.guidance_scale, job.solver, job.count, "pil")
        steps, guidance = settings.num_inference_steps, settings.guidance_scale
        if steps > self.limits.steps:
            raise UniLIPError(f"{steps} steps were asked for; at most {self.limits.steps} are taken here.")
        words = "prompt" if isinstance(job, Generate) else "instruction"
        text = check_prompt(job.prompt, words)
        negative = None if job.negative_prompt is None else check_prompt(job.negative_prompt, "negative prompt")
        processor = self._need_processor(size)
        make = processor.generate_text if isinstance(job, Generate) else processor.edit_text
        self._count_tokens(processor, make(text))
        if negative is not None:
            self._count_tokens(processor, make(negative))
        square, source_size, fit = (), (0, 0), None
        if isinstance(job, Edit):
            source = self._check_fit(job)
            square, source_size, fit = (fit_square(source, size, job.fit),), source.size, job.fit  # type: ignore[assignment]
        ticket = Ticket(verb, job, steps * job.count, deadline)
        ticket.settings = {
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "solver": settings.solver,
            "negative_prompt": negative,
            "image_size": size,
        } | ({} if fit is None else {"fit": fit})
        key = (verb, size, steps, guidance, settings.solver, negative)
        return [_Unit(ticket, key, i, seed + i, square, source_size, text) for i in range(job.count)]

    def _prepare_ask(self, job: Ask, seed: int, deadline: float | None) -> list[_Unit]:
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
        processor = self._need_processor(self.config.image_size)
        squares: list[Image.Image] = []

        def cut(images: Sequence[Image.Image]) -> tuple[int, ...]:
            tiles = [tile(load_image(image), processor.image_size, job.max_tiles) for image in images]
            squares.extend(square for picture in tiles for square in picture)
            return tuple(len(picture) for picture in tiles)

        turns = [Message(turn.role, check_prompt(turn.text, "message"), cut(turn.images)) for turn in job.history]
        turns.append(Message("user", check_prompt(job.question, "question"), cut(job.images)))
        text = processor.chat_text(turns)
        length = self._count_tokens(processor, text)
        if length + job.max_new_tokens > self.config.text.max_positions:
            raise PromptError(
                f"The conversation has {length} tokens and the answer may have {job.max_new_tokens}; this model reads "
                f"{self.config.text.max_positions} in all. Shorten it, or lower max_new_tokens."
            )
        ticket = Ticket("ask", job, job.max_new_tokens, deadline)
        ticket.settings = {"max_new_tokens": job.max_new_tokens, "temperature": job.temperature, "top_p": job.top_p}
        # a sampled answer draws from one generator, so it has a batch of its own
        key: tuple[Hashable, ...] = ("ask",) if job.temperature == 0 else ("ask", id(ticket))
        return [_Unit(ticket, key, 0, seed, tuple(squares), text=text)]

    def _check_size(self, size: int | None) -> int:
        most = self.limits.image_size or self.config.image_size
        if size is None:
            return self.config.image_size
        if not TOKEN_PIXELS <= size <= most or size % TOKEN_PIXELS:
            raise UniLIPError(
                f"image_size is {size}; it must be a multiple of {TOKEN_PIXELS} between {TOKEN_PIXELS} and {most}."
            )
        return size

    @staticmethod
    def _check_fit(job: Edit | Reconstruct) -> Image.Image:
        if job.fit not in FITS:
            raise UniLIPError(f"There is no way to fit an image called {job.fit!r}; allowed: {', '.join(FITS)}.")
        return load_image(job.image)

    def _need_processor(self, size: int) -> Processor:
        if self._processor is None:
            raise UniLIPError("This model has no tokenizer; put the tokenizer files beside the checkpoint.")
        with self._checking:
            return self._processor.resized(size)

    def _count_tokens(self, processor: Processor, text: str) -> int:
        with self._checking:
            return processor.tokenize([text]).input_ids.shape[1]

    # --- the queue (these hold the lock)

    def _sweep(self) -> None:
        """Fail what is past its deadline, and drop what nobody waits for."""
        now = time.monotonic()
        for unit in [*self._queue, *self._running]:
            limit = unit.ticket.deadline
            if unit.alive and limit is not None and now > limit:
                spent = now - unit.ticket.submitted
                unit.ticket._fail(
                    DeadlineExceeded(f"The request was not done within its {spent:.0f} s; send it again later.", 1.0)
                )
                self._failed[unit.ticket.verb] += 1
        if any(not unit.alive for unit in self._queue):
            self._queue = deque(unit for unit in self._queue if unit.alive)

    def _forget(self) -> None:
        with self._changed:
            self._queue = deque(unit for unit in self._queue if unit.alive)
            self._changed.notify_all()

    def _estimate(self, units: int) -> float:
        """Seconds until `units` waiting ones are served, at least one."""
        return max(1.0, math.ceil((self._pace or 0.5) * units))

    def _room(self, unit: _Unit) -> int:
        """How many units like this one make a batch."""
        if unit.ticket.verb == "ask":
            return self.max_batch
        size = unit.key[1]
        assert isinstance(size, int)
        return max(1, int(self.max_batch * min(1.0, (self.config.image_size / size) ** 2)))

    def _take(self) -> list[_Unit]:
        """Wait for work; return the oldest unit and those that can share its batch, or nothing at the end."""
        with self._changed:
            while True:
                self._sweep()
                if self._queue:
                    break
                if self._closed:
                    return []
                self._changed.wait(1.0)
            room = self._room(self._queue[0])
            if self.batch_wait and len(self._queue) < room:
                self._changed.wait_for(lambda: len(self._queue) >= room or self._closed, self.batch_wait)
                self._sweep()
            if not self._queue:
                return []
            key = self._queue[0].key
            batch = [unit for unit in self._queue if unit.key == key][:room]
            chosen = {id(unit) for unit in batch}
            self._queue = deque(unit for unit in self._queue if id(unit) not in chosen)
            self._running = batch
            return batch

    # --- the worker

    def _work(self) -> None:
        while True:
            batch = self._take()
            if not batch:
                with self._changed:
                    if self._closed:
                        return
                continue
            started = time.monotonic()
            try:
                self._serve(batch)
            except BaseException:  # the worker outlives whatever happens
                logger.exception("a batch failed beyond repair")
                self._fail_all(batch)
            seconds = time.monotonic() - started
            with self._changed:
                self._running = []
                self._batches += 1
                pace = seconds / len(batch)
                self._pace = pace if not self._pace else 0.8 * self._pace + 0.2 * pace
                self._changed.notify_all()
            if self.on_batch is not None:
                try:
                    self.on_batch(batch[0].ticket.verb, len(batch), seconds)
                except Exception:
                    logger.exception("on_batch failed")

    def _serve(self, batch: list[_Unit]) -> None:
        for unit in batch:
            unit.ticket._start()
        try:
            self._run(batch)
        except _Stop:
            return
        except Exception as error:
            alive = [unit for unit in batch if unit.alive]
            if len(alive) > 1:
                logger.warning("a batch of %d failed (%s); trying its members one by one", len(batch), error)
                for unit in alive:
                    unit.ticket._steps[unit.index] = 0
                    self._serve([unit])
                return
            logger.exception("a request failed")
            self._fail_all(alive)

    def _fail_all(self, batch: Sequence[_Unit]) -> None:
        for unit in batch:
            text = "The model failed on this request; the server's log says why. Sending it again may help."
            if unit.ticket._fail(EngineFailed(text, 1.0)):
                with self._changed:
                    self._failed[unit.ticket.verb] += 1

    def _run(self, batch: list[_Unit]) -> None:
        verb = batch[0].ticket.verb
        if verb == "ask":
            self._answer(batch)
        elif verb == "reconstruct":
            self._reconstruct(batch)
        else:
            self._draw(batch, verb)

    def _checkpoint(self, batch: Sequence[_Unit]) -> None:
        """Between two steps: let deadlines pass, and stop when nobody waits any more."""
        with self._changed:
            self._sweep()
        if not any(unit.alive for unit in batch):
            raise _Stop

    def _draw(self, batch: list[_Unit], verb: str) -> None:
        def on_step(model: UniLIP, step: int, timestep: Tensor, values: dict[str, Tensor]) -> None:
            for unit in batch:
                unit.ticket._step(unit.index)
            for ticket in {id(unit.ticket): unit.ticket for unit in batch}.values():
                ticket._tell_step()
            self._checkpoint(batch)

        settings = {k: v for k, v in batch[0].ticket.settings.items() if k != "fit"}
        settings |= {
            "generator": [torch.Generator().manual_seed(unit.seed) for unit in batch],
            "callback_on_step_end": on_step,
            "progress": False,
        }
        texts = [unit.text for unit in batch]
        if verb == "edit":
            images = self.model.edit([unit.squares[0] for unit in batch], texts, **settings).images
        else:
            images = self.model.generate(texts, **settings).images
        for unit, image in zip(batch, images, strict=True):
            job = unit.ticket.job
            shaped = isinstance(job, Edit) and job.keep_aspect
            unit.output = unfit_square(image, unit.source_size, job.fit) if shaped else image  # type: ignore[union-attr]
            self._finish(unit)

    def _finish(self, unit: _Unit) -> None:
        """Keep a finished picture; the job is done when all of its pictures are."""
        ticket = unit.ticket
        made = ticket._made
        made[unit.index] = unit
        job = ticket.job
        assert isinstance(job, (Generate, Edit))
        if len(made) == job.count and not ticket.done:
            ordered = [made[i] for i in range(job.count)]
            self._count(ticket)
            ticket._succeed(images=tuple(u.output for u in ordered), seeds=tuple(u.seed for u in ordered))

    def _count(self, ticket: Ticket) -> None:
        with self._changed:
            self._served[ticket.verb] += 1

    def _reconstruct(self, batch: list[_Unit]) -> None:
        squares = [unit.squares[0] for unit in batch]
        images = self.model.reconstruct(squares, image_size=squares[0].width).images
        for unit, square, image in zip(batch, squares, images, strict=True):
            job = unit.ticket.job
            assert isinstance(job, Reconstruct)
            shaped = unfit_square(image, unit.source_size, job.fit) if job.keep_aspect else image
            self._count(unit.ticket)
            unit.ticket._succeed(images=(shaped,), psnr=(psnr(square, image),))

    @torch.no_grad()
    def _answer(self, batch: list[_Unit]) -> None:
        model, processor = self.model, self.model.processor
        assert processor is not None
        jobs = [unit.ticket.job for unit in batch]
        tokens = processor.tokenize([unit.text for unit in batch]).to(model.device)
        squares = [square for unit in batch for square in unit.squares]
        features = model.encoder(to_pixels(squares).to(model.device)) if squares else None
        embeddings = model.mllm.embed(tokens.input_ids, tokens.image_slots, features)
        first = jobs[0]
        assert isinstance(first, Ask)
        columns = model.mllm.answer(
            embeddings, tokens.attention_mask, end_id=processor.end_id,
            max_new_tokens=max(job.max_new_tokens for job in jobs if isinstance(job, Ask)),
            temperature=first.temperature, top_p=first.top_p,
            generator=torch.Generator().manual_seed(batch[0].seed),
        )  # fmt: skip
        lengths = tokens.attention_mask.sum(1).tolist()
        answers = [_Answer(processor, unit, length) for unit, length in zip(batch, lengths, strict=True)]
        for column in columns:
            for answer, token in zip(answers, column.tolist(), strict=True):
                if answer.take(token):
                    self._count(answer.unit.ticket)
                    answer.end()
            self._checkpoint(batch)
        # the loop ends by _Stop when the last answer ends, or here when all rows ended together
        for answer in answers:
            answer.end()


class _Answer:
    """The text of one row of a batch as it grows; a piece is held back while it may still be half a character."""

    def __init__(self, processor: Processor, unit: _Unit, prompt_tokens: int) -> None:
        assert isinstance(unit.ticket.job, Ask)
        self.processor, self.unit, self.prompt_tokens = processor, unit, prompt_tokens
        self.limit = unit.ticket.job.max_new_tokens
        self.ids: list[int] = []
        self.shown = self.text = ""
        self.reason = ""

    def take(self, token: int) -> bool:
        """Add a token; return whether the answer ended with it."""
        if self.reason or not self.unit.alive:
            return False
        if token == self.processor.end_id:
            self.reason = "stop"
            return True
        self.ids.append(token)
        self.text = self.processor.decode(torch.tensor([self.ids]))[0]
        if self.text.startswith(self.shown) and not self.text.endswith("\ufffd") and len(self.text) > len(self.shown):
            self.unit.ticket._emit(Event("text", len(self.ids), self.limit, self.text[len(self.shown) :]))
            self.shown = self.text
        if len(self.ids) >= self.limit:
            self.reason = "length"
        return bool(self.reason)

    def end(self) -> None:
        """Give the rest of the text, and the result."""
        ticket = self.unit.ticket
        if self.text.startswith(self.shown) and len(self.text) > len(self.shown):
            ticket._emit(Event("text", len(self.ids), self.limit, self.text[len(self.shown) :]))
            self.shown = self.text
        ticket._succeed(
            text=self.text, seeds=(self.unit.seed,), finish_reason=self.reason or "stop",
            prompt_tokens=self.prompt_tokens, completion_tokens=len(self.ids),
        )  # fmt: skip


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two 8-bit pictures of one size; infinite when they are equal."""
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return math.inf if error == 0 else float(10 * np.log10(255**2 / error))
