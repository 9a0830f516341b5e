"""Runs side by side: tables with intervals, paired differences, and the same prompts' pictures in a row; see NOTE."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from unilip.errors import UniLIPError
from unilip.eval import scores
from unilip.eval.runs import read_manifest
from unilip.files import png_bytes, write_bytes, write_text
from unilip.pictures import contact_sheet, open_picture

SHOWN = 8  # prompts in a page of pictures
CELL = 256


@dataclass(frozen=True)
class Scored:
    """The score of one run in one column."""

    run: str
    folder: Path
    column: str
    summary: Mapping[str, Any]
    rows: Sequence[scores.Row]


def load_runs(folders: Sequence[str | Path]) -> list[Scored]:
    """Read the scores of runs by folder name. Raises UniLIPError: one is missing, given twice, or has no scores."""
    paths = [Path(folder).expanduser() for folder in folders]
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) != len(parts):
        raise UniLIPError("A run was given twice; give each folder once.")
    depth = 1  # as many folders as tell the runs apart
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    found = []
    for path, name in zip(paths, ("/".join(own[-depth:]) for own in parts), strict=True):
        if not path.is_dir():
            raise UniLIPError(f"There is no folder {path}; give folders that `unilip eval` made.")
        if (path / "results.json").is_file() and not (path / "scores").is_dir():
            found += _emoji(path, name)
            continue
        read_manifest(path)
        found += [Scored(name, path, scores.column(about), about, rows) for about, rows in scores.read_scores(path)]
    return found


def _emoji(path: Path, name: str) -> list[Scored]:
    from unilip.emoji.score import read_counted  # with torch, which no other run needs here

    results, rows = read_counted(path)
    found = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [
            scores.make_row(
                row["key"], {"right": float(row["ok"])}, cluster=f"{row['group']}/{row['index']}", group=row["group"],
                picture=row["picture"], prompt=row.get("text", ""),
            )
            for row in rows
            if row["part"] == part
        ]  # fmt: skip
        summary: dict[str, Any] = {
            "task": f"emoji-{part}", "protocol": f"world {results['world']}, {results['count']} prompts a group",
            "scorer": f"emoji judge {results['judge']}, art {results['atlas']}", "model": results["model"],
            "rule": {"over": "groups"}, "statuses": {"ok": len(own)},
            "scores": scores.summarise(own, scores.Rule("groups")),
        }  # fmt: skip
        found.append(Scored(name, path, scores.column(summary), summary, own))
    return found


def difference(a: Scored, b: Scored, metric: str, split: str) -> dict[str, Any] | None:
    """Return B less A over the items that both have, as a table's row has it; None if none."""
    shared = set.intersection(*(
        {row["key"] for row in one.rows if row["split"] == split and row["scores"] and metric in row["scores"]}
        for one in (a, b)
    ))  # fmt: skip
    if not shared:
        return None
    rows = [sorted((r for r in one.rows if r["key"] in shared), key=lambda r: str(r["key"])) for one in (a, b)]
    ours, theirs = (scores.tabulate(own, metric) for own in rows)
    rule = scores.Rule(**a.summary["rule"])  # each bootstrap has the same seed: it draws the same prompts for both
    low, high = scores.interval(scores.bootstrap(theirs, rule) - scores.bootstrap(ours, rule), ours, rule)
    value = scores.combine(theirs, rule) - scores.combine(ours, rule)
    return {"difference": value, "d_low": low, "d_high": high, "shared": len(shared)}


HEAD = (
    "run", "model", "metric", "split", "value", "low", "high", "items", "open", "difference", "d_low", "d_high",
    "shared",
)  # fmt: skip


