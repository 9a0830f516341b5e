"""Published prompt files -> items: what to draw or edit, and the file name under which the official scorer reads it.

In: a prompt file as its authors published it (none is in this package), known by its SHA-256, and a protocol:

    geneval   evaluation_metadata.jsonl     images/<00000>/metadata.jsonl, images/<00000>/samples/<0000>.png
    geneval2  geneval2_data.jsonl           images/<0000>.png, images.json {prompt: path}
    dpg       folder of <name>.txt          images/<name>.png, four pictures tiled two by two
    wise      three JSON files, or merged   images/<prompt_id>.png
    imgedit   basic_edit.json, pictures     images/<key>.png
    gedit     Parquet or saved dataset      images/fullset/<task>/<en|cn>/<key>.png and <key>_SRCIMG.png
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from unilip.errors import PromptError, UniLIPError, check_choice
from unilip.eval.pictures import cell, decode, open_dataset
from unilip.eval.runs import PICTURES
from unilip.eval.scores import Row, Rule, make_row
from unilip.files import content_hash, file_hash, read_json, read_lines, read_table, read_text
from unilip.sampling import check_prompt

# What the authors published: hashes, homes, protocols, and the groups of WISE by protocol (first and last prompt id,
# weight in the overall score, category in the files).
KNOWN: dict[str, Any] = read_table("unilip.eval", "benchmarks.json")
PUBLISHED: dict[str, Sequence[str]] = KNOWN["published"]  # SHA-256 -> benchmark, protocol or "", what it is
HOMES: dict[str, str] = KNOWN["homes"]
NO_NAME = re.compile(r"[\\\0\ud800-\udc7f\udd00-\udfff]")  # characters that no file's name has on every system
PROTOCOLS: dict[str, list[str]] = KNOWN["protocols"]


@dataclass(frozen=True)
class Item:
    """One picture file to make."""

    key: str  # unique in the benchmark, seeds the noise
    prompt: str
    path: str  # in the run folder
    group: str  # the row of the table
    cluster: str  # shared by items of one prompt, for intervals
    pictures: int = 1  # drawn for this file; four are tiled two by two
    data: Mapping[str, Any] = field(default_factory=dict)  # what scoring needs of the prompt file
    split: str = ""  # what is never averaged with another split (languages)

    def row(self, scores: Mapping[str, float] | None, status: str, **more: Any) -> Row:
        about = {"cluster": self.cluster, "group": self.group, "split": self.split, "picture": self.path}
        return make_row(self.key, scores, **about, prompt=self.prompt, status=status, **more)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's items and how they are named."""

    name: str
    protocol: str
    items: tuple[Item, ...]
    prompts: dict[str, Any]  # what a manifest says of the file: hash, whether it is the published one, how many prompts
    rule: Rule = field(default_factory=Rule)  # of the overall score
    source: Callable[[Item], Image.Image] | None = None  # the picture that an item edits; None: words alone are drawn
    beside: Callable[[Item], dict[str, Image.Image | bytes]] = lambda item: {}  # by path, what the scorer reads as well

    @property
    def identity(self) -> dict[str, Any]:
        """What a run of it is of: task, protocol, prompts."""
        return {"task": self.name, "protocol": self.protocol, "prompts": self.prompts}

    def first(self, count: int | None) -> Benchmark:
        """Return the benchmark with its first COUNT prompts only; with all of them for None."""
        kept = set(list(dict.fromkeys(item.cluster for item in self.items))[:count])
        return replace(self, items=tuple(item for item in self.items if item.cluster in kept))


def open_benchmark(
    name: str,
    prompts: str | Path | None,
    *,
    protocol: str | None = None,
    sources: str | Path | None = None,
    own_prompts: bool = False,
) -> Benchmark:
    """Read the prompt file of a benchmark.

    In: name: one of HOMES. prompts: the published file or folder. protocol: one of PROTOCOLS[name], the first by
    default. sources: imgedit only, the folder of the pictures to edit. own_prompts: take a file whose hash is not the
    published one; every score says so.
    Raises UniLIPError: no file, a file of another format, protocol or hash, or a repeated or impossible item.
    """
    check_choice("benchmark", name, HOMES)
    protocol = protocol or PROTOCOLS[name][0]
    if protocol not in PROTOCOLS[name]:
        raise UniLIPError(f"{name} has no protocol {protocol!r}; allowed: {', '.join(PROTOCOLS[name])}.")
    if prompts is None:
        raise UniLIPError(f"{name} needs --prompts: {HOMES[name]}, on this machine. It is not part of this package.")
    path = Path(prompts).expanduser()
    if not path.exists():
        raise UniLIPError(f"There is no prompt file {path}; fetch {HOMES[name]} and give its path.")
    readers = {"geneval": _geneval, "geneval2": _geneval2, "dpg": _dpg, "wise": _wise, "gedit": _gedit}
    benchmark = _imgedit(path, protocol, sources) if name == "imgedit" else readers[name](path, protocol)
    if not benchmark.items:
        raise UniLIPError(f"{path} holds no prompt; fetch {HOMES[name]} again.")
    seen: set[str] = set()
    for item in benchmark.items:
        try:
            check_prompt(item.prompt, "prompt")
        except PromptError as error:
            raise UniLIPError(f"{path}, {item.key}: {error}") from error
        if item.path in seen:
            raise UniLIPError(f"{path} names {item.key!r} twice; each needs its own, because pictures are named so.")
        seen.add(item.path)
        parts = [part.encode("utf-8", "replace") for part in item.path.split("/")]
        if b".." in parts or max(map(len, parts)) > 240 or NO_NAME.search(item.path):
            raise UniLIPError(f"{path} has the name {item.key[:60]!r}, which leads out of the run's folder or is none.")
    if benchmark.prompts["published"] is False and not own_prompts:
        raise UniLIPError(
            f"{path} is not the published file of {name} (SHA-256 {benchmark.prompts['sha256'][:16]}...); fetch "
            f"{HOMES[name]}, or add --own-prompts, and every score will say so."
        )
    return benchmark


