"""The verbs about checkpoints: convert, info, verify, demo."""

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unilip.cli.options import Options
from unilip.cli.terminal import bar, describe_model, load, plural, print_json, say
from unilip.errors import UniLIPError, check_choice
from unilip.machine import choose_device


def convert(o: Options) -> None:
    """Rewrite a checkpoint in another format."""
    source, target = o.words
    from unilip.checkpoints import hub, read, write

    folder = hub.local(target)
    if folder.is_dir() and any(folder.iterdir()) and not o.force:
        raise UniLIPError(f"{target} is not empty; give a new folder, or --force to replace a UniLIP checkpoint there.")
    write.parse_size(o.max_shard_size)
    dtype = read.parse_dtype("auto" if o.dtype is None else o.dtype)
    opened = read.open_checkpoint(source)
    if opened.adapters:
        from unilip.model import UniLIP

        check_choice("format to merge an adapter into", o.to, ("unilip", "diffusers"))
        stored = {opened.dtype(name) for name in opened.names}
        model = UniLIP.from_pretrained(source)
        model.merge_adapters()
        dtype = dtype or (stored.pop() if len(stored) == 1 else None)  # the same on every machine
        model.save_pretrained(folder, dtype=dtype, max_shard_size=o.max_shard_size, to=o.to)
        path = folder
    else:
        path = write.convert(source, folder, o.to, dtype=dtype, max_shard_size=o.max_shard_size)
    o.report.line(path)
    o.report.end(f"converted to the {o.to} format", source=source, path=str(path), format=o.to)


def info(o: Options) -> None:
    """Tell what a checkpoint is and holds, or how this machine multiplies for it."""
    from unilip.info import describe, machine

    found = (machine if o.machine else describe)(o.words[0] if o.words else None)
    if o.json:
        return print_json(found)
    if o.machine:
        return print(machine_table(found))
    config, parts = found.pop("config", None), found.pop("parts")
    dropped = Counter(found.pop("dropped", {}).values())
    found["left_out"] = [f"{plural(count, 'tensor')}: {reason}" for reason, count in dropped.items()]
    for key, value in found.items():
        if isinstance(value, dict):
            value = [f"{name}: {entry}" for name, entry in value.items()]
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        for line in value if isinstance(value, list) else [value]:
            print(f"{key.replace('_', ' '):<20} {line}")
    print("\nparameters of each part")
    for name, count in parts.items():
        print(f"{name:<20} {count:,}")
    if config is not None:
        print(f"\nconfig\n{json.dumps(config, indent=1)}")


def machine_table(found: dict[str, Any]) -> str:
    """Lay out what products take; * marks the ways that 20 steps are done in, by type."""
    from unilip.fast.products import WAYS

    def cell(row: dict[str, Any], way: str) -> str:
        (kind, _, library), ms = way.partition(" "), row["milliseconds"].get(way)
        return "-" if ms is None else f"{'* ' * (row['packed'].get(kind) == library)}{ms:.3g}"

    products = found["products"]
    table = [("way", [row["product"] for row in products])]
    table += [("", ["x".join(map(str, row["measured"])) for row in products])]
    table += [(way, [cell(row, way) for row in products]) for way in WAYS]
    return "\n".join([
        f"{'processor':<16} {found['processor']}",
        f"{'torch':<16} {found['torch']}, {plural(found['threads'], 'thread')}",
        f"{'free memory':<16} {found['free_memory'] / 2**30:.1f} GiB",
        f"\nmilliseconds of processor time of the products of {found['model']}; * is what 20 steps are done in",
        *(f"{head:<16}" + "".join(f"{one:>18}" for one in cells) for head, cells in table),
    ])  # fmt: skip


def verify(o: Options) -> int:
    """Recompute recorded numbers with a checkpoint, and compare."""
    checkpoint, expected = o.words
    if not Path(expected).is_file():
        raise UniLIPError(f"There is no file {expected}; give a safetensors file of recorded numbers.")
    device = choose_device(o.device)
    from unilip import verify as numbers

    with bar(o.progress, "entry") as progress:
        rows = numbers.verify(checkpoint, expected, o.tolerance, device, o.dtype or "float32", progress)
    good = bool(rows) and all(row.ok for row in rows)
    o.report.line(numbers.format_rows(rows))
    errors = [row.max_abs_error if math.isfinite(row.max_abs_error) else None for row in rows]  # JSON has no NaN
    entries = [asdict(row) | {"max_abs_error": error} for row, error in zip(rows, errors, strict=True)]
    o.report.end(ok=good, device=device, entries=entries)
    return 0 if good else 1


def demo(o: Options) -> None:
    """Show what the embedded model can do."""
    device = choose_device(o.device)
    from unilip import demo as page

    folder = Path(o.output or "demo")
    page.check_folder(folder)
    page.examples()
    options = (*(("--model", o.model) if o.model else ()), *(word for one in o.adapter for word in ("--adapter", one)))
    if o.learn and options:
        raise UniLIPError(f"--learn teaches the embedded model; leave {options[0]} out.")
    if o.learn:
        from unilip.adapters import library

        library()  # complains before anything is loaded
    model = load(o)
    loaded = o.report.loaded()
    say(f"{describe_model(o, model)['model']} on {device}, {loaded}")
    result = page.run(model, folder, o.seed, say, source=options, loaded=loaded, learn=o.learn)
    o.report.line(folder / page.PAGE)
    o.report.end("the page is ready", **describe_model(o, model), **result)
