"""The same application over many replicas: an engine whose jobs run in Ray Serve, on other processes, GPUs or machines.

Each replica holds a whole `Engine`. Ray routes a job to the replica with less to do, starts another where one dies, and
adds or removes replicas with the load. A job whose replica dies fails with `ReplicaLost`.
"""

import asyncio
import dataclasses
import itertools
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import open_checkpoint
from unilip.checkpoints.tokenizer import load_tokenizer
from unilip.errors import UniLIPError
from unilip.machine import start_ray
from unilip.method.text import Processor
from unilip.model import UniLIP
from unilip.serve.checks import Adapters, Checker
from unilip.serve.engine import Engine
from unilip.serve.jobs import DeadlineExceeded, EngineFailed, Event, Job, Result
from unilip.serve.log import CLIENT
from unilip.serve.serving import Serving, Stats
from unilip.serve.tickets import Ticket, Unit

logger = logging.getLogger(__name__)
APP = "unilip"
START_SECONDS = 600.0  # for the first replicas to load


class ReplicaLost(EngineFailed):
    """The replica that worked on the request is gone; another one will take the request when it is sent again."""


class Replica:
    """A process of the deployment: a model and its engine."""

    def __init__(self, source: Source, device: str, loading: dict[str, Any], options: dict[str, Any]) -> None:
        self.engine = Engine(UniLIP.from_pretrained(source, device=device, **loading), **options)

    async def run(self, job: Job, deadline: float | None, client: str) -> AsyncIterator[Event | Result | UniLIPError]:
        """Work on a job: yield its events, and at last its result or the error that it ended with."""
        CLIENT.set(client)
        ticket = None
        try:
            ticket = await asyncio.to_thread(self.engine.submit, job, deadline=deadline)
            async for event in ticket.events_async():
                yield event
            yield ticket.result(0)
        except UniLIPError as error:
            yield error
        finally:
            if ticket is not None:
                ticket.cancel()

    def process(self) -> int:
        return os.getpid()

    def check_health(self) -> None:
        """Raise when the engine's worker is gone, so that Ray starts another replica."""
        if not self.engine.alive:
            raise RuntimeError("the engine's worker has ended")


class RemoteEngine(Serving):
    """Serves a model by replicas; to its callers it is like `Engine`.

    Args:
        source, device, dtype, performance: as `UniLIP.from_pretrained` takes them; every replica loads the model.
        replicas, most: how many; `most` above them lets their number follow the load. gpus: that each needs.
        max_queue: pictures and questions that may wait in front of all replicas.
        max_batch, adapters: of each replica's engine.
        deadline: seconds, of a job that does not say so itself.

    It joins the Ray cluster that RAY_ADDRESS names, or starts one in this machine.
    """

    def __init__(
        self, source: Source = None, *, device: str = "cpu", dtype: str | None = None, performance: str = "exact",
        replicas: int = 1, most: int | None = None, gpus: float = 0.0, max_queue: int = 64, max_batch: int = 8,
        deadline: float | None = 300.0, adapters: Adapters | None = None,
    ) -> None:  # fmt: skip
        from ray import serve

        most = replicas if most is None else most
        if not 1 <= replicas <= most:
            raise UniLIPError(f"There cannot be {replicas} to {most} replicas; 1 is least.")
        opened = open_checkpoint(source)
        processor = Processor(load_tokenizer(opened.tokenizer_path), opened.config) if opened.tokenizer_path else None
        checker = Checker(opened.config, opened.parts, processor, None, adapters)
        super().__init__(checker, max_queue, max_batch, deadline)
        self._open: dict[Ticket, int] = {}  # of pictures and questions

        start_ray(namespace=APP)
        serve.start(proxy_location="Disabled")  # the application stays here; only the model is spread
        self._room = max_queue + most * max_batch
        options = {"max_queue": self._room, "max_batch": max_batch, "limits": self.limits, "adapters": adapters}
        load = {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": max_batch}
        scaling: dict[str, Any] = {"autoscaling_config": load} if most > replicas else {"num_replicas": replicas}
        deployment: Any = serve.deployment(
            Replica, name="Replica", max_ongoing_requests=4 * max_batch, health_check_period_s=2,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpus}, **scaling,
        )  # fmt: skip
        bound = deployment.bind(source, device, {"dtype": dtype, "performance": performance}, options)
        self._handle = serve.run(bound, name=APP, route_prefix=None)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="unilip-remote", daemon=True)
        self._thread.start()
        self.processes(1, START_SECONDS)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def processes(self, tries: int = 20, patience: float = 60) -> set[int]:
        """Ask the replicas for the numbers of their processes; with enough tries all of them answer."""

        async def ask() -> set[int]:
            return set(await asyncio.gather(*(self._handle.process.remote() for _ in range(tries))))

        return asyncio.run_coroutine_threadsafe(ask(), self._loop).result(patience)

    def stats(self) -> Stats:
        with self._changed:  # what waits inside a replica counts as waiting
            running = sum(count for ticket, count in self._open.items() if ticket.started is not None)
            return Stats(sum(self._open.values()) - running, running)

    def ahead(self, ticket: Ticket) -> int:
        with self._changed:
            if ticket not in self._open or ticket.started is not None:
                return 0
            return sum(self._open[one] for one in itertools.takewhile(lambda one: one is not ticket, self._open))

    def _take_in(self, units: Sequence[Unit]) -> None:
        ticket = units[0].ticket
        self._make_room(self._open, ticket, len(units), self._room)
        self._open[ticket] = len(units)
        future = asyncio.run_coroutine_threadsafe(self._follow(ticket), self._loop)
        ticket._on_cancel = future.cancel  # type: ignore[assignment]

    def _unfinished(self) -> list[Ticket]:
        return list(self._open)

    async def _follow(self, ticket: Ticket) -> None:
        """Send a job, pass on what comes back, and see that the ticket ends in every case."""
        stream, seconds = None, None if ticket.deadline is None else ticket.deadline - ticket.submitted
        try:
            stream = self._handle.options(stream=True).run.remote(ticket.job, seconds, ticket.client)
            await asyncio.wait_for(self._pass_on(ticket, stream), seconds)
        except asyncio.TimeoutError:
            text = f"The request was not done within its {round(seconds or 0, 2):g} s; send it again."
            ticket._end(DeadlineExceeded(text, 1.0))
        except asyncio.CancelledError:
            pass
        except Exception as error:  # whatever Ray raises for an actor that died
            logger.warning("a replica was lost: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
            ticket._end(ReplicaLost("The replica that held the request was lost; send the request again.", 1.0))
        finally:
            if stream is not None and not ticket.succeeded:
                stream.cancel()
            with self._changed:
                count = self._open.pop(ticket)
                if ticket.succeeded and ticket.started is not None:
                    self._count_pace((time.monotonic() - ticket.started) / count)
                self._changed.notify_all()

    async def _pass_on(self, ticket: Ticket, stream: Any) -> None:
        async for item in stream:
            if isinstance(item, UniLIPError):
                ticket._end(item)
            elif isinstance(item, Result):
                ticket._end(dataclasses.replace(item, seconds=time.monotonic() - ticket.submitted))
            elif item.kind == "start":
                ticket._start()
            else:
                ticket._emit(item)
        if not ticket.done:
            raise RuntimeError("the stream ended without a result")

    def close(self, timeout: float = 0.0) -> None:
        from ray import serve

        self.drain(timeout)
        serve.delete(APP)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
