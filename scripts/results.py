"""Write docs/results.md, the page about the weights that ship, from folders of `unilip eval emoji`.

    python scripts/results.py FOLDER ... --no-plans FOLDER --title "`pico`, tenth edition, the end of `pico/shapes`"

In: folders that have all parts of one edition's evaluation between them, measured of the same weights; and `gen` of a
copy that writes no plans. Out: the page, and on stdout the rows of README's table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from string import Template
from typing import Any

from unilip.emoji.report import describe, table
from unilip.files import read_json, write_text

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("recon", "vqa", "gen", "edit", "shapes", "joint", "chain", "riddle")
TASKS = ("single", "two", "counting", "colour", "position", "colour_attr")  # prompts of generation, as they are named
WORDS = {"position": "places", "colour_attr": "two colours", "two": "two things"}
SHAPES = ("84x140", "140x84")


def read(folders: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the results of all parts by name, and the settings, which must be the same in all folders."""
    found, first = {}, read_json(folders[0] / "results.json")
    for folder in folders:
        results = read_json(folder / "results.json")
        for name in ("fingerprint", "atlas", "judge", "count", "seeds", "steps", "guidance_scale", "dtype"):
            if results[name] != first[name]:
                raise SystemExit(f"{folder} has another {name} than {folders[0]}: {results[name]}, {first[name]}")
        found |= {part: results[f"emoji-{part}"] for part in PARTS if f"emoji-{part}" in results}
    if missing := [part for part in PARTS if part not in found]:
        raise SystemExit(f"no folder has {', '.join(missing)}; measure these parts, too")
    return found, first


def percent(*values: float, digits: int = 0) -> str:
    return " / ".join(f"{100 * value:.{digits}f}" for value in values) + " %"


def group(found: Mapping[str, Any], *names: str) -> list[float]:
    return [found["groups"][name]["right"] for name in names]


def extremes(found: Mapping[str, Any], wanted: Callable[[str], bool] = lambda name: True) -> tuple[str, str]:
    """Return the worst and the best group with their shares."""
    values = {name: row["right"] for name, row in found["groups"].items() if wanted(name)}
    ends = (min(values, key=values.__getitem__), max(values, key=values.__getitem__))
    low, high = (
        f"{WORDS.get(name.split(',')[0], name.replace(', seen', ''))} {percent(values[name])}" for name in ends
    )
    return low, high


def drawn(found: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return means of seen and unseen prompts, and the worst and best task, seen and unseen."""
    rows = {
        task: group(found, *(name for kind in ("seen", "unseen") if (name := f"{task}, {kind}") in found["groups"]))
        for task in TASKS
    }
    order = sorted(rows, key=lambda task: min(rows[task]))
    ends = (f"{WORDS.get(task, task)} {percent(*rows[task])}" for task in (order[0], order[-1]))
    unseen = mean(row[1] for row in rows.values() if len(row) > 1)
    return percent(mean(row[0] for row in rows.values()), digits=1), percent(unseen, digits=1), *ends


def summary(found: Mapping[str, Any], plain: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the rows of the page's first table."""
    scenes, concepts = (found["recon"]["groups"][f"held-out {kind}"] for kind in ("scenes", "concepts"))
    edits = found["edit"]["groups"]
    seen, unseen = (
        mean(row["right"] for name, row in edits.items() if name.endswith(f", {kind}")) for kind in ("seen", "unseen")
    )
    pictures, changed = (
        group(found["shapes"], *(f"{what}, {size}" for size in SHAPES)) for what in ("pictures", "edits")
    )
    riddles = group(found["riddle"], "riddles met in training", "riddles never met in training")
    rows_of_edits = group(found["chain"], *(f"{n} in a row" for n in (1, 3, 5)))
    return [
        (
            "reconstruct, whole scene read off it", f"{percent(scenes['right'], digits=1)} ({scenes['psnr']:.1f} dB)",
            f"{percent(concepts['right'], digits=1)} (objects never seen, {concepts['psnr']:.1f} dB)", "", "",
        ),
        ("answer a question", percent(found["vqa"]["right"], digits=1), "", *extremes(found["vqa"])),
        ('draw what is asked, as it comes (`plan` "auto")', *drawn(found["gen"])),
        ("the same without plans", *drawn(plain)),
        (
            "follow an edit and keep the rest", percent(seen, digits=1), percent(unseen, digits=1),
            *extremes(found["edit"], lambda name: name.endswith("seen")),
        ),
        ("draw 84x140 / 140x84 px", percent(*pictures), "", "", ""),
        ("edit them", percent(*changed), "", "", ""),
        ("take a thing of a second picture", percent(*group(found["joint"], "a thing of picture 2")), "", "", ""),
        ("edit the result again: all right after 1 / 3 / 5", percent(*rows_of_edits), "", "", ""),
        ("draw a riddle", f"{percent(riddles[0])} (met in training)", f"{percent(riddles[1])} (never met)", "", ""),
    ]  # fmt: skip


PAGE = Template(Path(__file__).with_suffix(".txt").read_text(encoding="utf-8"))
HEADS = {
    "recon": "Reconstructions", "vqa": "Answers", "gen": "Pictures, plans written", "plain": "Pictures, no plans",
    "edit": "Edits", "shapes": "Pictures that are no squares", "joint": "Edits that take a thing of a second picture",
    "chain": "Edits in a row", "riddle": "Riddles",
}  # fmt: skip


def main() -> None:
    """Read, compose, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--no-plans", type=Path, required=True, metavar="FOLDER", help="`gen` of a copy without plans")
    parser.add_argument("--title", required=True, help="what the weights are")
    parser.add_argument(
        "--note", default="The edition was not chosen by these prompts: it is the end of its last stage."
    )
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    found, settings = read(options.folders)
    plain = read_json(options.no_plans / "results.json")["emoji-gen"]
    rows = summary(found, plain)
    parts = []
    for part, head in HEADS.items():
        lines = table("gen", plain) if part == "plain" else table(part, found[part])
        parts.append("\n".join([f"## {head}", "", *lines]))
    page = PAGE.substitute(
        settings, title=options.title, weights=settings["fingerprint"][:8], machine=settings["device"],
        summary="\n".join(f"| {' | '.join(row)} |" for row in rows), note=options.note, setting=describe(settings),
        parts="\n\n".join(parts),
    )  # fmt: skip
    write_text(options.to, page)
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
