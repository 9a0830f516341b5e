"""The pages of `unilip eval claims`: tables with verdicts, curves over training, sweeps, and picture grids.

Goes in: results, the runs behind them, and held-out scenes. Comes out, in a folder: results.md, curves-*.png,
sweep-*.png and grid-*.png; a figure without data is not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from unilip.files import read_lines, write_text

if TYPE_CHECKING:
    from unilip.eval.claims import Run

SHOWN = 8  # pictures in a grid
GUIDANCE = (1.0, 2.0, 3.0, 4.5, 6.0)
STEPS = (5, 10, 20)
ORIGINAL = "original"  # stands for the encoder that no tokenizer training has touched
SHARES = ("answers", "generation", "edits", "riddles")  # measures that are shares of right ones, 0 to 1
TOKENIZER_MEASURES = ("psnr", "ssim", "feature_distance", "answers")
GENERATION_MEASURES = ("generation", "edits", "psnr_outside", "riddles", "flow", "flow_edit")
TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "feature_distance": "feature distance to the original",
    "answers": "answers of the unchanged LLM, %",
    "generation": "generation right, %",
    "edits": "edits right, %",
    "psnr_outside": "PSNR outside the edit, dB",
    "riddles": "riddles right, %",
    "flow": "held-out flow loss",
    "flow_edit": "of edits",
}
SWEEPS = {"num_queries": "number of queries", "connector_layers": "layers of the connector"}
SWEPT = "sweep_"  # ablations named sweep_FIELD_VALUE are points of a figure

Runs = Mapping[str, Sequence["Run"]]
SMOOTH = 0.8  # of a running mean over the lines of a log
LABEL = 130  # pixels left of a row of pictures


def write_pages(
    folder: Path,
    results: Mapping[str, Any],
    runs: Mapping[str, Runs],
    scenes: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Write results.md and every figure that there is data for."""
    figures: dict[str, list[str]] = {}
    for size, found in runs.items():
        made = draw_curves(folder, size, found) + draw_sweeps(folder, size, results["sizes"][size]["variants"])
        figures[size] = made + draw_grids(folder, size, found, scenes[size])
    sampling = draw_sampling(folder, results["sampling"]) if "sampling" in results else []
    write_text(folder / "results.md", make_page(results, figures, sampling))


# --- tables -----------------------------------------------------------------------------------------------------------


def make_page(results: Mapping[str, Any], figures: Mapping[str, Sequence[str]], sampling: Sequence[str]) -> str:
    """Return everything as Markdown."""
    lines = [
        "# The paper's claims, tested by ablation", "",
        f"{results['count']} prompts a group, {results['seeds']} pictures a prompt, {results['dtype']} on "
        f"{results['device']}, {results['date']}. A number after ± is the standard deviation over training seeds "
        "(where there is one seed only, the standard error over items, in brackets). A statement is decided where the "
        "paired difference is more than two standard errors from its limit; with one seed these errors say nothing "
        "about how another training run would differ.", "",
    ]  # fmt: skip
    for size, found in results["sizes"].items():
        lines += [f"## {size}", ""]
        for claim in found["claims"]:
            lines += claim_lines(claim, found["variants"])
        lines += sweep_lines(found["variants"])
        if found["missing"]:
            lines += ["Not trained yet:", "", "```bash", *found["missing"].values(), "```", ""]
        lines += [line for name in figures.get(size, ()) for line in (f"![{name}]({name})", "")]
    if "sampling" in results:
        lines += sampling_lines(results["sampling"])
        lines += [line for name in sampling for line in (f"![{name}]({name})", "")]
    return "\n".join(lines)


def claim_lines(claim: Mapping[str, Any], variants: Mapping[str, Any]) -> list[str]:
    """Return a claim's table, statements and verdict."""
    lines = [f"### Claim {claim['claim']}: {claim['words']}", ""]
    compared = {s["measure"] for s in claim["statements"]}
    tokenizer = bool(compared & set(TOKENIZER_MEASURES))
    rows = [
        *claim["variants"],
        *([ORIGINAL] if any(s["b"] == ORIGINAL for s in claim["statements"]) else []),
    ]
    rows = [name for name in rows if name in variants]
    order = TOKENIZER_MEASURES if tokenizer else GENERATION_MEASURES
    measures = [m for m in order if any(m in variants[name] for name in rows)]
    if rows:
        lines += variant_table({name: variants[name] for name in rows}, measures)
    lines += ["| statement | difference | standard error | holds |", "|---|---|---|---|"]
    for s in claim["statements"]:
        limit = f" (limit {number(s['measure'], s['by'])})" if s["by"] else ""
        gap = number(s["measure"], s["difference"]) if "difference" in s else ""
        error = number(s["measure"], s["error"]) if "error" in s else ""
        what = f"{s['words']}: {s['a']} - {s['b']}, {TITLES[s['measure']]}{limit}"
        lines.append(f"| {what} | {gap} | {error} | {s['verdict']} |")
    seeds = f" ({claim['seeds']} seed{'s' if claim['seeds'] > 1 else ''})" if claim["seeds"] else ""
    return [*lines, "", f"Verdict: **{claim['verdict']}**{seeds}.", ""]


