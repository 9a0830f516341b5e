"""One model behind a queue: jobs of many callers in, batches through the model, results back to each.

In:  jobs (`unilip.serve.jobs`), from any thread, each with a deadline. Out: a `Ticket` for each: events, a result. A
single worker thread owns the model. It takes the first waiting picture and all others that can share its batch (same
verb, settings and size). Each has a generator of its own: what it looks like does not depend on its batch.

Weighted fair queueing: a virtual clock runs at the pace of one equal share of the worker's time, each client's seconds
are counted against it, and what waits is served in the order in which it would end if all had their share all the time.
"""

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from unilip.adapters import adapter_names, adapter_scale
from unilip.errors import UniLIPError
from unilip.fast.loop import Settings
from unilip.method.flow import make_schedule
from unilip.model import UniLIP
from unilip.pictures import picture_psnr, to_pixels, unfit_square
from unilip.sampling import TextStream, answer, not_finite
from unilip.serve.checks import Adapters, Checker
from unilip.serve.checks import Limits as Limits
from unilip.serve.jobs import Ask, DeadlineExceeded, Edit, EngineFailed, Event, Reconstruct
from unilip.serve.jobs import Generate as Generate
from unilip.serve.log import REQUEST
from unilip.serve.serving import Serving, Stats
from unilip.serve.tickets import Ticket, Unit

logger = logging.getLogger(__name__)
MAX_FAILURES = 5


class _Stop(Exception):
    """Raised in a step when nobody wants the batch any more."""


