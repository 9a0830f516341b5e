"""Pictures that were asked for as a URL, in memory by a name that nobody can guess, for an hour at most."""

import secrets
import threading
import time
from collections import OrderedDict


class Store:
    """At most `max_bytes` of pictures, each for at most `seconds`."""

    def __init__(self, max_bytes: int = 128 * 2**20, seconds: float = 3600.0) -> None:
        self.max_bytes, self.seconds = max_bytes, seconds
        self._kept: OrderedDict[str, tuple[bytes, str, float]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def put(self, data: bytes, media: str, name: str = "") -> str:
        """Keep a picture; return its name, one that nobody can guess unless it was given."""
        name = name or secrets.token_urlsafe(24)
        with self._lock:
            self._kept[name] = (data, media, time.monotonic() + self.seconds)
            self._bytes += len(data)
            now = time.monotonic()
            while self._kept and (self._bytes > self.max_bytes or next(iter(self._kept.values()))[2] < now):
                _, (old, _, _) = self._kept.popitem(last=False)
                self._bytes -= len(old)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Return a picture and its media type, or None."""
        with self._lock:
            found = self._kept.get(name)
        if found is None or found[2] < time.monotonic():
            return None
        return found[0], found[1]
