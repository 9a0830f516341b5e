"""What the engine of one process and that of replicas share: which jobs are taken, which give way, how it ends."""

import math
import threading
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from unilip.errors import UniLIPError, check_number
from unilip.serve.checks import Checker
from unilip.serve.jobs import Draining, Job, QueueFull
from unilip.serve.tickets import Ticket, Unit

YIELDED = "The queue is full and this client holds most of it, so others came first; send this again in {:.0f} s."


@dataclass(frozen=True)
class Stats:
    """A snapshot of an engine: pictures and questions waiting and being worked on."""

    queued: int
    running: int


class Serving(AbstractContextManager["Serving"]):
    """Takes jobs for a model, as many as there is room for, with a fair share for each client."""

    def __init__(self, checker: Checker, max_queue: int, max_batch: int, deadline: float | None) -> None:
        check_number("max_queue", max_queue, 1, whole=True)
        check_number("max_batch", max_batch, 1, whole=True)
        if deadline is not None and deadline <= 0:
            raise UniLIPError("The deadline must be more than 0 seconds.")
        self.checker, self.config, self.limits = checker, checker.config, checker.limits
        self.verbs = checker.verbs  # what this model can do
        self.max_queue, self.max_batch, self.deadline = max_queue, max_batch, deadline
        self._changed = threading.Condition()
        self.draining = False  # whether nothing new is taken
        self._pace = 0.0  # seconds per unit, a moving average

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether the work is done."""

    def stop_accepting(self) -> None:
        """Take nothing new from now on; safe to call from a signal handler. `drain` waits as well."""
        self.draining = True

    def submit(self, job: Job, *, deadline: float | None = None) -> Ticket:
        """Check a job and put it into the queue, for `deadline` seconds or the engine's own.

        Raises UniLIPError: it is out of range; Draining: shutting down; QueueFull: too much is waiting, `retry_after`
        says for how long (a waiting job ends with it, too, if its client holds most places and one with fewer comes).
        """
        if deadline is not None and not 0 < deadline < math.inf:
            raise UniLIPError(f"The deadline is {deadline} s; it must be more than 0 seconds.")
        seconds = min((given for given in (deadline, self.deadline) if given is not None), default=None)
        units = self.checker.prepare(job, None if seconds is None else time.monotonic() + seconds)
        with self._changed:
            if self.draining:
                raise Draining("The server is shutting down; send the request again to another one, or later.", 5.0)
            self._take_in(units)
        return units[0].ticket

    @abstractmethod
    def _take_in(self, units: Sequence[Unit]) -> None:
        """Queue the units of a job, after `_make_room` for them; called under the lock."""

    @abstractmethod
    def _unfinished(self) -> Sequence[Ticket]:
        """The jobs that wait or are worked on; called under the lock."""

    @abstractmethod
    def stats(self) -> Stats:
        """Return what waits and what is worked on, for metrics and health pages."""

    @abstractmethod
    def ahead(self, ticket: Ticket) -> int:
        """How many pictures and questions are served before a job that waits; 0 once it is being worked on."""

    def _make_room(self, places: Mapping[Ticket, int], newcomer: Ticket, more: int, room: int, busy: int = 0) -> None:
        """Let the newest jobs of the client with most places go for a newcomer with fewer, where that is needed.

        places: how many pictures of each job wait, the oldest job first, for `room`; busy: those under way.
        """
        waiting = sum(places.values())
        wait = max(1.0, math.ceil((self._pace or 0.5) * (waiting + busy)))
        kept = dict(places)
        while sum(kept.values()) + more > room:
            held: Counter[str] = Counter()
            for ticket, count in kept.items():
                held[ticket.client] += count
            most = max(held, key=held.__getitem__, default="")
            last = next((one for one in reversed(kept) if one.client == most and one.started is None), None)
            if last is None or held[most] <= held[newcomer.client] + more:
                text = f"{waiting} of at most {room} pictures are waiting, and this request adds {more}"
                raise QueueFull(f"{text}; send it again in {wait:.0f} s.", wait)
            del kept[last]
        for other in places.keys() - kept.keys():
            other._drop(QueueFull(YIELDED.format(wait), wait))

    def _count_pace(self, seconds: float) -> None:
        """Count what a unit took into the moving average; called under the lock."""
        self._pace = 0.8 * self._pace + 0.2 * seconds if self._pace else seconds

    def drain(self, timeout: float | None = None) -> bool:
        """Take nothing new, and finish what was accepted in `timeout` seconds or cancel it; returns if all was done."""
        with self._changed:
            self.draining = True
            self._changed.notify_all()
            finished = self._changed.wait_for(lambda: not self._unfinished(), timeout)
            rest = self._unfinished()
        for ticket in rest:
            ticket._drop(Draining("The server shut down before the request was done; send it again.", 5.0))
        return finished

    @abstractmethod
    def close(self, timeout: float = 0.0) -> None:
        """Drain for at most `timeout` seconds, and end."""

    def __exit__(self, *error: object) -> None:
        self.close()
