"""From an address to a running server: check who may reach it, take the port, serve, and end in good order.

In:  an application and where to listen. Out: nothing; it returns when a signal ended it and accepted work was finished.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from unilip.errors import UniLIPError
from unilip.serve.guard import Rules

logger = logging.getLogger(__name__)

MIN_KEY = 16
MAX_HEADER_BYTES = 64 * 1024
MAX_CONNECTIONS = 1000


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_access(host: str, rules: Rules) -> Rules:
    """Return the rules for an address, with its own name among the hosts.

    Raises:
        UniLIPError: others can reach the address and there is no key, or one that can be guessed.
    """
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
    """Take the port, before any model is loaded; port 0 takes a free one.

    Raises:
        UniLIPError: it is taken, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind, protocol)
        try:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
        except OSError:
            taken.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UniLIPError(f"Cannot listen on {host}, port {port} ({reason}); give another --host or --port.") from error
    taken.set_inheritable(False)
    return taken


class _Server(uvicorn.Server):
    """A server that tells the engine at the first signal that nothing new is taken."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; a second Ctrl+C ends at once. The signal is not raised again: this was its purpose."""
        self.on_signal()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def make_server(app: FastAPI, drain_seconds: float) -> uvicorn.Server:
    """Configure the HTTP server for strangers: bounded headers and connections, no trust in what a proxy may claim."""
    engine = app.state.engine
    config = uvicorn.Config(
        app,
        http="h11",  # bounds the size of headers
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        ws="none",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
        proxy_headers=False,
        server_header=False,
        access_log=False,
        log_config=None,
    )
    return _Server(config, engine.stop_accepting)


def run(app: FastAPI, taken: socket.socket, drain_seconds: float, on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or Ctrl+C. Requests that were accepted are finished, for at most `drain_seconds`."""
    server = make_server(app, drain_seconds)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    on_start()
    server.run(sockets=[taken])
