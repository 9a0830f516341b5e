"""Things to know about the concepts, in words only: never paired with a picture, so drawing from them is a test."""

from dataclasses import dataclass
from functools import cache

from unilip.emoji.captions import WORDS
from unilip.emoji.concepts import concept
from unilip.emoji.world import World
from unilip.files import read_table, stable_hash

# concept: what kind of thing, then what is true of it and of no other concept here, as in "the KIND that CLUE"
CLUES: dict[str, tuple[str, tuple[str, ...]]] = {
    name: (kind, tuple(clues)) for name, (kind, *clues) in read_table("unilip.emoji", "clues.json").items()
}


@dataclass(frozen=True)
class Fact:
    """A question without a picture, its answer, and the concept that it is about."""

    question: str
    answer: str
    concept: str


@dataclass(frozen=True)
class Riddle:
    """A caption that means a concept without naming it; MET tells whether training may draw it."""

    caption: str
    concept: str
    met: bool


def knowledge(world: World, split: str = "train") -> tuple[Fact, ...]:
    """Return the facts about WORLD's concepts; of every clue, validation keeps one wording that training lacks."""
    found = []
    for name in filter(CLUES.__contains__, world.concepts):
        kind, clues = CLUES[name]
        article, who = "an" if kind[0] in "aeiou" else "a", "Who" if kind == "person" else f"What {kind}"
        for clue in clues:
            asked = [form.format(kind=kind, clue=clue, who=who, article=article) for form in WORDS["asking"]]
            kept_back = asked.pop(stable_hash("wording", name, clue) % len(asked))
            asked = [kept_back] if split == "val" else asked
            found += [Fact(question, concept(name).phrase, name) for question in asked]
    return tuple(found)


@cache
def _riddles(name: str) -> tuple[Riddle, ...]:
    kind, clues = CLUES.get(name, ("", ()))
    met = [stable_hash("riddle met", name, clue) % 3 > 0 for clue in clues]
    return tuple(Riddle(f"the {kind} that {clue}", name, known) for clue, known in zip(clues, met, strict=True))


def riddles(world: World) -> tuple[Riddle, ...]:
    """Return riddle captions for WORLD's concepts: to be drawn without the name being said; a third is never met."""
    return tuple(riddle for name in world.concepts for riddle in _riddles(name))


def met_riddles(world: World, concept: str) -> tuple[str, ...]:
    """Return the captions that mean CONCEPT without naming it and that training may draw."""
    return tuple(riddle.caption for riddle in _riddles(concept) if riddle.met and concept in world.concepts)
