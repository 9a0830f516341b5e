"""The concepts of the emoji world: 384 drawings that exist in all three styles, and four shapes that we draw.

A drawn shape exists only in a named colour, so the art's own coloured hearts, circles and squares step aside for it.
"""

from dataclasses import dataclass
from functools import cache

from unilip.errors import DataError
from unilip.files import read_table

SHAPES = ("heart", "circle", "square", "triangle")
TONES = {"light": "1f3fb", "medium light": "1f3fc", "medium": "1f3fd", "medium dark": "1f3fe", "dark": "1f3ff"}


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
    found = [Concept(**record) for record in read_table("unilip.emoji", "concepts.json")]
    found += [Concept(shape, f"a {shape}", f"{shape}s", "drawn shapes") for shape in SHAPES]
    return {each.name: each for each in found}


@cache
def measured() -> dict[str, dict[str, dict[str, list[str]]]]:
    """Return, by style and concept, "clashes": plain backgrounds that hide it; "natural": its colours unpainted."""
    return dict(read_table("unilip.emoji", "measured.json"))


def concept(name: str) -> Concept:
    """Return the concept called NAME; raises DataError for an unknown name."""
    known = concepts()
    if name not in known:
        raise DataError(f"unknown concept {name!r}; allowed are the {len(known)} of unilip.emoji.concepts.concepts()")
    return known[name]
