"""From an address to a running server: check who may reach it, take the port, serve, and end in good order."""

import asyncio
import dataclasses
import ipaddress
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from unilip.errors import UniLIPError
from unilip.serve.guard import Rules, network

MIN_KEY = 16
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 1000
MAX_OF_ADDRESS = 250
HEAD_SECONDS = 10.0  # for the head of a request, from the opening of the connection or its first byte on a kept one
KEPT_SECONDS = 75  # for which a connection without requests is kept: clients and proxies take it for at most 60
STUCK_SECONDS = 30.0  # for which a client may read less than SLOWEST bytes a second of its answer
SLOWEST = 2048
GRACE_SECONDS = 0.5  # at the end, in which what was on its way still gets its 503; again while there is more of it
MOST_GRACE_SECONDS = 5.0
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_access(host: str, rules: Rules) -> Rules:
    """Return the rules for an address. Raises UniLIPError: it can be reached without a key that is hard to guess."""
    if not is_local(host):
        if not rules.api_keys:
            raise UniLIPError(
                f"--host {host} can be reached from other machines; give an --api-key of at least {MIN_KEY} "
                "characters, or set UNILIP_API_KEY."
            )
        if min(map(len, rules.api_keys)) < MIN_KEY:
            raise UniLIPError(f"An API key for --host {host} needs at least {MIN_KEY} characters; make a longer one.")
    shown = f"[{host.strip('[]')}]" if ":" in host else host
    hosts = rules.hosts if shown in rules.hosts else (*rules.hosts, shown)
    return dataclasses.replace(rules, hosts=hosts)


def listen(host: str, port: int) -> socket.socket:
    """Take the port (0: a free one) before any model is loaded. Raises UniLIPError: taken, or no address of ours."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        return socket.create_server(address, family=family, dualstack_ipv6=dual)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]  # the address is told here in our words
        raise UniLIPError(f"Cannot listen on {host}, port {port} ({reason}); give another --host or --port.") from error


class Connection(H11Protocol):
    """uvicorn's connection, with limits for peers that send nothing, read nothing, or come in crowds."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection; where there are too many, the one that has been idle for longest has to go."""
        super().connection_made(transport)
        self.since = self.moved = time.monotonic()
        self.unsent = 0
        open_ones = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        own = [one for one in open_ones if network(one.client) == network(self.client)]
        if len(own) <= MAX_OF_ADDRESS and len(open_ones) <= MAX_CONNECTIONS:
            return
        crowd = own if len(own) > MAX_OF_ADDRESS else open_ones
        oldest = min((one for one in crowd if one.idle), key=lambda one: one.since)
        if oldest is self:  # all others are at work
            transport.write(BUSY)
            transport.close()
        else:
            oldest.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, and all answers were read."""
        return (self.cycle is None or self.cycle.response_complete) and not self.transport.get_write_buffer_size()

    def on_response_complete(self) -> None:
        self.since = time.monotonic()
        super().on_response_complete()

    def data_received(self, data: bytes) -> None:
        """Count from the first byte of a next request."""
        if self.timeout_keep_alive_task is not None:
            self.since = time.monotonic()
        super().data_received(data)

    def check(self, now: float) -> None:
        """Once a second: end a connection whose peer does not send its request, or does not read its answer."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent <= self.unsent - SLOWEST:
            self.moved = now
        self.unsent = unsent
        waiting = self.idle and self.timeout_keep_alive_task is None  # for the rest of a head; uvicorn ends kept ones
        if now - self.moved > STUCK_SECONDS or (waiting and now - self.since > HEAD_SECONDS):
            self.transport.abort()


class _Server(uvicorn.Server):
    """A server that tells the engine at the first signal that nothing new is taken, and lets it finish its work."""

    def __init__(self, config: uvicorn.Config, engine: Any, drain_seconds: float) -> None:
        super().__init__(config)
        self.engine, self.drain_seconds = engine, drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second Ctrl+C ends at once. The signal is not raised again: this was its purpose."""
        self.engine.stop_accepting()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection):
                    connection.check(now)
        return await super().on_tick(counter)

    def unread(self, sockets: Sequence[socket.socket]) -> bool:
        """Whether there are connections that were not taken yet, or requests that were not read."""
        poll = select.poll()
        opened = [one for one in self.server_state.connections if isinstance(one, Connection) and one.idle]
        for found in [*sockets, *(one.transport.get_extra_info("socket") for one in opened)]:
            if found is not None and found.fileno() >= 0:
                poll.register(found.fileno(), select.POLLIN)
        return bool(poll.poll(0))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: what the engine cannot finish in time is answered by 503, while there are still connections for it."""
        draining = asyncio.create_task(asyncio.to_thread(self.engine.drain, self.drain_seconds))
        end = time.monotonic() + MOST_GRACE_SECONDS
        while not self.force_exit:
            await asyncio.sleep(GRACE_SECONDS)
            if time.monotonic() > end or not self.unread(sockets or []):
                break
        await super().shutdown(sockets)
        if self.force_exit:
            await asyncio.to_thread(self.engine.drain, 0)
            await self.lifespan.shutdown()  # which uvicorn leaves out; a training would go on with nobody to stop it
        await draining


def make_server(app: FastAPI, drain_seconds: float) -> uvicorn.Server:
    """Configure the HTTP server for strangers: bounded headers and connections, no trust in what a proxy may claim."""
    config = uvicorn.Config(
        app,
        http=Connection,  # h11, which bounds the size of headers
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        timeout_keep_alive=KEPT_SECONDS,
        timeout_graceful_shutdown=round(drain_seconds) + 2,
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
    )
    return _Server(config, app.state.engine, drain_seconds)


def run(app: FastAPI, taken: socket.socket, drain_seconds: float, on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or Ctrl+C. Requests that were accepted are finished, for at most `drain_seconds`."""
    server = make_server(app, drain_seconds)
    on_start()
    server.run(sockets=[taken])
