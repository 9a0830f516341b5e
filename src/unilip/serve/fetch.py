"""Pictures from addresses on the network, for servers that were told to allow it; made so that it cannot reach inside.

The name is resolved once, every address it has must be a public one, and the connection goes to the very address that
was checked; each redirect is checked anew. Standard ports only.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from urllib.parse import SplitResult, urljoin, urlsplit

from unilip.errors import ImageError

MAX_REDIRECTS = 3
_RESOLVERS = ThreadPoolExecutor(8, "unilip-resolver")  # the system's resolver has no limit of its own that we could set
PORTS = {"http": 80, "https": 443}
_ORDINARY = ipaddress.ip_network("2000::/3")  # without the IPv4 addresses that are mapped, or behind NAT64

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, in whatever way it is written."""
    if isinstance(address, ipaddress.IPv6Address) and (address not in _ORDINARY or address.sixtofour or address.teredo):
        return False  # or an IPv4 address in disguise; the plain one may be given instead
    return address.is_global and not (address.is_multicast or address.is_reserved)


def resolve(host: str, port: int) -> list[str]:
    """Ask the name server once: the addresses of a host."""
    return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})


def _connect(connection: http.client.HTTPConnection, address: str, secure: bool, over: threading.Event) -> None:
    """Connect to an address that was chosen, while host name and certificate are those of the URL."""
    connection.auto_open = 0  # never by name, which may mean another address by now
    connection.sock = socket.create_connection((address, connection.port), connection.timeout)
    if secure:  # the handshake by itself, for it must be possible to hang up meanwhile
        wrap = ssl.create_default_context().wrap_socket
        connection.sock = wrap(connection.sock, server_hostname=connection.host, do_handshake_on_connect=False)
    if over.is_set():
        raise TimeoutError
    if isinstance(connection.sock, ssl.SSLSocket):
        connection.sock.do_handshake()


def _hang_up(connection: http.client.HTTPConnection, over: threading.Event) -> None:
    """End what is under way in another thread."""
    over.set()
    with contextlib.suppress(OSError, AttributeError):  # it is closed, or not yet open
        connection.sock.shutdown(socket.SHUT_RDWR)


def _check(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ImageError("The image URL is malformed; give a plain http or https address.") from error
    if parts.scheme not in PORTS or not parts.hostname:
        raise ImageError("An image URL must begin with http:// or https:// and name a host; or send a data URL.")
    if parts.username is not None or parts.password is not None:
        raise ImageError("An image URL must not hold a user name or password; leave them out.")
    if port not in (None, PORTS[parts.scheme]):
        raise ImageError("An image URL may only use the standard port of http (80) or https (443).")
    if any(ord(c) <= 32 or ord(c) >= 127 for c in url):
        raise ImageError("An image URL must be plain ASCII without spaces; percent-encode the rest.")
    return parts


def fetch(
    url: str,
    max_bytes: int,
    *,
    seconds: float = 10.0,
    resolver: Callable[[str, int], list[str]] = resolve,
    allowed: Callable[[Address], bool] = is_public,
    ports: dict[str, int] | None = None,
) -> bytes:
    """Return what a URL answers, at most `max_bytes`, within `seconds`; tests set `resolver`, `allowed` and `ports`.

    Raises ImageError: a forbidden or unreachable address, an answer other than 200, too large, or too slow.
    """
    end = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        parts = _check(url)
        host, port = parts.hostname or "", (ports or PORTS)[parts.scheme]
        try:
            addresses = _RESOLVERS.submit(resolver, host, port).result(max(0.1, end - time.monotonic()))
            public = bool(addresses) and all(allowed(ipaddress.ip_address(a.split("%")[0])) for a in addresses)
        except FutureTimeout as error:
            raise ImageError("The host of the image URL is not found in time; send it as a data URL.") from error
        except (OSError, ValueError) as error:
            raise ImageError(f"The host {host} of the image URL cannot be found; check it.") from error
        if not public:
            raise ImageError("The image URL leads to an address that is not public; such are not fetched.")
        left = max(0.1, end - time.monotonic())
        connection, over = http.client.HTTPConnection(host, port, timeout=left), threading.Event()
        timer = threading.Timer(left, _hang_up, (connection, over))  # the socket's own limit is of each piece
        timer.start()
        try:
            _connect(connection, addresses[0], parts.scheme == "https", over)
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"Accept": "image/*", "User-Agent": "unilip"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                url = urljoin(url, response.headers.get("Location", ""))
                continue
            if response.status != 200:
                raise ImageError(f"The image URL answered {response.status}; give one that answers 200.")
            data = response.read(max_bytes + 1)
            if len(data) > max_bytes:
                raise ImageError(f"The image URL answers more than {max_bytes} bytes; give a smaller picture.")
            if not over.is_set():
                return data
            raise ImageError("The image URL answers too slowly; send the picture as a data URL.")
        except (OSError, http.client.HTTPException) as error:
            raise ImageError("The image URL could not be read; check it, or send the picture as a data URL.") from error
        finally:
            timer.cancel()
            connection.close()
    raise ImageError(f"The image URL redirects more than {MAX_REDIRECTS} times; give the final one.")
