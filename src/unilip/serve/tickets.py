"""What a caller holds of a job that was accepted (`Ticket`), and what the queue holds of it (`Unit`)."""

import asyncio
import contextlib
import logging
import queue as queues
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from unilip.errors import UniLIPError
from unilip.method.text import Prompt
from unilip.serve.jobs import Cancelled, Event, Job, Result
from unilip.serve.log import CLIENT, REQUEST

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class Ticket:
    """A job that was accepted: follow it, wait for it, or give it up. Every method may be called from any thread."""

    verb: str
    job: Job
    deadline: float | None
    total: int = 1  # steps of all its pictures
    settings: dict[str, Any] = field(default_factory=dict)
    prompt_tokens: int = 0
    since: float = 0.0  # when it came, on the engine's virtual clock
    started: float | None = None
    submitted: float = field(default_factory=time.monotonic)
    request: str = field(default_factory=REQUEST.get)  # for the log
    client: str = field(default_factory=CLIENT.get)  # for a fair share

    def __post_init__(self) -> None:
        self._steps, self._made = Counter[int](), dict[int, tuple[Image.Image, int]]()  # pictures and their seeds
        self._past, self._listeners = list[Event](), list[Callable[[Event], None]]()
        self._lock, self._done = threading.RLock(), threading.Event()
        self._outcome: Result | UniLIPError | None = None
        self._on_cancel: Callable[[], None] = lambda: None

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def succeeded(self) -> bool:
        return isinstance(self._outcome, Result)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event, past ones at once, later ones under locks: it must not call back."""
        with self._lock:
            for event in self._past:
                listener(event)
            self._listeners.append(listener)

    def cancel(self) -> bool:
        """Give the job up, waiting or after its present step, with `Cancelled`; returns whether it was unfinished."""
        return self._drop(Cancelled("The request was cancelled."))

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result. Raises TimeoutError, or `Cancelled`, `DeadlineExceeded`, `EngineFailed`, `Draining`."""
        if not self._done.wait(timeout):
            raise TimeoutError(f"no result within {timeout} s")
        if isinstance(self._outcome, UniLIPError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def events(self) -> Iterator[Event]:
        """Yield events until the end, waiting for each. Ask `result()` afterwards; the job goes on if you stop."""
        waiting: queues.SimpleQueue[Event] = queues.SimpleQueue()
        self.listen(waiting.put)
        while (event := waiting.get()).kind != "end":
            yield event

    async def events_async(self) -> AsyncIterator[Event]:
        """Yield events until the end, in an event loop."""
        with contextlib.suppress(UniLIPError):  # `result` raises it
            async for _, event in merged([self]):
                if event is not None:
                    yield event

    async def result_async(self) -> Result:
        """Wait for the result in an event loop; a task that is cancelled meanwhile cancels the job."""
        try:
            async for _ in merged([self]):
                pass
        finally:
            self.cancel()
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
                self._emit(Event("start", 0, self.total))

    def _drop(self, error: UniLIPError) -> bool:
        """Fail, and tell the engine so; returns whether the job was unfinished."""
        if dropped := self._end(error):
            self._on_cancel()
        return dropped

    def _succeed(self, **values: Any) -> None:
        seconds = time.monotonic() - self.submitted
        self._end(Result(settings=self.settings, prompt_tokens=self.prompt_tokens, seconds=seconds, **values))

    def _end(self, outcome: Result | UniLIPError) -> bool:
        """End; returns whether the job was unfinished."""
        with self._lock:
            if self.done:
                return False
            self._outcome = outcome
            self._done.set()
            self._emit(Event("end"))
            return True


async def merged(tickets: Sequence[Ticket], patience: float | None = None) -> AsyncIterator[tuple[int, Event | None]]:
    """Yield the events of several tickets as they come, and None after `patience` seconds in which nothing happens.

    Ends when all tickets have. Raises UniLIPError: what one of them ended with.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

    def forward(number: int, event: Event) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, (number, event))

    for number, ticket in enumerate(tickets):
        ticket.listen(partial(forward, number))
    left = len(tickets)
    while left:
        try:
            number, event = await asyncio.wait_for(queue.get(), patience)
        except asyncio.TimeoutError:
            yield 0, None
            continue
        if event.kind == "end":
            left -= 1
            tickets[number].result(0)
        else:
            yield number, event


@dataclass(eq=False)
class Unit:
    """One picture, or one answer, of a job: what the queue holds and a batch is made of."""

    ticket: Ticket
    key: tuple[Hashable, ...]
    index: int
    seed: int
    squares: tuple[Image.Image, ...] = ()
    source_size: tuple[int, int] = (0, 0)
    text: str | Prompt = ""
    begin: float = 0.0  # on the engine's virtual clock, in an equal share
    end: float = 0.0

    @property
    def steps(self) -> float:
        """Its part of the steps of its job."""
        return self.ticket.total / getattr(self.ticket.job, "count", 1)

    @property
    def alive(self) -> bool:
        return not self.ticket.done
