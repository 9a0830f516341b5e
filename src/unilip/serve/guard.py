"""What stands before the application: it lets requests pass whose host, origin, key, rate and size are in order.

Their bodies are whole in memory; others are answered here. Also the last net for errors, and the count of all answers.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cachetools import LRUCache
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unilip.serve.jobs import Cancelled
from unilip.serve.log import CLIENT, REQUEST, access
from unilip.serve.metrics import Metrics
from unilip.serve.problems import Trouble

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
FILES = "/v1/images/files/"
PAGE = "/page/"
OPEN = ("/", "/health", "/ready", "/openapi.json", "/docs", "/redoc")  # need no key; nor does what is below
OPEN_BELOW = (PAGE, FILES)
MAX_TEXT = 64 * 1024
TEXTS = ("/v1/images/generations", "/v1/intent")  # bodies of at most that
BODILESS = ("GET", "HEAD", "OPTIONS")
BODY_SECONDS = 60.0  # for a whole body
PIECE_SECONDS = 10.0  # between two pieces of one
MAX_CALLERS = 10_000
STARTED = "unilip.started"  # in a request's scope: when it came, on the monotonic clock
WRONG_KEYS = 60  # a minute from one address


@dataclass(frozen=True)
class Rules:
    """Who may ask what of the server; "*" among `hosts` or `origins` allows all."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)  # any of them is good; without keys nobody is asked
    max_body: int = 32 * 2**20  # bytes of one request; eight times as much for all requests that are being read
    rate_limit: int = 600  # a minute for a key (without keys, an address), saved up to a minute's worth; 0: none
    hosts: tuple[str, ...] = LOCAL_HOSTS  # by which a server without keys may be addressed
    origins: tuple[str, ...] = ()  # other ones ("https://chat.example") whose pages may ask from a browser


