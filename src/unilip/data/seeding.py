"""Stable hashing: the same words give the same generator and the same coin on every machine and in every run."""

from __future__ import annotations

import hashlib
import random


def stable_hash(*parts: object) -> int:
    """Return a 64-bit integer that depends only on the text of PARTS."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def stable_fraction(*parts: object) -> float:
    """Return a number in [0, 1) that depends only on the text of PARTS."""
    return stable_hash(*parts) / 2.0**64


def generator(*parts: object) -> random.Random:
    """Return a fresh generator seeded from PARTS, such as (seed, split, index)."""
    return random.Random(stable_hash(*parts))