def make_tables(runs: Sequence[Scored]) -> dict[str, list[dict[str, Any]]]:
    """Return by column the rows of its table; differences are to the first run of the column."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        rows, first = tables.setdefault(run.column, []), next(one for one in runs if one.column == run.column)
        about = {"run": run.run, "model": run.summary["model"]}
        left = sum(n for status, n in run.summary["statuses"].items() if status != "ok")
        for split, metrics in run.summary["scores"].items():
            for metric, entry in metrics.items():
                row = {**about, "metric": metric, "split": split}
                row |= {name: entry[name] for name in ("value", "low", "high", "items")} | {"open": left}
                if run is not first:
                    row |= difference(first, run, metric, split) or {}
                rows.append(row)
        for metric, value in run.summary.get("whole", {}).items():
            rows.append({**about, "metric": metric, "split": "", "value": value})
    for rows in tables.values():
        rows.sort(key=lambda row: (row["metric"], row["split"]))
    return tables


def compare(folders: Sequence[str | Path], output: Path, pictures: int = SHOWN) -> dict[str, Any]:
    """Write the comparison of runs, with the pictures of so many prompts, to a folder; returns its tables by column."""
    runs = load_runs(folders)
    tables = make_tables(runs)
    sheets: dict[str, str] = {}
    for n, title in enumerate(tables if pictures else (), 1):
        if (sheet := _sheet([run for run in runs if run.column == title], pictures)) is not None:
            sheets[title] = f"pictures-{n}.png"
            write_bytes(output / sheets[title], png_bytes(sheet))
    write_text(output / "compare.md", to_markdown(tables, sheets))
    listed = [(title, *(row.get(name) for name in HEAD)) for title, rows in tables.items() for row in rows]
    write_text(output / "compare.csv", scores.csv_text(("column", *HEAD), listed))
    return {"tables": tables, "pictures": sheets}


def _sheet(runs: Sequence[Scored], count: int) -> Image.Image | None:
    """Return a page of pictures: a row a prompt, a column a run; None where there are no pictures."""
    by_key = [{row["key"]: row for row in run.rows if row.get("picture")} for run in runs]
    shared = [key for key in by_key[0] if all(key in rows for rows in by_key)]
    chosen: dict[str, str] = {}
    for key in shared:  # different prompts, spread over the file
        chosen.setdefault(by_key[0][key]["cluster"], key)
    keys = list(chosen.values())
    keys = keys[:: max(1, len(keys) // count)][:count]
    images, captions = [], []
    for key in keys:
        for run, rows in zip(runs, by_key, strict=True):
            file = run.folder / rows[key]["picture"]
            if not file.is_file():
                return None
            images.append(open_picture(file).convert("RGB").resize((CELL, CELL), Image.Resampling.BICUBIC))
            own = rows[key]["scores"] or {}
            said = ", ".join(f"{name} {value:.3g}" for name, value in own.items()) or rows[key]["status"]
            captions.append(f"{run.run}: {said}. {rows[key].get('prompt', '')[:90]}")
    return contact_sheet(images, len(runs), captions) if images else None


def _cell(row: Mapping[str, Any], name: str) -> str:
    value, sign = row.get(name), "+" if name in ("difference", "d_low", "d_high") else ""
    return f"{value:{sign}.4f}" if isinstance(value, float) else "" if value is None else str(value)


def to_markdown(tables: Mapping[str, Sequence[Mapping[str, Any]]], sheets: Mapping[str, str]) -> str:
    """Return the tables as Markdown."""
    out = ["# Comparison", "", NOTE, ""]
    for title, rows in tables.items():
        out += [f"## {title}", "", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
        out += ["| " + " | ".join(_cell(row, name).replace("|", "\\|") for name in HEAD) + " |" for row in rows]
        out += ["", *([f"![pictures]({sheets[title]})", ""] if title in sheets else [])]
    return "\n".join(out)


NOTE = (
    "Low and high are 95 % bootstrap intervals over prompts; a difference is to the first run of its table, on the "
    "items that both have. Tables are apart where task, protocol, scorer or prompts differ: such numbers are not "
    "comparable."
)
