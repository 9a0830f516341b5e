"""The concepts of the emoji world: 384 drawings that exist in all three styles, and four shapes that we draw.

In: `concepts.json` beside this file (names checked by eye). Out: `Concept` records by name.
A drawn shape exists only in a named colour, so the art's own coloured hearts, circles and squares step aside for it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from unilip.data.errors import DataError

SHAPES = ("heart", "circle", "square", "triangle")
TONES = {
    "light": "1f3fb",
    "medium light": "1f3fc",
    "medium": "1f3fd",
    "medium dark": "1f3fe",
    "dark": "1f3ff",
}


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn: its name, grammar, group, and where the art keeps it (codepoint)."""

    name: str
    phrase: str
    plural: str
    group: str
    codepoint: str = ""
    toned: bool = False

    @property
    def countable(self) -> bool:
        """Whether "two PLURAL" reads well (not so for broccoli or thumbs up)."""
        return self.phrase.startswith(("a ", "an "))

    def tone_codepoint(self, tone: str) -> str:
        """Return the codepoint sequence of this concept in skin tone TONE."""
        first, *rest = self.codepoint.split("-")
        return "-".join([first, TONES[tone], *(part for part in rest if part != "fe0f")])


@cache
def concepts() -> dict[str, Concept]:
    """Return all concepts by name, the four drawn shapes last."""
    records = json.loads(files("unilip.emoji").joinpath("concepts.json").read_text(encoding="utf-8"))
    found = {record["name"]: Concept(**record) for record in records}
    for shape in SHAPES:
        found[shape] = Concept(name=shape, phrase=f"a {shape}", plural=f"{shape}s", group="drawn shapes")
    return found


@cache
def measured() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Return what was measured of the drawings: ["clashes" or "natural"][style][concept] -> names.

    "clashes" are the plain backgrounds on which a drawing would hardly show, "natural" is the palette colour that it
    already has.
    """
    found: dict[str, Any] = json.loads(files("unilip.emoji").joinpath("measured.json").read_text(encoding="utf-8"))
    return found


def concept(name: str) -> Concept:
    """Return the concept called NAME; raises DataError for an unknown name."""
    try:
        return concepts()[name]
    except KeyError:
        raise DataError(
            f"unknown concept {name!r}; allowed are the {len(concepts())} names of unilip.emoji.concepts.concepts()"
        ) from None
