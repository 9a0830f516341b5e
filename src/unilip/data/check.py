"""Inspect a data set before training: every sample is counted, as many as asked for are read.

In: a place that training reads. Out: a report of plain values, and a contact sheet of samples spread evenly over it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from unilip.data.records import KINDS, Record, Source, Unreadable, clean_text, decode_picture, one_text, read_turns
from unilip.pictures import contact_sheet, fit_picture

Progress = Callable[[int, int], None]  # told samples read, and to be read
SHOWN = 32  # samples on the sheet
SIDE = 144  # px of a picture there
NAMED = 20  # bad samples that are named


@dataclass
class Report:
    """What was found. Sizes are (least, median, greatest); `skipped` counts what training would skip, by reason."""

    location: str
    shards: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    read: int = 0
    bad: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    shorter_side: tuple[int, int, int] | None = None
    aspect: tuple[float, float, float] | None = None
    kilobytes: tuple[int, int, int] | None = None
    characters: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    repeated_texts: int = 0

    def lines(self) -> list[str]:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items() if count)
        found = [f"{self.location}: {f'{self.shards} shards; ' if self.shards > 1 else ''}{counts}"]
        found += [f"damaged: {fault}" for fault in self.damaged]
        found += [f"note: {note}" for note in self.notes]
        found.append(f"read {self.read:,} samples, of which {self.bad:,} cannot be used")
        found += [f"  {reason}: {count:,}" for reason, count in self.skipped.items()]
        found += [f"    {name}" for name in self.named]
        found += [f"  left out, {reason}: {count:,}" for reason, count in self.left_out.items()]
        measured = {"shorter side": self.shorter_side, "width / height": self.aspect, "file": self.kilobytes}
        units = {"shorter side": " px", "file": " kB"}
        for what, sizes in measured.items():
            if sizes is not None:
                found.append(f"{what}: {sizes[0]:g} to {sizes[2]:g}{units.get(what, '')}, median {sizes[1]:g}")
        for what, (low, middle, high) in self.characters.items():
            found.append(f"{what}: {low} to {high} characters, median {middle}")
        if self.repeated_texts:
            found.append(f"repeated texts: {self.repeated_texts:,}")
        return found


def check(
    source: Source, samples: int | None = 1000, longest: int = 1000, progress: Progress = lambda done, total: None
) -> tuple[Report, Image.Image | None]:
    """Count everything, read `samples` of each kind (None: all) spread evenly over it, and draw some on a sheet.

    Texts of more than LONGEST characters count as left out by training.
    """
    counts = {kind: int(sum(source.counts(kind))) for kind in KINDS}
    report = Report(source.location, len(source.counts("image")), counts, list(source.faults), list(source.notes))
    kinds = [kind for kind in KINDS if counts[kind] and kind != "image"] or ["image"]
    if kinds == ["image"]:
        report.notes.append("no picture has a text: stages that learn a tokenizer can use them, others cannot")
    chosen: dict[str, Sequence[int]] = {kind: range(counts[kind]) for kind in kinds}
    for kind, numbers in chosen.items():
        if samples is not None and samples < len(numbers):
            chosen[kind] = sorted({int(i) for i in np.linspace(0, len(numbers) - 1, samples)})  # evenly apart
    total = sum(map(len, chosen.values()))
    sizes: list[tuple[int, int]] = []
    weights: list[int] = []
    lengths: dict[str, list[int]] = {}
    skipped, left_out, seen = Counter[str](), Counter[str](), set[int]()
    shown: list[tuple[Image.Image, str]] = []
    for kind, numbers in chosen.items():
        wanted = {numbers[int(i)] for i in np.linspace(0, len(numbers) - 1, SHOWN // len(kinds))}
        ends = np.cumsum(source.counts(kind))
        for number in numbers:
            shard = int(np.searchsorted(ends, number, side="right"))
            place = number - int(ends[shard - 1] if shard else 0)
            report.read += 1
            progress(report.read, total)
            name = f"{source.location}, shard {shard}, sample {place}"
            try:
                record = one_text(source.read(kind, shard, place), place)
                name = record.name
                pictures = [decode_picture(data) for data in record.pictures]
                what, text = _said(record, kind, longest)
            except Unreadable as error:
                (left_out if error.left_out else skipped)[error.reason] += 1
                report.bad += not error.left_out
                if len(report.named) < NAMED and not error.left_out:
                    report.named.append(str(error) if name in str(error) else f"{name}: {error}")
                continue
            sizes += [picture.size for picture in pictures]
            weights += [len(data) for data in record.pictures]
            if text:
                lengths.setdefault(what, []).append(len(text))
                report.repeated_texts += hash(text) in seen
                seen.add(hash(text))
            if number in wanted and pictures:
                shown.append((_row(pictures), text or record.name.rpartition("/")[2]))
    report.skipped, report.left_out = dict(skipped.most_common()), dict(left_out.most_common())
    if sizes:
        report.shorter_side = _three([min(size) for size in sizes])
        low, middle, high = np.quantile([w / h for w, h in sizes], [0, 0.5, 1])
        report.aspect = round(float(low), 2), round(float(middle), 2), round(float(high), 2)
        report.kilobytes = _three([max(1, round(weight / 1000)) for weight in weights])
    report.characters = {what: _three(values) for what, values in lengths.items()}
    sheet = contact_sheet([image for image, _ in shown], 4, [text[:90] for _, text in shown]) if shown else None
    return report, sheet


def _said(record: Record, kind: str, longest: int) -> tuple[str, str]:
    if kind == "image":
        return "", ""
    if kind in ("talk", "text"):
        return "conversation", "\n".join(word for turn in read_turns(record.conversation) for word in turn)
    what = "instruction" if kind == "edit" else "caption"
    return what, clean_text(record.text, what, longest)


def _row(pictures: list[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (SIDE * len(pictures), SIDE), "white")
    for i, picture in enumerate(pictures):
        row.paste(fit_picture(picture, (SIDE, SIDE), "pad"), (SIDE * i, 0))
    return row


def _three(values: list[int]) -> tuple[int, int, int]:
    return min(values), int(np.median(values)), max(values)
