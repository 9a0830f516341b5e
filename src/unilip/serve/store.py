"""Pictures that were asked for as a URL, in memory by a name that nobody can guess, for an hour at most."""

import contextlib
import secrets
import threading

from cachetools import TTLCache


class Store:
    """At most `max_bytes` of pictures, each for at most `seconds`; those that nobody asks for go first."""

    def __init__(self, max_bytes: int = 128 * 2**20, seconds: float = 3600.0) -> None:
        self._kept = TTLCache[str, tuple[bytes, str]](max_bytes, seconds, getsizeof=lambda one: len(one[0]))
        self._lock = threading.Lock()

    def put(self, data: bytes, media: str, name: str = "") -> str:
        """Keep a picture; return its name, one that nobody can guess unless it was given."""
        name = name or secrets.token_urlsafe(24)
        with self._lock, contextlib.suppress(ValueError):  # larger than all of the store
            self._kept[name] = (data, media)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """Return a picture and its media type, or None."""
        with self._lock:
            return self._kept.get(name)