class Engine(Serving):
    """Serves one model to many callers.

    Args:
        model: a loaded `UniLIP`; from now on the engine's worker thread alone may use it.
        max_queue: pictures and questions that may wait; beyond that `submit` raises `QueueFull`.
        max_batch: pictures or questions in one batch, at the model's own size; larger pictures make smaller batches.
        batch_wait: seconds to wait for company when less than a batch is waiting.
        deadline: seconds that a job may take, waiting included; None is for ever. A step that lasts longer is held to
            hang: jobs end at their deadlines all the same, and the engine is no longer `alive`.
        limits: the most that one job may ask for.
        adapters: that jobs may name: by name the folder, and the strength where a job leaves it open. They act on those
            jobs alone; others the model may have act on all.
        on_batch: called from the worker as f(verb, size, seconds) after each batch, for metrics.

    Use:

        with Engine(UniLIP.from_pretrained()) as engine:
            ticket = engine.submit(Generate("three yellow stars", seed=7), deadline=60)
            for event in ticket.events():              # or: async for event in ticket.events_async()
                show(event.kind, event.step, event.steps)
            picture = ticket.result().images[0]        # or: await ticket.result_async()

    Should a batch fail, its members are tried one by one.
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
        adapters: Adapters | None = None,
    ) -> None:
        if batch_wait < 0:
            raise UniLIPError("batch_wait must be at least 0 seconds.")
        checker = Checker(model.config, model.parts, model.processor, limits, adapters)
        super().__init__(checker, max_queue, max_batch, deadline)
        self.model, self.batch_wait, self.on_batch = model, batch_wait, on_batch
        self._always = {name: adapter_scale(model, name) for name in adapter_names(model)}
        self._acting = tuple[tuple[str, float], ...]()  # of those that jobs name
        for name, (folder, _) in (adapters or {}).items():
            model.load_adapter(folder, name, 0.0)
        if adapters:
            model.set_adapters(self._always)
        self._queue: deque[Unit] = deque()
        self._running: list[Unit] = []
        self._closed = False
        self._paces: dict[str, float] = {}  # of each verb, seconds for a step of a unit
        self._clock = 0.0  # seconds of work that a client had who got an equal share all the time
        self._used: dict[str, float] = {}  # the same of clients who had more
        self._failures = 0  # batches in a row
        self._moved = 0.0  # when the worker last made a step
        self._worker = threading.Thread(target=self._work, name="unilip-engine", daemon=True)
        self._worker.start()
        threading.Thread(target=self._watch, name="unilip-deadlines", daemon=True).start()

    # --- for callers

    def lend(self, name: str, folder: str | os.PathLike[str]) -> None:
        """Offer one more adapter to jobs, once the model is free. Raises UniLIPError: it does not fit, or is known."""
        self.model.load_adapter(folder, name, 0.0)
        self.checker.lend(name, folder)

    @property
    def alive(self) -> bool:
        """Whether the worker does its work: it runs, does not hang, and not all of the last batches failed."""
        hangs = self._running and self.deadline is not None and time.monotonic() - self._moved > self.deadline
        return self._worker.is_alive() and not hangs and self._failures < MAX_FAILURES

    def stats(self) -> Stats:
        with self._changed:
            return Stats(len(self._queue), len(self._running))

    def ahead(self, ticket: Ticket) -> int:
        with self._changed:
            before = [*self._running, *self._order()]
        return next((n for n, unit in enumerate(before) if unit.ticket is ticket), 0) if ticket.started is None else 0

    def close(self, timeout: float = 0.0) -> None:
        self.drain(timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._worker.join(60)

    # --- the queue (these hold the lock)

    def _take_in(self, units: Sequence[Unit]) -> None:
        self._sweep()
        ticket = units[0].ticket
        places = Counter(unit.ticket for unit in self._queue)
        self._make_room(places, ticket, len(units), self.max_queue, len(self._running))
        ticket._on_cancel, ticket.since = self._sweep, self._clock
        self._queue.extend(units)
        self._changed.notify_all()

    def _unfinished(self) -> list[Ticket]:
        return list({unit.ticket: None for unit in [*self._queue, *self._running]})

    def _sweep(self) -> None:
        """Fail what is past its deadline, and drop what nobody waits for; takes the lock, held or not."""
        with self._changed:
            now = time.monotonic()
            for unit in [*self._queue, *self._running]:
                limit, waited = unit.ticket.deadline, now - unit.ticket.submitted
                if unit.alive and limit is not None and now > limit:
                    text = f"The request was not done within its {round(waited, 2):g} s; send it again later."
                    unit.ticket._end(DeadlineExceeded(text, 1.0))
            self._queue = deque(unit for unit in self._queue if unit.alive)
            self._changed.notify_all()

    def _order(self) -> list[Unit]:
        """What waits, in the order in which it is served: that of the ends that it would have in an equal share."""
        ends: dict[str, float] = {}
        for unit in self._queue:
            ticket = unit.ticket
            unit.begin = max(ends.get(ticket.client, self._used.get(ticket.client, 0.0)), ticket.since)
            unit.end = ends[ticket.client] = unit.begin + unit.steps * self._paces.get(ticket.verb, 0.0)
        return sorted(self._queue, key=lambda unit: unit.end)

    def _charge(self, batch: Sequence[Unit], seconds: float) -> None:
        """Count the seconds of a batch to those who asked for it."""
        if any(unit.ticket.succeeded for unit in batch):  # else they left, and its seconds say nothing
            self._paces[batch[0].ticket.verb] = seconds / len(batch) / batch[0].steps
        clients = {unit.ticket.client for unit in [*batch, *self._queue]}
        for unit in batch:
            name = unit.ticket.client
            self._used[name] = self._used.get(name, self._clock) + seconds / len(batch)
        self._clock += seconds / len(clients)
        self._used = {name: used for name, used in self._used.items() if used > self._clock}

    def _room(self, unit: Unit) -> int:
        if unit.ticket.verb == "ask":
            return self.max_batch
        width, height = (unit.ticket.settings[side] for side in ("width", "height"))
        tries = unit.ticket.settings.get("best_of", 1)
        return max(1, int(self.max_batch / tries * min(1.0, self.config.image_size**2 / (width * height))))

    def _take(self) -> list[Unit]:
        """Wait for work; return the first unit and those that can share its batch; none at the end, or if all left."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            self._sweep()
            room = self._room(self._order()[0]) if self._queue else 0
            if self.batch_wait and len(self._queue) < room:
                self._changed.wait_for(lambda: len(self._queue) >= room or self._closed, self.batch_wait)
                self._sweep()
            order = self._order()
            if not order:
                return []
            self._clock = max(self._clock, order[0].begin)  # who leaves takes no share, and others have more than one
            batch = [unit for unit in order if unit.key == order[0].key][:room]
            self._queue = deque(unit for unit in self._queue if unit not in batch)
            self._running = batch
            return batch

    def _watch(self) -> None:
        """Let deadlines pass while the worker is busy, or hangs."""
        while not self._closed:
            self._sweep()
            time.sleep(0.5)

    # --- the worker

    def _work(self) -> None:
        while not self._closed or self._queue:
            batch = self._take()
            if not batch:
                continue
            started = self._moved = time.monotonic()
            try:
                self._serve(batch)
            except BaseException:  # the worker outlives whatever happens
                logger.exception("a batch failed beyond repair")
                self._fail_all(batch)
            seconds = time.monotonic() - started
            with self._changed:
                self._running = []
                self._charge(batch, seconds)
                self._count_pace(seconds / len(batch))
                self._changed.notify_all()
            if self.on_batch is not None:
                try:
                    self.on_batch(batch[0].ticket.verb, len(batch), seconds)
                except Exception:
                    logger.exception("on_batch failed")
            batch = []  # else the pictures of the last batch would be kept until the next

    def _serve(self, batch: list[Unit]) -> None:
        for unit in batch:
            unit.ticket._start()
        REQUEST.set(" ".join(dict.fromkeys(unit.ticket.request for unit in batch if unit.ticket.request)))
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
            self._failures += 1
            logger.exception("the model failed on a request")
            self._fail_all(alive)

    def _fail_all(self, batch: Sequence[Unit]) -> None:
        for unit in batch:
            text = "The model failed on this request; the server's log says why. Sending it again may help."
            unit.ticket._end(EngineFailed(text, 1.0))

    def _run(self, batch: list[Unit]) -> None:
        verb, acting = batch[0].ticket.verb, batch[0].ticket.job.adapters
        if acting != self._acting:
            self.model.set_adapters(self._always | dict(acting))
            self._acting = acting
        if verb == "ask":
            with self.model.using(), torch.no_grad():  # who changes the model meanwhile waits
                self._answer(batch)
        elif verb == "reconstruct":
            self._reconstruct(batch)
        else:
            self._draw(batch, verb)

    def _checkpoint(self, batch: Sequence[Unit]) -> None:
        """Between two steps: let deadlines pass, and stop when nobody waits any more."""
        self._moved = time.monotonic()
        self._sweep()
        if not any(unit.alive for unit in batch):
            raise _Stop

    def _draw(self, batch: list[Unit], verb: str) -> None:
        before: Tensor | None = None

        def on_step(model: UniLIP, step: int, timestep: Tensor, values: dict[str, Tensor]) -> None:
            nonlocal before
            self._sketch(batch, step + 1, before, values["latents"])
            before = values["latents"]
            for unit in batch:
                unit.ticket._steps[unit.index] += 1
            for ticket in {unit.ticket: None for unit in batch}:
                ticket._emit(Event("step", sum(ticket._steps.values()), ticket.total))
            self._checkpoint(batch)

        settings = {k: v for k, v in batch[0].ticket.settings.items() if k not in ("fit", "adapters")}
        generators = [torch.Generator().manual_seed(unit.seed) for unit in batch]
        settings |= {"generator": generators, "callback_on_step_end": on_step, "progress": False}
        texts = [str(unit.text) for unit in batch]
        if verb == "edit":
            together = list(batch[0].squares) if len(batch[0].squares) > 1 else None
            sources = together or [unit.squares[0] for unit in batch]
            output = self.model.edit(sources, texts, joint=together is not None, **settings)
        else:
            output = self.model.generate(texts, **settings)
        for unit, image, plan in zip(batch, output.images, output.plans or [None] * len(batch), strict=True):
            ticket, made = unit.ticket, unit.ticket._made
            made[unit.index] = (_shaped(unit, image), unit.seed)
            if len(made) == getattr(ticket.job, "count", 1) and not ticket.done:
                images, seeds = zip(*(made[i] for i in sorted(made)), strict=True)
                self._failures = 0
                ticket._succeed(images=images, seeds=seeds, plan=plan)

    def _sketch(self, batch: Sequence[Unit], done: int, before: Tensor | None, now: Tensor) -> None:
        """Show where the latents of a step go straight on to, to those who want partial pictures after it."""
        settings, wanted = batch[0].ticket.settings, {}
        steps = settings["num_inference_steps"]
        for row, unit in enumerate(batch):
            partials = min(getattr(unit.ticket.job, "partials", 0), steps - 2)  # the first step has no direction yet
            places = [max(k + 1, round(k * steps / (partials + 1))) for k in range(1, partials + 1)]
            if unit.alive and done in places:
                wanted[row] = places.index(done)
        if not wanted or before is None:
            return
        shift = Settings.of(self.model.config, settings["preset"]).flow_shift
        levels = make_schedule(settings["solver"], shift, steps).levels
        velocity = (now - before) / (levels[done] - levels[done - 1])
        images = self.model.decode((now - levels[done] * velocity)[list(wanted)]).images
        for (row, number), image in zip(wanted.items(), images, strict=True):
            unit = batch[row]
            unit.ticket._emit(Event("partial", image=_shaped(unit, image), picture=unit.index, number=number))

    def _reconstruct(self, batch: list[Unit]) -> None:
        squares = [unit.squares[0] for unit in batch]
        images = self.model.reconstruct(squares, width=squares[0].width, height=squares[0].height).images
        self._failures = 0
        for unit, square, image in zip(batch, squares, images, strict=True):
            unit.ticket._succeed(images=(_shaped(unit, image),), psnr=(picture_psnr(square, image),))

    def _answer(self, batch: list[Unit]) -> None:
        model, processor = self.model, self.model.processor
        assert processor is not None
        jobs = [unit.ticket.job for unit in batch if isinstance(unit.ticket.job, Ask)]
        squares = [square for unit in batch for square in unit.squares]
        features = model.features(to_pixels(squares)) if squares else None
        columns = answer(
            model, processor, [unit.text for unit in batch], features,
            max_new_tokens=max(job.max_new_tokens for job in jobs), temperature=jobs[0].temperature,
            top_p=jobs[0].top_p, generator=torch.Generator().manual_seed(batch[0].seed),
        )  # fmt: skip
        streams = [TextStream(processor, job.max_new_tokens) for job in jobs]
        with contextlib.closing(columns):  # the loop ends by _Stop when the last answer ends
            for column in columns:
                for unit, stream, token in zip(batch, streams, column, strict=True):
                    if stream.reason or not unit.alive:
                        continue
                    if token < 0:  # the others of the batch go on
                        logger.error("%s", not_finite("mllm", model.dtype))
                        self._fail_all([unit])
                        self._failures += 1
                        continue
                    piece, count = stream.take(token), len(stream.ids)
                    if piece:
                        unit.ticket._emit(Event("text", count, stream.limit, piece))
                    if stream.reason:
                        self._failures = 0
                        told = {"text": stream.text, "finish_reason": stream.reason, "completion_tokens": count}
                        unit.ticket._succeed(seeds=(unit.seed,), **told)
                self._checkpoint(batch)


def _shaped(unit: Unit, image: Image.Image) -> Image.Image:
    """Give a picture the shape of its source where that is wanted."""
    job = unit.ticket.job
    if isinstance(job, (Edit, Reconstruct)) and job.keep_aspect:
        return unfit_square(image, unit.source_size, job.fit)
    return image
