"""Rows of scored items -> a score with its protocol, scorer, interval, and what could not be scored.

In: rows {"key", "cluster", "group", "split", "picture", "status", "scores", "parts"} and a rule of averaging. Out:
scores/NAME.json and NAME.jsonl. Intervals are bootstraps over clusters (prompts), within groups that are averaged.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unilip.errors import UniLIPError
from unilip.files import file_hash, read_json, read_lines, write_json, write_lines

Row = dict[str, Any]
Table = Mapping[str, np.ndarray]  # by group sums and counts (2, C), an entry for each of C clusters
RESAMPLES = 2000
FOLDER = "scores"
RANGES: dict[str, tuple[float, float]] = {  # the least and the most a score can be: what unjudged items could have had
    **dict.fromkeys(("correct", "wiscore", "dpg", "soft_tifa_am", "soft_tifa_gm"), (0.0, 1.0)),
    "score": (1.0, 5.0), **dict.fromkeys(("semantics", "quality", "overall"), (0.0, 10.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Rule:
    """How items become one number: the mean over items, or over groups, weighted or not."""

    over: str = "items"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.over in ("items", "groups"), self.over

    def weight(self, groups: Sequence[str]) -> np.ndarray:
        """Return the weights of the groups that are there, which come to one."""
        values = np.array([self.weights.get(group, 1.0) for group in groups], dtype=float)
        return values / values.sum()


def make_row(key: str, scores: Mapping[str, float] | None, **more: Any) -> Row:
    """Return the row of an item; `more` are its fields that are not the usual ones."""
    usual = {"cluster": key, "group": "all", "split": "", "picture": None, "status": "ok"}
    return {"key": key, **usual, **more, "scores": scores}


def tabulate(rows: Sequence[Row], metric: str) -> Table:
    """Return the table of a metric; only of rows that have it."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for row in rows:
        if row["scores"] is not None and metric in row["scores"]:
            entry = groups.setdefault(row["group"], {}).setdefault(row["cluster"], np.zeros(2))
            entry += row["scores"][metric], 1
    return {group: np.stack(list(entries.values()), 1) for group, entries in groups.items()}


def combine(table: Table, rule: Rule) -> float:
    """Return the score of a table."""
    if rule.over == "items":
        return float(sum(s.sum() for s, _ in table.values()) / sum(n.sum() for _, n in table.values()))
    means = np.array([s.sum() / n.sum() for s, n in table.values()])
    return float(means @ rule.weight(list(table)))