class Guard:
    """ASGI middleware that holds `rules`, in front of the API and of the page."""

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self.app, self.rules, self.metrics = app, rules, metrics
        self._keys = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in rules.api_keys]
        # requests that a caller had left, and when
        self._left = LRUCache[str, tuple[float, float]](MAX_CALLERS)
        self._guesses = min(WRONG_KEYS, rules.rate_limit or WRONG_KEYS)
        self._reading = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, number = time.monotonic(), 0, secrets.token_hex(8)
        REQUEST.set(number)
        scope[STARTED] = started
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        added = [(b"x-request-id", number.encode()), (b"x-content-type-options", b"nosniff"), *self._shared(headers)]

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        body = b""
        try:
            self._check_origin(scope, headers)
            # a browser's question whether a page may send its request
            if scope["method"] == "OPTIONS" and {"origin", "access-control-request-method"} <= headers.keys():
                await Response(status_code=204, headers=PREFLIGHT)(scope, receive, marked)
                return
            if scope["path"] not in OPEN and not scope["path"].startswith(OPEN_BELOW):
                self._check_caller(scope, headers)
                body = await self._read(scope, headers, receive)
            if not body and has_body:
                added.append(CLOSE)
            await self.app(scope, replay(body, receive), marked)
        except Trouble as found:
            added.append(CLOSE)
            await found.response()(scope, receive, marked)
        except ClientDisconnect:
            status = status or Cancelled.status
        except asyncio.CancelledError:  # the server ends, and cannot wait any longer
            if not status:
                added.append(CLOSE)
                await ENDED.response()(scope, receive, marked)
        except Exception:
            logger.exception("a request failed")
            if status:
                raise
            text = f"Something went wrong in the server; its log says more under {number}."
            await Trouble(500, text, "internal_error").response()(scope, receive, marked)
        finally:
            self._reading -= len(body)
            seconds, status = time.monotonic() - started, status or Cancelled.status
            # the route's pattern, never the path itself: a stranger must not make new metrics
            self.metrics.answer(str(getattr(scope.get("route"), "path", "other")), status, seconds)
            if access.isEnabledFor(logging.INFO):
                path = FILES + "..." if scope["path"].startswith(FILES) else scope["path"]  # who has a name can read it
                told = ((scope.get("client") or ("unknown",))[0], scope["method"], path, status, seconds, len(body))
                access.info("%s %s %s %d %.3fs %d bytes read", *told)

    def _check_caller(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Raise where the key is wrong, or has asked too often."""
        caller = f"address {network(scope.get('client'))}"
        CLIENT.set(caller)
        if self._keys:
            given = headers.get("authorization", "")
            key = given[7:].strip() if given[:7].lower() == "bearer " else headers.get("api-key", "")
            digest = hashlib.sha256(key.encode("latin-1")).digest()  # the very bytes that were sent
            good = [hmac.compare_digest(digest, known) for known in self._keys]  # all of them, whichever fits
            if not any(good):
                self._limit(f"wrong {caller}", self._guesses)
                raise Trouble(
                    401, "The API key is missing or wrong; send it as Authorization: Bearer KEY.", "invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
            CLIENT.set(f"{digest.hex()} {caller}")
            caller = digest.hex()
        self._limit(caller, self.rules.rate_limit)

    def _check_origin(self, scope: Scope, headers: Mapping[str, str]) -> None:
        """Refuse what a web page elsewhere may send to this machine behind the back of its reader."""
        host = headers.get("host", "").lower()
        name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if not self._keys and not {"*", name} & set(self.rules.hosts):
            text = f"This server answers only as {', '.join(self.rules.hosts)}; give it a key to allow other names."
            raise Trouble(403, text, "forbidden_host")
        origin = headers.get("origin")
        if origin is None:  # a picture or a script of a page, or nothing of a page at all
            foreign = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
            foreign = foreign and headers.get("sec-fetch-mode") != "navigate" and not scope["path"].startswith(FILES)
        else:
            own = host != "" and origin.lower().partition("://")[2] == host
            foreign = not own and not {"*", origin.lower()} & set(self.rules.origins)
        if foreign:
            text = "Requests from pages of other origins are refused; allow one with --allow-origin."
            raise Trouble(403, text, "forbidden_origin")

    def _shared(self, headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
        """The headers that let an allowed page of another origin read the answer."""
        origin = headers.get("origin", "")
        if not {"*", origin.lower()} & set(self.rules.origins):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"Retry-After, X-Request-Id"),
            (b"vary", b"Origin"),
        ]

    def _limit(self, caller: str, most: int) -> None:
        if not most:
            return
        now = time.monotonic()
        left, then = self._left.get(caller, (float(most), now))
        left = min(most, left + (now - then) * most / 60)
        self._left[caller] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            wait = (1 - left) * 60 / most
            text = f"More than {most} requests a minute; wait {max(1, round(wait))} s."
            raise Trouble(429, text, "rate_limit_exceeded", retry_after=wait)

    async def _read(self, scope: Scope, headers: Mapping[str, str], receive: Receive) -> bytes:
        """Return the whole body, which counts in `_reading`. Raises Trouble; ClientDisconnect: the client left."""
        if scope["method"] in BODILESS:
            return b""
        most = min(MAX_TEXT, self.rules.max_body) if scope["path"] in TEXTS else self.rules.max_body
        text = f"The body is larger than {most} bytes; send less, or smaller pictures."
        too_large = Trouble(413, text, "body_too_large")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:18]) > most:
            raise too_large
        data, end, more = bytearray(), time.monotonic() + BODY_SECONDS, True
        try:
            while more:
                message = await asyncio.wait_for(receive(), max(0.01, min(PIECE_SECONDS, end - time.monotonic())))
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                piece, more = message.get("body", b""), message.get("more_body", False)
                data += piece
                self._reading += len(piece)
                if len(data) > most:
                    raise too_large
                if self._reading > 8 * self.rules.max_body:
                    raise Trouble(429, "Too much is being sent at once; try again.", "busy", retry_after=2)
            return bytes(data)
        except BaseException as error:
            self._reading -= len(data)
            if not isinstance(error, asyncio.TimeoutError):
                raise
            text = f"The body stopped for {PIECE_SECONDS:.0f} s, or took more than {BODY_SECONDS:.0f} s in all."
            raise Trouble(408, text, "body_too_slow") from None


CLOSE = (b"connection", b"close")  # else the body of what was refused would be read to its end
ENDED = Trouble(503, "The server shut down before the request was done; send it again.", "shutting_down", retry_after=5)
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Max-Age": "600",
}


def network(client: tuple[str, int] | None) -> str:
    """The address of a client; of IPv6 the first half, for the other one is the client's to choose."""
    text = (client or ("unknown", 0))[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return text
    if address.version == 4 or address.ipv4_mapped:
        return str(getattr(address, "ipv4_mapped", None) or address)
    return f"{ipaddress.IPv6Address(int(address) >> 64 << 64)}/64"


def replay(data: bytes, receive: Receive) -> Receive:
    """Give the body that was read already, then what really comes (the end of the connection)."""
    held: list[Message] = [{"type": "http.request", "body": data, "more_body": False}]

    async def again() -> Message:
        return held.pop() if held else await receive()

    return again
