"""Helpers of the tests."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from unilip.data.shards import writing_shard


def failures(check: Callable[[Any], object], cases: Iterable[Any]) -> list[str]:
    """What fails when a check runs over all cases: one test with a list, in place of a test for each."""
    found = []
    for case in cases:
        try:
            check(case)
        except Exception as error:
            found.append(f"{case}: {type(error).__name__} {error}")
    return found


class ShardWriter:
    """Shards NAME-000000.tar, ... of at most `count` samples each, written when it is closed."""

    def __init__(self, folder: Path, name: str, count: int = 10_000) -> None:
        self.folder, self.name, self.count = folder, name, count
        self.samples: list[tuple[str, dict[str, bytes]]] = []

    def write(self, key: str, members: dict[str, bytes]) -> None:
        self.samples.append((key, members))

    def close(self) -> None:
        for number, start in enumerate(range(0, len(self.samples), self.count)):
            with writing_shard(self.folder / f"{self.name}-{number:06d}.tar") as write:
                for key, members in self.samples[start : start + self.count]:
                    write(key, members)
