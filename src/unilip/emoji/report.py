"""Pages that a person can check the judge by: tables in Markdown, and an HTML page with pictures.

Right cases are on the left, wrong ones on the right, each with what the judge says.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unilip.emoji.captions import WORDS
from unilip.files import fill_page, write_text

Record = dict[str, Any]
SHOWN = 4  # right ones and wrong ones of each group
TITLES: dict[str, str] = WORDS["titles"]
COLUMNS: dict[str, str] = WORDS["columns"]


def write_report(folder: Path, results: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> None:
    """Write results.md and index.html to FOLDER: tables, a row a group, and right and wrong cases side by side."""
    title, world, setting = f"{results['model']} in the emoji world", results["world"], describe(results)
    lines, parts = [f"# {title} {world!r}", "", setting, ""], []
    for part in filter(records.__contains__, TITLES):
        found = results[f"emoji-{part}"]
        lines += [f"## emoji-{part}", "", *table(part, found), ""]
        shown = {"rows": _rows(found), "totals": _totals(found), "cases": _cases(records[part])}
        parts.append({"name": f"emoji-{part}", "title": TITLES[part], **shown})
    page = fill_page("unilip.emoji", "report.html", title=f"{title} {world}", setting=setting, parts=parts)
    write_text(folder / "results.md", "\n".join(lines))
    write_text(folder / "index.html", page)


def table(part: str, found: Mapping[str, Any]) -> list[str]:
    """Return lines of Markdown that tell a part: what it is about, a table with a row a group, and the means."""
    rows = _rows(found)
    cells = [f"| {' | '.join(row)} |" for row in rows]
    cells.insert(1, f"|{'---|' * len(rows[0])}")
    return [f"{TITLES[part][0].upper()}{TITLES[part][1:]}.", "", *cells, "", _totals(found)]


def describe(results: Mapping[str, Any]) -> str:
    """Say how results were measured, and of which weights."""
    return (
        f"{results['count']} prompts a group, {results['seeds']} pictures a prompt, {results['steps']} steps, guidance "
        f"{results['guidance_scale']:g}, {results['dtype']} on {results['device']}, {results['date']}, "
        f"{results['seconds']:.0f} s; weights {results['fingerprint']}, art {results['atlas']}, judge "
        f"{results['judge']}. Shares are of pictures or answers; 95 % is the Wilson interval over prompts."
    )


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of a table: its head, then a row a group."""
    groups = dict(found["groups"])
    for name, words in (("as people write", "seen, as people write"), ("no guidance", "all, no guidance")):
        if name in found:
            groups[words] = found[name]
    parts = list(dict.fromkeys(name for row in groups.values() for name in row.get("parts", {})))
    numbers = [name for name in COLUMNS if any(name in row for row in groups.values())]
    rows = [["group", "right", "95 %", *parts, *(COLUMNS[name] for name in numbers), "prompts", "items"]]
    rows += [
        [
            group,
            _number("right", row["right"]),
            "{:.0f} to {:.0f} %".format(*(100 * bound for bound in row["interval"])),
            *(_number("parts", row.get("parts", {}).get(name)) for name in parts),
            *(_number(name, row.get(name)) for name in numbers),
            str(row["prompts"]),
            str(row["items"]),
        ]
        for group, row in groups.items()
    ]
    return rows


def _number(name: str, value: float | None) -> str:
    """Write a value of a measure; all but these three are shares."""
    if value is None:
        return ""
    if name.startswith("psnr"):
        return f"{value:.2f}"
    return f"{value:.3f}" if name in ("ssim", "feature_distance") else f"{100 * value:.1f} %"


def _totals(found: Mapping[str, Any]) -> str:
    said, checked = (
        ", ".join(f"{words} {_number(name, found[name])}" for name, words in WORDS[kind].items() if name in found)
        for kind in ("means", "controls")
    )
    return f"{said}.{checked and f' Control: {checked}.'}"


def _cases(entries: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Choose of each group up to SHOWN right and SHOWN wrong items, of as many different prompts as there are."""
    first: dict[tuple[str, bool, int], Record] = {}
    for record in entries:
        first.setdefault((record["group"], record["ok"], record["index"]), record)
    chosen = list(first.values())  # a second picture of one prompt only where prompts run out
    chosen += [record for record in entries if record not in chosen]
    cases: dict[str, dict[str, list[Record]]] = {}
    for record in chosen:
        column = cases.setdefault(record["group"], {"right": [], "wrong": []})["right" if record["ok"] else "wrong"]
        if len(column) < SHOWN:
            column.append(record)
    return cases