def variant_table(variants: Mapping[str, Any], measures: Sequence[str]) -> list[str]:
    """Return a table of variants with their budgets."""
    head = [
        "variant",
        *(TITLES[m] for m in measures),
        "steps x batch",
        "samples in all",
        "minutes",
        "M parameters",
        "seeds",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in variants.items():
        cells = [name, *(cell(m, row.get(m)) for m in measures)]
        if "samples" in row:
            cells += [
                f"{row['steps']} x {row['batch_size']}", f"{row['samples']:,}", f"{row['minutes']:g}",
                f"{row['parameters'] / 1e6:.1f}", str(len(row["seeds"])),
            ]  # fmt: skip
        else:
            cells += [""] * 5
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def cell(measure: str, score: Mapping[str, Any] | None) -> str:
    """Write a score with its spread over seeds, or its error over items in brackets."""
    if score is None:
        return ""
    spread = score["spread"]
    about = f"± {number(measure, spread)}" if spread is not None else f"(± {number(measure, score['error'])})"
    return f"{number(measure, score['mean'])} {about}"


def number(measure: str, value: float) -> str:
    """Write a value of a measure; shares as percent."""
    if measure in SHARES:
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if measure.startswith("psnr") else f"{value:.4f}"


def sweep_points(variants: Mapping[str, Any], name: str) -> list[tuple[int, Mapping[str, Any]]]:
    """Return the values of a swept field with their variants, in order; the base setting is one of them."""
    prefix = f"{SWEPT}{name}_"
    points = [(int(v.removeprefix(prefix)), row) for v, row in variants.items() if v.startswith(prefix)]
    if points and "gen_dual" in variants:
        points.append((int(variants["gen_dual"][name]), variants["gen_dual"]))
    return sorted(points, key=lambda point: point[0])


def sweep_lines(variants: Mapping[str, Any]) -> list[str]:
    """Return the tables of the sweeps."""
    lines = []
    for name, title in SWEEPS.items():
        points = sweep_points(variants, name)
        if points:
            rows = {f"{title} {value}": row for value, row in points}
            measures = [m for m in GENERATION_MEASURES if any(m in row for row in rows.values())]
            lines += [f"### Sweep: {title}", "", *variant_table(rows, measures)]
    return lines


def sampling_lines(sampling: Mapping[str, Any]) -> list[str]:
    """Return the table of guidance and steps."""
    about, values = sampling["about"], sampling["values"]
    lines = [
        "## Guidance and steps", "",
        f"{about['name']} (weights {about['model']}), {about['count']} held-out captions of all tasks, share right in "
        "% (and share of backgrounds, objects, counts, colours and relations right, in the mean).", "",
        f"| guidance | {' | '.join(f'{n} steps' for n in STEPS)} |", f"|{'---|' * (1 + len(STEPS))}",
    ]  # fmt: skip
    for guidance in GUIDANCE:
        cells = []
        for steps in STEPS:
            found = values[f"{guidance:g}x{steps}"]
            cells.append(f"{100 * found['all']:.1f} ({100 * partly(found):.1f})")
        lines.append(f"| {guidance:g} | {' | '.join(cells)} |")
    return [*lines, ""]


def partly(found: Mapping[str, float]) -> float:
    """Return the mean of the parts of a verdict."""
    return float(np.mean([value for name, value in found.items() if not name.startswith("all")]))


# --- curves -----------------------------------------------------------------------------------------------------------


def draw_curves(folder: Path, size: str, runs: Runs) -> list[str]:
    """Draw what was logged over the steps; returns the names of the files."""
    figures = {
        "tokenizer": (("psnr", "PSNR of training batches, dB"), ("distill", "distance to the original features")),
        "generation": (("flow", "flow loss"), ("flow_edit", "flow loss of edits")),
    }
    names = []
    for kind, panels in figures.items():
        shown = {
            name: several
            for name, several in runs.items()
            if any(p in line for p, _ in panels for run in several for line in run.lines)
        }
        if not shown:
            continue
        figure, axes = _pyplot().subplots(1, len(panels), figsize=(12, 4.5))
        for axis, (key, title) in zip(axes, panels, strict=True):
            for n, (name, several) in enumerate(shown.items()):
                for k, run in enumerate(several):
                    points = smoothed([(line["step"], line[key]) for line in run.lines if line.get(key) is not None])
                    if points:
                        x, y = zip(*points, strict=True)
                        label = name if k == 0 else None
                        axis.plot(
                            x, y, color=f"C{n % 10}", linestyle="-" if k == 0 else "--", linewidth=1.2, label=label
                        )
            axis.set_xlabel("step of this run")
            axis.set_title(title, fontsize=10)
            if key == "distill":
                axis.set_yscale("log")
        axes[0].legend(fontsize=7)
        names.append(_save(figure, folder, f"curves-{kind}-{size}.png"))
    return names


def smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return a running mean of values over steps."""
    out: list[tuple[int, float]] = []
    for step, value in points:
        out.append((step, value if not out else SMOOTH * out[-1][1] + (1 - SMOOTH) * value))
    return out


def draw_sweeps(folder: Path, size: str, variants: Mapping[str, Any]) -> list[str]:
    """Draw a figure for each swept field."""
    names = []
    for name, title in SWEEPS.items():
        points = sweep_points(variants, name)
        measures = [m for m in GENERATION_MEASURES if sum(m in row for _, row in points) > 1]
        if not measures:
            continue
        figure, axes = _pyplot().subplots(1, len(measures), figsize=(3 * len(measures), 3), squeeze=False)
        for axis, measure in zip(axes[0], measures, strict=True):
            known = [(value, row[measure]) for value, row in points if measure in row]
            scale = 100 if measure in SHARES else 1
            errors = [scale * (s["error"] if s["spread"] is None else s["spread"]) for _, s in known]
            axis.errorbar([v for v, _ in known], [scale * s["mean"] for _, s in known], errors, marker="o", capsize=3)
            axis.set_xlabel(title)
            axis.set_title(TITLES[measure], fontsize=9)
        names.append(_save(figure, folder, f"sweep-{name}-{size}.png"))
    return names


def draw_sampling(folder: Path, sampling: Mapping[str, Any]) -> list[str]:
    """Draw the judge's verdicts over guidance, a line for each number of steps."""
    figure, axes = _pyplot().subplots(1, 2, figsize=(9, 3.5))
    for axis, (title, read) in zip(
        axes, (("right, %", lambda f: f["all"]), ("parts right, %", partly)), strict=True
    ):  # fmt: skip
        for steps in STEPS:
            y = [100 * read(sampling["values"][f"{g:g}x{steps}"]) for g in GUIDANCE]
            axis.plot(GUIDANCE, y, marker="o", label=f"{steps} steps")
        axis.set_xlabel("guidance")
        axis.set_title(title, fontsize=10)
    axes[0].legend()
    return [_save(figure, folder, "sweep-sampling.png")]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, folder: Path, name: str) -> str:
    figure.tight_layout()
    figure.savefig(folder / name, dpi=80)
    _pyplot().close(figure)
    return name


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw_grids(folder: Path, size: str, runs: Runs, scenes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write picture grids: the same inputs, a row for each variant; returns the names of the files."""
    names = []
    tokenizers = {
        n: several[0].pictures for n, several in runs.items() if several[0].pictures and several[0].is_tokenizer
    }
    if tokenizers:
        rows = {"input": np.concatenate([item["image"] for item in scenes[:SHOWN]], axis=1)}
        for name, file in tokenizers.items():
            with Image.open(file) as strip:
                rows[name] = np.asarray(strip.convert("RGB"))
        names.append(_write_grid(folder, f"grid-reconstruction-{size}.png", rows))
    generators = {
        n: several[0].pictures for n, several in runs.items() if several[0].pictures and not several[0].is_tokenizer
    }
    for part in ("gen", "edit", "riddle") if generators else ():
        rows = picture_rows(part, generators)
        if rows:
            names.append(_write_grid(folder, f"grid-{part}-{size}.png", rows))
    return names


def picture_rows(part: str, folders: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Return the pictures of the first prompt of each group, by variant; edits between source and target."""
    records = {
        name: {r["key"]: r for r in read_lines(folder / "items.jsonl", "list of judged items") if r["part"] == part}
        for name, folder in folders.items()
    }
    common = set.intersection(*(set(found) for found in records.values())) if records else set()
    first = next(iter(records.values()))
    keys, groups = list[str](), set[str]()
    for key in (key for key in first if key in common):
        group = first[key]["group"] if part != "riddle" else key.rpartition("/")[0]
        if group not in groups and len(keys) < SHOWN and not key.startswith("gen/no guidance"):
            groups.add(group)
            keys.append(key)
    rows: dict[str, np.ndarray] = {}
    for name, folder in folders.items():
        pictures = []
        for key in keys:
            with Image.open(folder / records[name][key]["picture"]) as stored:
                pictures.append(np.asarray(stored.convert("RGB")))
        if part == "edit":  # each is source, result, target side by side
            thirds = [np.split(picture, 3, axis=1) for picture in pictures]
            rows.setdefault("source", _join([t[0] for t in thirds]))
            rows[name] = _join([t[1] for t in thirds])
        else:
            rows[name] = _join(pictures)
    if part == "edit" and keys:
        rows["target"] = _join([t[2] for t in thirds])
    return {name: row for name, row in rows.items() if row.size}


def _join(pictures: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(pictures, axis=1) if pictures else np.zeros((0, 0, 3), dtype=np.uint8)


def _write_grid(folder: Path, name: str, rows: Mapping[str, np.ndarray]) -> str:
    height = max(row.shape[0] for row in rows.values()) + 4
    width = max(row.shape[1] for row in rows.values())
    page = Image.new("RGB", (LABEL + width, height * len(rows)), (255, 255, 255))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for n, (label, row) in enumerate(rows.items()):
        pen.text((4, n * height + height // 2 - 8), label, fill=(20, 20, 20), font=font)
        page.paste(Image.fromarray(row), (LABEL, n * height))
    page.save(folder / name)
    return name
