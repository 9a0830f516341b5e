"""What stands before the application: who may ask, how often, and how much.

In:  raw requests. Out: requests whose host, origin, key, rate and size are in order, with the whole body in memory; the
     others are answered here. Also the last net for errors, and the count of all answers.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unilip.serve.metrics import Metrics
from unilip.serve.problems import CLIENT_GONE, Trouble

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/health", "/ready", "/openapi.json", "/docs", "/redoc")
FILES = "/v1/images/files/"
BODY_SECONDS = 60.0
MAX_CALLERS = 10_000


@dataclass(frozen=True)
class Rules:
    """Who may ask what of the server.

    Args:
        api_keys: any of them is good; without keys nobody is asked, and only `hosts` are answered for.
        max_body: bytes of one request's body; eight times as much for all requests that are being read.
        rate_limit: requests a minute for a key (or an address, where there are no keys), saved up to a minute's worth;
            0 is no limit.
        hosts: names under which a server without keys may be addressed, so that no web page can reach it by a name of
            its own.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    max_body: int = 32 * 2**20
    rate_limit: int = 600
    hosts: tuple[str, ...] = LOCAL_HOSTS


class Bucket:
    """Tokens that come back over time."""

    def __init__(self, per_minute: int) -> None:
        self.capacity = float(per_minute)
        self.tokens, self.filled = self.capacity, time.monotonic()

    def take(self) -> float:
        """Take a token: return 0, or the seconds until there is one."""
        now = time.monotonic()
        self.tokens = min(self.capacity, self.tokens + (now - self.filled) * self.capacity / 60)
        self.filled = now
        if self.tokens >= 1:
            self.tokens -= 1
            return 0.0
        return (1 - self.tokens) * 60 / self.capacity


class Guard:
    """ASGI middleware that holds `rules`."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self._keys = [hashlib.sha256(key.encode()).digest() for key in rules.api_keys]
        self._buckets: OrderedDict[bytes, Bucket] = OrderedDict()
        self._reading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection's request."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        name = secrets.token_hex(8).encode()

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", name),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        body = 0
        try:
            found = self._check(scope)
            if found is None:
                data = await self._read(scope, receive)
                if data is None:
                    status = CLIENT_GONE
                    return
                if isinstance(data, bytes):
                    body = len(data)
                    await self.app(scope, _replay(data, receive), marked)
                    return
                found = data
            await found.response()(scope, receive, marked)
        except Exception:
            logger.exception("request %s failed", name.decode())
            if status:
                raise
            text = f"Something went wrong in the server; its log says more under {name.decode()}."
            await Trouble(500, text, "internal_error").response()(scope, receive, marked)
        finally:
            self._reading -= body
            self.metrics.answer(_route(scope), status or CLIENT_GONE, time.perf_counter() - started)

    def _check(self, scope: Scope) -> Trouble | None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        client = (scope.get("client") or ("unknown", 0))[0]
        caller = f"address {client}".encode()
        if self._keys:
            if scope["path"] in OPEN_PATHS or scope["path"].startswith(FILES):
                return None
            given = headers.get("authorization", "")
            key = given[7:].strip() if given[:7].lower() == "bearer " else headers.get("api-key", "")
            digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
            good = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them, whichever fits
            if not any(good):
                return self._limit(caller) or Trouble(
                    401, "The API key is missing or wrong; send it as Authorization: Bearer KEY.", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            caller = digest
        else:
            found = self._from_a_web_page(headers)
            if found is not None:
                return found
            if scope["path"] in OPEN_PATHS:
                return None
        return self._limit(caller)

    def _from_a_web_page(self, headers: Mapping[str, str]) -> Trouble | None:
        """Refuse what a web page elsewhere may send to this machine behind the back of its reader."""
        host = headers.get("host", "")
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self.rules.hosts:
            return Trouble(403, "Without an API key this server answers only as localhost.", "forbidden_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return Trouble(403, "Requests from pages of other origins need an API key.", "forbidden_origin")
        return None

    def _limit(self, caller: bytes) -> Trouble | None:
        if not self.rules.rate_limit:
            return None
        bucket = self._buckets.pop(caller, None) or Bucket(self.rules.rate_limit)
        self._buckets[caller] = bucket
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        wait = bucket.take()
        if not wait:
            return None
        text = f"More than {self.rules.rate_limit} requests a minute; wait {max(1, round(wait))} s."
        return Trouble(429, text, "rate_limit_exceeded", retry_after=wait)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | Trouble | None:
        """Return the whole body, or what is wrong with it, or None for a client that left."""
        most = self.rules.max_body
        too_large = Trouble(413, f"The body is larger than {most} bytes; send smaller pictures.", "body_too_large")
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:18]) > most:
                return too_large
        data, end = bytearray(), time.monotonic() + BODY_SECONDS
        kept = False
        try:
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.01, end - time.monotonic()))
                except asyncio.TimeoutError:
                    return Trouble(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.", "body_too_slow")
                if message["type"] == "http.disconnect":
                    return None
                piece = message.get("body", b"")
                data += piece
                self._reading += len(piece)
                if len(data) > most:
                    return too_large
                if self._reading > 8 * most:
                    return Trouble(429, "Too much is being sent at once; try again.", "busy", retry_after=2)
                if not message.get("more_body", False):
                    kept = True
                    return bytes(data)
        finally:
            if not kept:
                self._reading -= len(data)


def _replay(data: bytes, receive: Receive) -> Receive:
    """Give the body that was read already, then what really comes (the end of the connection)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": data, "more_body": False}
        return await receive()

    return again


def _route(scope: Scope) -> str:
    """The route's pattern, never the path itself: a stranger must not make new metrics."""
    route = scope.get("route")
    return str(getattr(route, "path", "other"))
