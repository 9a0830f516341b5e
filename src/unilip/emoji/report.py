"""Pages that a person can check the judge by: tables in Markdown, and an HTML page with pictures.

Right cases are on the left, wrong ones on the right, each with what the judge says.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from unilip.emoji.captions import WORDS
from unilip.files import write_text

Record = dict[str, Any]
SHOWN = 4  # right ones and wrong ones of each group
TITLES: dict[str, str] = WORDS["titles"]
COLUMNS: dict[str, str] = WORDS["columns"]


def write_report(folder: Path, results: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> None:
    """Write results.md and index.html to FOLDER."""
    write_text(folder / "results.md", make_table(results))
    write_text(folder / "index.html", make_page(results, records))


def make_table(results: Mapping[str, Any]) -> str:
    """Return the results as Markdown: one table a part, a row a group."""
    lines = [f"# {results['model']} in the emoji world {results['world']!r}", "", _setting(results), ""]
    for part, title in TITLES.items():
        found = results.get(f"emoji-{part}")
        if found is None:
            continue
        lines += [f"## emoji-{part}", "", f"{title[0].upper()}{title[1:]}.", ""]
        head, rows = _rows(found)
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", _totals(found), ""]
    return "\n".join(lines)


def _setting(results: Mapping[str, Any]) -> str:
    return (
        f"{results['count']} prompts a group, {results['seeds']} pictures a prompt, {results['steps']} steps, guidance "
        f"{results['guidance_scale']:g}, {results['dtype']} on {results['device']}, {results['date']}, "
        f"{results['seconds']:.0f} s; weights {results['fingerprint']}, art {results['atlas']}, judge "
        f"{results['judge']}. Shares are of pictures or answers; 95 % is the Wilson interval over prompts."
    )


def _rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    groups = dict(found["groups"])
    for name, words in (("as people write", "seen, as people write"), ("no guidance", "all, no guidance")):
        if name in found:
            groups[words] = found[name]
    parts = list(dict.fromkeys(name for row in groups.values() for name in row.get("parts", {})))
    numbers = [name for name in COLUMNS if any(name in row for row in groups.values())]
    head = ["group", "right", "95 %", *parts, *(COLUMNS[name] for name in numbers), "prompts", "items"]
    rows = [
        [
            group,
            _percent(row["right"]),
            "{:.0f} to {:.0f} %".format(*(100 * bound for bound in row["interval"])),
            *(_percent(row.get("parts", {}).get(name)) for name in parts),
            *(_number(name, row.get(name)) for name in numbers),
            str(row["prompts"]),
            str(row["items"]),
        ]
        for group, row in groups.items()
    ]
    return head, rows


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if name in ("another picture", "swapped prompts", "as captions"):
        return _percent(value)
    return f"{value:.2f}" if name.startswith("psnr") else f"{value:.3f}"


def _totals(found: Mapping[str, Any]) -> str:
    names = {"right": "Mean of the groups", "seen": "seen", "unseen": "unseen"}
    controls = {
        "swapped prompts": "judged against another prompt",
        "another picture": "asked about another picture",
    }
    said = [f"{words} {_percent(found[name])}" for name, words in names.items() if name in found]
    checked = [f"{words} {_percent(found[name])}" for name, words in controls.items() if name in found]
    return f"{', '.join(said)}.{' Control: ' + ', '.join(checked) + '.' if checked else ''}"


def choose(entries: Sequence[Record]) -> dict[str, tuple[list[Record], list[Record]]]:
    """Return by group up to SHOWN right and SHOWN wrong items, of as many different prompts as there are."""
    groups: dict[str, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    seen: set[tuple[str, bool, int]] = set()
    for first in (True, False):  # a second picture of one prompt only where prompts run out
        for record in entries:
            right, wrong = groups[record["group"]]
            column = right if record["ok"] else wrong
            mark = (record["group"], record["ok"], record["index"])
            if len(column) < SHOWN and record not in column and (not first or mark not in seen):
                seen.add(mark)
                column.append(record)
    return dict(groups)


def make_page(results: Mapping[str, Any], records: Mapping[str, Sequence[Record]]) -> str:
    """Return an HTML page: the tables, and for each group right and wrong cases side by side."""
    out: list[str] = []
    for part, entries in records.items():
        found = results[f"emoji-{part}"]
        head, rows = _rows(found)
        out += [f"<h2>emoji-{part}</h2><p>{html.escape(TITLES[part])}</p><table>"]
        for tag, row in (("th", head), *(("td", row) for row in rows)):
            out += ["<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"]
        out += [f"</table><p>{html.escape(_totals(found))}</p>"]
        for group, (right, wrong) in choose(entries).items():
            out += [f"<h3>{html.escape(group)}</h3>", '<div class="two">']
            out += [*_figures("right", right), *_figures("wrong", wrong), "</div>"]
    title = html.escape(f"{results['model']} in the emoji world {results['world']}")
    template = Template((resources.files("unilip.emoji") / "report.html").read_text(encoding="utf-8"))
    return template.substitute(title=title, setting=html.escape(_setting(results)), parts="\n".join(out))


def _figures(kind: str, column: Sequence[Record]) -> list[str]:
    out = [f'<div class="{kind}"><h4>{kind}</h4><div class="items">']
    for record in column:
        text, reason = html.escape(record["text"]), html.escape(record["reason"])
        source = html.escape(record["picture"], quote=True)
        out.append(
            f'<figure><img loading="lazy" src="{source}" alt="{text}"><figcaption><b>{text}</b> {reason}</figcaption>'
            "</figure>"
        )
    return [*out, "</div></div>"]
