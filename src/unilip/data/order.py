"""Shuffled sampling order with random access: pure functions from a sample's number to its place, so a run can resume.

An epoch visits every sample once. Shards are shuffled, then the samples of a few shards together (a window), so a
stream reads few shards at a time. Lanes are disjoint sets of shards with streams of their own.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from unilip.errors import DataError
from unilip.files import stable_hash

BLOCK = 10_000  # slots in which a mixture keeps its weights exactly


@lru_cache(maxsize=64)
def permutation(count: int, *parts: object) -> np.ndarray:
    """Return a permutation of `count` numbers that depends on PARTS alone; do not write to it."""
    return np.random.default_rng(stable_hash(*parts)).permutation(count)


class Order:
    """Places of the samples of one stream, by its shards' counts. Raises DataError: fewer filled shards than lanes."""

    def __init__(self, counts: Sequence[int], seed: int, name: str, window: int = 4, lanes: int = 1) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.seed, self.name, self.window = seed, name, max(1, window)  # so many shards are mixed at once
        filled = np.flatnonzero(self.counts)
        if len(filled) < lanes:
            raise DataError(
                f"{name} has {len(filled)} shard{'' if len(filled) == 1 else 's'} with samples for {lanes} "
                "lanes; set data.lanes to at most that, or cut the data into more shards."
            )
        mixed = filled[permutation(len(filled), "lanes", seed, name)] if lanes > 1 else filled
        self.lanes = [np.sort(mixed[lane::lanes]) for lane in range(lanes)]

    def total(self, lane: int = 0) -> int:
        return int(self.counts[self.lanes[lane]].sum())

    def place(self, number: int, lane: int = 0) -> tuple[int, int]:
        """Return shard and place of the sample that comes at `number` (from 0, over all epochs) in a lane."""
        epoch, shards, first, at = self._window(number, lane)
        members = shards[first : first + self.window]
        ends = np.cumsum(self.counts[members])
        at = int(permutation(int(ends[-1]), "samples", self.seed, self.name, lane, epoch, first)[at])
        which = int(np.searchsorted(ends, at, side="right"))
        return int(members[which]), at - int(ends[which - 1] if which else 0)

    def ahead(self, number: int, lane: int = 0) -> list[int]:
        """Return the shards of the window after the one that sample `number` is in: what to fetch meanwhile."""
        epoch, shards, first, _ = self._window(number, lane)
        first += self.window
        if first >= len(shards):
            shards, first = self._shards(lane, epoch + 1), 0
        return [int(shard) for shard in shards[first : first + self.window]]

    def _window(self, number: int, lane: int) -> tuple[int, np.ndarray, int, int]:
        """Epoch of a sample, shards in its order, which of them begins the window, and the sample's place in that."""
        epoch, at = divmod(number, self.total(lane))
        shards = self._shards(lane, epoch)
        ends = np.cumsum(self.counts[shards])
        which = int(np.searchsorted(ends, at, side="right"))
        first = which - which % self.window
        return epoch, shards, first, at - int(ends[first - 1] if first else 0)

    def _shards(self, lane: int, epoch: int) -> np.ndarray:
        own = self.lanes[lane]
        return own[permutation(len(own), "shards", self.seed, self.name, lane, epoch)]


class Mixture:
    """Draws from several streams by weight, exact over every 10,000. Raises DataError: weights that cannot be kept."""

    def __init__(self, weights: Sequence[float], seed: int, name: str) -> None:
        shares = np.asarray(weights, dtype=float)
        if not len(shares) or not np.isfinite(shares).all() or (shares < 0).any() or not shares.sum():
            raise DataError(f"The weights of {name} are {list(weights)}; give numbers of at least 0, not only 0.")
        exact = shares / shares.sum() * BLOCK
        quota = np.floor(exact).astype(np.int64)
        missing = BLOCK - int(quota.sum())
        quota[np.argsort(quota - exact, kind="stable")[:missing]] += 1
        if (quota[shares > 0] == 0).any():
            raise DataError(f"A weight of {name} ({list(weights)}) is below 1/{BLOCK} of the sum; leave it out.")
        self.seed, self.name, self.quota = seed, name, quota
        self._slots = np.repeat(np.arange(len(quota)), quota)
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def pick(self, number: int) -> tuple[int, int]:
        """Return which stream the draw of that number takes, and how many draws it had before."""
        if len(self.quota) == 1:
            return 0, number
        block, at = divmod(number, BLOCK)
        if self._block is None or self._block[0] != block:
            streams = self._slots[permutation(BLOCK, "mixture", self.seed, self.name, block)]
            before = np.empty(BLOCK, dtype=np.int64)
            before[np.argsort(streams, kind="stable")] = np.concatenate([np.arange(count) for count in self.quota])
            self._block = block, streams, before
        _, streams, before = self._block
        stream = int(streams[at])
        return stream, block * int(self.quota[stream]) + int(before[at])