def _made(name: str, protocol: str, items: Sequence[Item], hashes: Sequence[str], count: int, **more: Any) -> Benchmark:
    """Return a benchmark of COUNT prompts. Raises UniLIPError: a hash is of another benchmark's or protocol's file."""
    for owner, kind, title in (PUBLISHED[digest] for digest in hashes if digest in PUBLISHED):
        if owner != name or (kind and kind != protocol):
            raise UniLIPError(
                f"The prompts given are {title} of {owner} {kind}, but {name} {protocol} was asked for; fetch "
                f"{HOMES[name]}, or give the --protocol of the file."
            )
    sha = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()
    prompts = {"sha256": sha, "published": all(digest in PUBLISHED for digest in hashes), "count": count}
    return Benchmark(name, protocol, tuple(items), prompts, **more)


def _texts(row: Mapping[str, Any], path: Path, where: object, *keys: str) -> list[str]:
    for key in keys:
        if not isinstance(value := row.get(key), str) or not value.strip():
            raise UniLIPError(f"{path}, {where}: {key!r} is {value!r}, not a text; is this the right prompt file?")
    return [row[key] for key in keys]


def _geneval(path: Path, protocol: str) -> Benchmark:
    rows = read_lines(path, "prompt file")
    items = []
    for n, row in enumerate(rows):
        prompt, tag = _texts(row, path, f"line {n + 1}", "prompt", "tag")
        if tag not in KNOWN["geneval"] or not isinstance(row.get("include"), list):
            raise UniLIPError(
                f"{path}, line {n + 1}: a prompt of GenEval has a tag ({', '.join(KNOWN['geneval'])}) and a list "
                f"'include'; found tag {tag!r}. Fetch {HOMES['geneval']}."
            )
        for sample in range(4):
            path_of = f"{PICTURES}/{n:05d}/samples/{sample:04d}.png"
            items.append(Item(f"{n:05d}/{sample:04d}", prompt, path_of, tag, f"{n:05d}", 1, row))

    def beside(item: Item) -> dict[str, Image.Image | bytes]:
        return {f"{PICTURES}/{item.cluster}/metadata.jsonl": json.dumps(dict(item.data)).encode()}

    return _made("geneval", protocol, items, [file_hash(path)], len(rows), rule=Rule("groups"), beside=beside)


def _geneval2(path: Path, protocol: str) -> Benchmark:
    rows = read_lines(path, "prompt file")
    items = []
    for n, row in enumerate(rows):
        (prompt,) = _texts(row, path, f"line {n + 1}", "prompt")
        questions, skills = (value if isinstance(value := row.get(key), list) else [] for key in ("vqa_list", "skills"))
        pairs = all(isinstance(q, list) and [*map(type, q)] == [str, str] for q in questions)
        if not questions or not pairs or len(skills) != len(questions):
            raise UniLIPError(
                f"{path}, line {n + 1}: a prompt of GenEval 2 has 'vqa_list' of [question, answer] and as many "
                f"'skills'; fetch {HOMES['geneval2']}."
            )
        group = f"{row.get('atom_count')} atoms"
        items.append(Item(f"{n:04d}", prompt, f"{PICTURES}/{n:04d}.png", group, prompt, 1, row))
    if len({item.prompt for item in items}) != len(items):
        raise UniLIPError(f"{path} has a prompt twice; the scorer of GenEval 2 finds pictures by their prompt.")
    return _made("geneval2", protocol, items, [file_hash(path)], len(rows))


def _dpg(path: Path, protocol: str) -> Benchmark:
    if not path.is_dir():
        raise UniLIPError(f"{path} is no folder; dpg reads {HOMES['dpg']}, one text file for each prompt.")
    digest = hashlib.sha256()
    items = []
    for file in sorted(path.glob("*.txt")):
        digest.update(os.fsencode(file.name) + f"\0{file_hash(file)}\n".encode())
        prompt = read_text(file, "prompt").strip()
        if "." in file.stem:
            raise UniLIPError(f"{file.name} has a dot in its name; the scorer of DPG would not find its questions.")
        items.append(Item(file.stem, prompt, f"{PICTURES}/{file.stem}.png", "all", file.stem, 4))
    return _made("dpg", protocol, items, [digest.hexdigest()], len(items))


