"""Data sources by path, and weighted mixtures of them. In: places, as below. Out: a `Source` of samples for each.

FOLDER                      pictures with texts beside them, or *.tar shards
shards/{0000..0099}.tar     shards by a brace or * pattern, local or https://, s3://, hf://datasets/...
samples.jsonl, list.json    a list of samples
hf:OWNER/NAME?split=train   a Hugging Face dataset, streamed
A:2,B:1                     a mixture; a number after a colon is a weight (without one: 1)
"""

import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

from unilip.data.folders import Folder, Lines
from unilip.data.records import Source, is_litter
from unilip.data.shards import Shards, is_remote
from unilip.errors import DataError

WEIGHT = re.compile(r"(.+):(\d+(?:\.\d+)?)")


class Weighted(NamedTuple):
    """A place with its weight in a mixture."""

    location: str
    weight: float = 1.0


def parse_mixture(text: str) -> list[Weighted]:
    """Split "A:2,B" into places with weights; those in names that exist stay. Raises DataError: none is named."""
    parts = re.split(r",(?![^{]*\})", text)
    found = []
    while parts:
        for count in range(len(parts), 0, -1):  # the longest name that exists, else one part
            name = ",".join(parts[:count]).strip()
            match = WEIGHT.fullmatch(name)
            if count == 1 or _exists(name) or (match and _exists(match[1])):
                break
        parts = parts[count:]
        if name:
            found.append(Weighted(match[1], float(match[2])) if match and not _exists(name) else Weighted(name))
    if not any(place.weight for place in found):
        none = "gives every place the weight 0" if found else "names no place"
        raise DataError(f"data.path {none}; give a folder, shards, a .jsonl file or hf:NAME.")
    return found


def local_sources(text: str) -> list[Source] | None:
    """Open the places of a mixture; None where one is remote, not there, or art. Raises DataError: of no known kind."""
    names = [place.location for place in parse_mixture(text) if place.weight]
    art = (file for name in names for file in Path(name).expanduser().glob("atlas-*.npz"))
    if not all(_exists(name) for name in names) or any(art):
        return None
    return [open_source(name) for name in names]


def _exists(name: str) -> bool:
    """Whether there is a file of this name; no error where it is one that no file can have."""
    return os.path.exists(os.path.expanduser(name))


def open_source(location: str, keep_gb: float = 50.0) -> Source:
    """Open one place. Raises DataError: there is nothing there, or nothing of a known kind."""
    if is_remote(location):
        return Shards(expand(location), location, keep_gb)
    if location.startswith("hf:"):
        from unilip.data.hub import HubStream

        return HubStream(location, keep_gb)
    folder = Path(location).expanduser()
    if _exists(location) and folder.is_dir():
        shards = sorted(str(path) for path in folder.glob("*.tar") if not is_litter(path.name))
        return Shards(shards, location, keep_gb) if shards else Folder(folder)
    if location.lower().endswith((".jsonl", ".ndjson", ".json")):
        return Lines(folder)
    return Shards(expand(location), location, keep_gb) if ".tar" in location else Folder(folder)


def expand(pattern: str) -> list[str]:
    """Write out the braces of a pattern, and for local paths its * and ?. Raises DataError: no local file fits."""
    import braceexpand

    if not is_remote(pattern) and _exists(pattern):  # whatever signs are in its name
        return [str(Path(pattern).expanduser())]
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:  # unbalanced
        raise DataError(f"{pattern} has a brace that is not closed.") from error
    if is_remote(pattern):
        return names
    found: list[str] = []
    for name in names:
        name = str(Path(name).expanduser())
        found += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    if not found or not any(Path(name).exists() for name in found):
        raise DataError(f"There is no shard {pattern}; check the path.")
    return found