def bootstrap(table: Table, rule: Rule) -> np.ndarray:
    """Return the scores (RESAMPLES,) of tables whose clusters are drawn again with replacement, always the same."""
    rng = np.random.default_rng(0)

    def drawn(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        picks = (rng.integers(0, len(sums), len(sums)) for _ in range(RESAMPLES))
        return np.array([sums[pick].sum() / counts[pick].sum() for pick in picks])

    if rule.over == "items":
        return drawn(*np.concatenate(list(table.values()), axis=1))
    weighted: np.ndarray = rule.weight(list(table)) @ np.stack([drawn(*entry) for entry in table.values()])  # G R
    return weighted


def interval(samples: np.ndarray, table: Table, rule: Rule) -> tuple[float | None, float | None]:
    """Return the middle 95 % of samples of a table; None where there is one cluster, which says nothing of others."""
    clusters = [entry.shape[1] for entry in table.values()]
    if (sum(clusters) if rule.over == "items" else max(clusters)) < 2:
        return None, None
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def summarise(rows: Sequence[Row], rule: Rule) -> dict[str, dict[str, Any]]:
    """Return by split the metrics: value, interval, least and most with open items. Raises UniLIPError: no score."""
    metrics = list(dict.fromkeys(name for row in rows if row["scores"] for name in row["scores"]))
    if not metrics and any(row["scores"] is None for row in rows):  # else only the whole was measured, as rfid
        counts = Counter(row["status"] for row in rows)
        raise UniLIPError(
            f"None of {len(rows)} items has a score ({', '.join(f'{n} {status}' for status, n in counts.items())}); "
            "see the reasons in the scores folder, then run again: what is open is asked again."
        )
    found: dict[str, dict[str, Any]] = {}
    for split in dict.fromkeys(row["split"] for row in rows):
        own = [row for row in rows if row["split"] == split]
        for metric in metrics:
            if not (table := tabulate(own, metric)):
                continue
            low, high = interval(bootstrap(table, rule), table, rule)
            entry: dict[str, Any] = {"value": combine(table, rule), "low": low, "high": high}
            if metric in RANGES and any(row["scores"] is None for row in own):
                for name, value in zip(("least", "most"), RANGES[metric], strict=True):
                    filled = [row if row["scores"] else {**row, "scores": {metric: value}} for row in own]
                    entry[name] = combine(tabulate(filled, metric), rule)
            entry["groups"] = {group: float(s.sum() / n.sum()) for group, (s, n) in table.items()}
            entry["items"] = int(sum(n.sum() for _, n in table.values()))
            found.setdefault(split, {})[metric] = entry
    return found


def add_parts(rows: Sequence[Row]) -> dict[str, float]:
    """Return the means of the parts (skills, categories) over all items that have them."""
    totals: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for row in rows:
        for name, pair in (row.get("parts") or {}).items():
            totals[name] += pair
    return {name: float(points / count) for name, (points, count) in totals.items() if count}


def write_scores(output: Path, name: str, rows: Sequence[Row], rule: Rule, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write scores/NAME.jsonl, then the summary scores/NAME.json, beside what it is `about`; returns the summary."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "scores"
    folder = output / FOLDER
    write_lines(folder / f"{slug}.jsonl", rows)  # first: the reasons are there even if nothing could be scored
    summary = {
        **about,
        "items": len(rows),
        "statuses": dict(Counter(row["status"] for row in rows)),
        "rule": {"over": rule.over, "weights": dict(rule.weights)},
        "scores": summarise(rows, rule),
        "parts": add_parts(rows),
        "date": time.strftime("%Y-%m-%d"),
        "rows_sha256": file_hash(folder / f"{slug}.jsonl"),
    }
    write_json(folder / f"{slug}.json", summary)
    return summary


def read_scores(run: Path) -> list[tuple[dict[str, Any], list[Row]]]:
    """Return the summaries of a run folder with their rows. Raises UniLIPError: there are none."""
    files = sorted((run / FOLDER).glob("*.json"))
    if not files:
        raise UniLIPError(f"{run} has no scores; run its `unilip eval` command with a scorer first.")
    found = []
    for file in files:
        summary, rows = read_json(file, "scores"), file.with_suffix(".jsonl")
        if not isinstance(summary, dict) or (rows.is_file() and file_hash(rows) != summary.get("rows_sha256")):
            raise UniLIPError(f"{rows} is not what {file.name} was made of; score the run again.")
        found.append((summary, read_lines(rows, "rows of scores")))
    return found


def csv_text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


def column(summary: Mapping[str, Any]) -> str:
    """Return what makes scores comparable: task, protocol, scorer, prompts. Scores of two columns never mix."""
    prompts = summary.get("prompts") or {}
    marks = []
    if prompts and not prompts.get("published"):
        own = "own " if prompts.get("published") is False else ""
        marks.append(f"{own}prompts {str(prompts.get('sha256'))[:8]}")
    if prompts.get("sources"):
        marks.append(f"pictures {prompts['sources'][:8]}")
    if prompts.get("count") and summary.get("prompts_scored") not in (None, prompts["count"]):
        marks.append(f"{summary['prompts_scored']} of {prompts['count']} prompts")
    return "; ".join([f"{summary['task']} {summary['protocol']}", summary["scorer"], *marks])


def tell(summary: Mapping[str, Any]) -> list[str]:
    """Return the lines that tell a score: protocol and scorer first, then numbers, then what is not in them."""
    lines = [column(summary)]
    for split, metrics in summary["scores"].items():
        for name, entry in metrics.items():
            title = f"{name} ({split})" if split else name
            bounds = f"; {entry['least']:.4f} to {entry['most']:.4f} with the open ones" if "least" in entry else ""
            low, high = entry["low"], entry["high"]
            spread = "no interval of one prompt" if low is None else f"95 % {low:.4f} to {high:.4f}"
            lines.append(f"  {title:<20} {entry['value']:.4f}  {spread}, {entry['items']} items{bounds}")
            if len(entry["groups"]) > 1:
                lines += [f"    {group:<18} {value:.4f}" for group, value in entry["groups"].items()]
    if summary["parts"]:
        lines.append("  by part: " + ", ".join(f"{name} {value:.4f}" for name, value in summary["parts"].items()))
    for name, value in summary.get("whole", {}).items():
        lines.append(f"  {name:<20} {value:.4f}" if isinstance(value, float) else f"  {name:<20} {value}")
    open_ones = {status: n for status, n in summary["statuses"].items() if status != "ok"}
    if open_ones:
        lines.append("  NOT SCORED: " + ", ".join(f"{n} {status}" for status, n in open_ones.items()))
    if summary.get("cost"):
        lines.append("  asking: " + ", ".join(f"{name} {value}" for name, value in summary["cost"].items()))
    return lines
