"""Names of other people's tensors <-> ours: one table per kind of checkpoint, `tables.json`, read in both directions.

Everything is strict: a name is used, named as dropped with its reason, or an error. A row pairs a template of their
names with ours. `{i}` is a number, `{p}` weight or bias, `{rest}` anything; several names of ours share one tensor of
theirs, stacked along its first dimension (fused query, key, value).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from unilip.errors import CheckpointError
from unilip.files import read_table

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by name of a tensor
Rule = tuple[str, tuple[str, ...], str]  # templates of their name and of ours; none of ours: dropped, for a reason

QUERIES = "mllm.queries"
# 1x1 convolutions that are linear layers in our transformer: others store (O,I,1,1), we (O,I)
POINTWISE = re.compile(r"dit\.transformer\.transformer_blocks\.\d+\.ff\.conv_(inverted|point)\.weight")
EMBEDDING = "mllm.language_model.model.embed_tokens.weight"
HEAD = "mllm.language_model.lm_head.weight"


class Origin(NamedTuple):
    """Where one of our tensors comes from: part `part` of `parts` equal pieces (first dimension) of tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1


class Kind(NamedTuple):
    """A kind of checkpoint: what it is, its table, the parts that it holds and our tensors that it never has."""

    title: str
    rules: tuple[Rule, ...]
    parts: tuple[str, ...]
    absent: tuple[str, ...] = ()


def _rules(rows: Sequence[Any], prefix: str = "") -> Iterator[Rule]:
    """Yield the rules of rows: names, what is dropped and why, or a group of rows, where "@" is a prefix of theirs."""
    for row in rows:
        if isinstance(row, list):
            yield row[0].replace("@", prefix), tuple(row[1:]), ""
        elif "group" in row:
            yield from _rules(TABLE["groups"][row["group"]], row.get("prefix", ""))
        else:
            yield row["drop"].replace("@", prefix), (), row["reason"]


TABLE: dict[str, Any] = read_table("unilip.checkpoints", "tables.json")
KINDS: dict[str, Kind] = {
    name: Kind(kind["title"], tuple(_rules(kind["rules"])), tuple(kind["parts"]), tuple(kind.get("absent", ())))
    for name, kind in TABLE["kinds"].items()
}
UNDERSTOOD = "; ".join(kind.title for kind in KINDS.values())
_PLACEHOLDERS = {"i": r"\d+", "p": "weight|bias", "rest": ".+"}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    text = "".join(f"(?P<{s}>{_PLACEHOLDERS[s]})" if n % 2 else re.escape(s) for n, s in enumerate(pieces))
    return re.compile(text)


def map_names(kind: str, names: Iterable[str]) -> tuple[dict[str, Origin], dict[str, str]]:
    """Return where each of ours comes from, and why others are dropped. Raises CheckpointError: unknown, or twice."""
    rules = KINDS[kind].rules
    origins: dict[str, Origin] = {}
    dropped: dict[str, str] = {}
    unknown = []
    for name in names:
        found = next(((rule, m) for rule in rules if (m := _pattern(rule[0]).fullmatch(name))), None)
        if found is None:
            unknown.append(name)
            continue
        (_, templates, reason), match = found
        if not templates:
            dropped[name] = reason
        for part, template in enumerate(templates):
            ours = template.format(**match.groupdict())
            if ours in origins:
                raise CheckpointError(f"The checkpoint holds {ours} twice: as {origins[ours].name} and as {name}.")
            origins[ours] = Origin(name, part, len(templates))
    if unknown:
        what = several(unknown, "tensor")
        raise CheckpointError(f"{what} not known in a checkpoint of kind {kind!r} ({KINDS[kind].title}).")
    return origins, dropped


def unmap_names(kind: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return their names, each with ours stacked in it. Raises CheckpointError: ours without a place, or missing."""
    places = [(rule, part, _pattern(ours)) for rule in KINDS[kind].rules for part, ours in enumerate(rule[1])]
    found: dict[str, list[str | None]] = {}
    for name in names:
        place = next(((rule, part, m) for rule, part, ours in places if (m := ours.fullmatch(name))), None)
        if place is None:
            raise CheckpointError(f"{name} has no place in a checkpoint of kind {kind!r} ({KINDS[kind].title}).")
        (template, ours, _), part, match = place
        theirs = template.format(**match.groupdict())
        found.setdefault(theirs, [None] * len(ours))[part] = name
    for theirs, group in found.items():
        if None in group:
            there = listed([n for n in group if n])
            raise CheckpointError(f"{theirs} needs {len(group)} tensors, of which only {there} exist.")
    return {theirs: tuple(n for n in group if n is not None) for theirs, group in found.items()}


def check_shapes(found: Shapes, expected: Shapes, where: str, absent: Sequence[str] = ()) -> None:
    """Compare names and shapes in both directions (`absent` may be missing). Raises CheckpointError: they differ."""
    problems = {
        "missing": [name for name in expected if name not in found and name not in absent],
        "unexpected": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    }
    if said := [f"{several(names, 'tensor')} {problem}" for problem, names in problems.items() if names]:
        few = any(".time_embed_2." in name for names in problems.values() for name in names)
        hint = " Few-step weights and dit.few_steps of a config belong together; copy both files." if few else ""
        raise CheckpointError(f"{where} does not fit its config: {'; '.join(said)}.{hint}")


def listed(names: Sequence[str]) -> str:
    """Return the first few names, for an error."""
    return ", ".join(name[:120] for name in names[:4]) + (", ..." if len(names) > 4 else "")


def several(names: Sequence[str], noun: str) -> str:
    """Return "1 tensor (a) is" or "5 tensors (a, b, c, d, ...) are"."""
    one = len(names) == 1
    return f"{len(names)} {noun}{'' if one else 's'} ({listed(names)}) {'is' if one else 'are'}"