def _wise(path: Path, protocol: str) -> Benchmark:
    files = [path] if path.is_file() else wise_files(path)
    if not files:
        raise UniLIPError(f"{path} holds no JSON file of WISE; fetch {HOMES['wise']}.")
    rows: list[dict[str, Any]] = []
    for file in files:
        value = read_json(file, "prompt file")
        if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
            raise UniLIPError(f"{file} is not a list of prompts; fetch {HOMES['wise']}.")
        rows += value
    groups: dict[str, tuple[int, int, float, str]] = KNOWN[f"wise {protocol}"]
    items = []
    for row in sorted(rows, key=lambda row: row["prompt_id"] if type(row.get("prompt_id")) is int else -1):
        number = row.get("prompt_id")
        if type(number) is not int or not 1 <= number <= 1000:
            raise UniLIPError(f"{path} has the prompt_id {number!r}; allowed: 1 to 1000.")
        group = next(name for name, (low, high, _, _) in groups.items() if low <= number <= high)
        category, prompt, _ = _texts(row, path, f"prompt_id {number}", "Category", "Prompt", "Explanation")
        if category.strip().lower() != groups[group][3]:
            other = "legacy" if protocol == "verified" else "verified"
            raise UniLIPError(
                f"{path} is not of WISE {protocol}: prompt_id {number} is {category!r}, but is {group} there. The two "
                f"protocols number their prompts differently; try --protocol {other}."
            )
        items.append(Item(str(number), prompt, f"{PICTURES}/{number}.png", group, str(number), 1, row))
    rule = Rule("groups", {name: group[2] for name, group in groups.items()})
    return _made("wise", protocol, items, [file_hash(file) for file in files], len(items), rule=rule)


def wise_files(folder: Path) -> list[Path]:
    """Return the JSON files of WISE in a folder: the three parts, and not the merged or rewritten copies."""
    return sorted(file for file in folder.glob("*.json") if file.stem != "merge" and not file.stem.endswith("_rewrite"))


def _imgedit(path: Path, protocol: str, sources: str | Path | None) -> Benchmark:
    rows = read_json(path, "prompt file")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UniLIPError(f"{path} is not an object of edits by key; fetch {HOMES['imgedit']}.")
    if sources is None:
        raise UniLIPError("imgedit needs --sources: the folder of the pictures to edit, from Benchmark.tar of ImgEdit.")
    folder = Path(sources).expanduser()
    items, names = [], []
    for key, row in rows.items():
        prompt, kind, name = _texts(row, path, key, "prompt", "edit_type", "id")
        names.append(name)
        items.append(Item(key, prompt, f"{PICTURES}/{key}.png", kind, key, 1, row))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UniLIPError(
            f"{len(missing)} of {len(items)} pictures are not in {folder}, the first is {missing[0]}; give the folder "
            "that holds animal/, style/ and so on as --sources."
        )

    def source(item: Item) -> Image.Image:
        file = folder / item.data["id"]
        return decode(file.read_bytes(), str(file))

    made = _made("imgedit", protocol, items, [file_hash(path)], len(items), source=source)
    made.prompts["sources"] = content_hash({name: file_hash(folder / name) for name in set(names)})
    return made


def _gedit(path: Path, protocol: str) -> Benchmark:
    columns = ["task_type", "instruction_language", "key", "instruction", "Intersection_exist"]
    data, pictured, files = open_dataset(path, "input_image")
    if lacking := [name for name in columns if name not in data.column_names]:
        raise UniLIPError(f"{path} has no column {', '.join(lacking)}; fetch {HOMES['gedit']}.")
    rows = data.select_columns(columns).to_list()
    digest = hashlib.sha256("".join(file_hash(file) for file in files).encode()).hexdigest()
    items = []
    for n, row in enumerate(rows):
        task, language, key, prompt = _texts(row, path, f"row {n}", *columns[:4])
        if task not in KNOWN["gedit"] or language not in ("en", "cn"):
            raise UniLIPError(f"{path}, row {n}: task {task!r} in {language!r} is no GEdit; fetch {HOMES['gedit']}.")
        where = f"{task}/{language}/{key}"
        place = f"{PICTURES}/fullset/{where}.png"
        items.append(Item(where, prompt, place, task, f"{language}/{key}", 1, {"row": n}, language))

    def source(item: Item) -> Image.Image:
        name = f"{path}, row {item.data['row']}"
        return decode(cell(data[item.data["row"]][pictured], name), name)

    def beside(item: Item) -> dict[str, Image.Image | bytes]:
        return {item.path.removesuffix(".png") + "_SRCIMG.png": source(item)}

    made = _made("gedit", protocol, items, [digest], len(items), rule=Rule("groups"), source=source, beside=beside)
    made.prompts["published"] = None
    return made
