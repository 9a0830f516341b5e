"""What a judge is asked about each picture, and how its answers become scores.

The wording is ours (RUBRIC) or, for WISE, ImgEdit and GEdit, read from the authors' own file on this machine; which of
them is part of a score's name. The rules of counting are the authors' (docstrings).
"""

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from unilip.errors import UniLIPError
from unilip.eval.benchmarks import Benchmark, Item
from unilip.eval.pictures import decode
from unilip.eval.scores import Row
from unilip.eval.vlm import STATUSES, Answer, Question
from unilip.files import file_hash, png_bytes, read_json, read_table
from unilip.pictures import open_picture

RUBRIC = "unilip-1"  # of our wording; raised when a word of it changes

KNOWN: dict[str, Any] = read_table("unilip.eval", "rubrics.json")
OFFICIAL: dict[str, list[str]] = KNOWN["official"]  # SHA-256 of the authors' files that hold their wording
PLACES: dict[str, dict[str, str]] = KNOWN["places"]  # where these lie in a checkout, by benchmark and protocol
WORDING: dict[str, str] = KNOWN["wording"]  # ours


@dataclass(frozen=True)
class Rubric:
    """The wording of questions: its name, and texts by what they are for."""

    name: str = RUBRIC
    texts: Mapping[str, str] = field(default_factory=dict)


def read_rubric(name: str, protocol: str, path: str | Path | None) -> Rubric:
    """Read the wording from the authors' file, parsed and never run, or checkout. Raises UniLIPError: it has none."""
    if path is None:
        return Rubric()
    if name not in PLACES:
        raise UniLIPError(f"{name} has no rubric file; leave --rubric out. Those with one: {', '.join(PLACES)}.")
    file = Path(path).expanduser()
    inside = PLACES[name][protocol]
    file = file / inside if file.is_dir() else file
    if not file.is_file():
        raise UniLIPError(f"There is no rubric {file}; give {Path(inside).name} of the authors, or their checkout.")
    digest = file_hash(file)
    known = OFFICIAL.get(digest)
    if known is not None and (known[0] != name or known[1] not in ("", protocol)):
        raise UniLIPError(f"{file} is the rubric of {' '.join(known)}, not of {name} {protocol}; give that one.")
    try:
        texts = _RUBRICS[name](file)
    except (SyntaxError, KeyError, ValueError, AttributeError) as error:
        raise UniLIPError(f"The wording is not found in {file} ({error}); give {Path(inside).name} itself.") from error
    return Rubric(f"{'official' if known else 'file'} {digest[:8]}", texts)


def _wise_rubric(file: Path) -> dict[str, str]:
    functions = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    asking = [node for node in functions if node.name == "build_evaluation_messages"]
    if not asking:
        raise ValueError("there is no function build_evaluation_messages")
    dicts = [node for node in ast.walk(asking[0]) if isinstance(node, ast.Dict)]
    pairs = [pair for node in dicts for pair in zip(node.keys, node.values, strict=True)]
    texts = [_template(value) for key, value in pairs if isinstance(key, ast.Constant) and key.value == "text"]
    systems, questions = ([text for text in texts if ("{Prompt}" in text) == asks] for asks in (False, True))
    if len(systems) != 1 or len(questions) != 1:
        raise ValueError(f"{len(systems)} texts without and {len(questions)} with the prompt, one of each expected")
    return {"system": systems[0], "question": questions[0]}


def _template(node: ast.expr) -> str:
    """Turn a constant or an f-string over prompt_data into a text with {Prompt} and {Explanation}."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    if not isinstance(node, ast.FormattedValue):  # which a JoinedStr alone holds
        raise ValueError("a text is neither a constant nor an f-string")
    found = re.fullmatch(r"prompt_data\['(Prompt|Explanation)'\]", ast.unparse(node.value))
    if not found:
        raise ValueError("an f-string asks for something unknown")
    return "{" + found[1] + "}"


def _imgedit_rubric(file: Path) -> dict[str, str]:
    texts = read_json(file, "rubric")
    if not isinstance(texts, dict) or not all(isinstance(t, str) and "<edit_prompt>" in t for t in texts.values()):
        raise ValueError("it is not an object of texts with <edit_prompt>")
    return texts


def _gedit_rubric(file: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            found[ast.unparse(node.targets[0])] = str(node.value.value)
    names = {"semantics": ("two_image_edit_rule", "tie_rule_SC"), "quality": ("rule_PQ",)}
    told = {kind: [found[f"_prompts_0shot_{name}"] for name in parts] for kind, parts in names.items()}
    return {kind: "\n".join([found["_context_no_delimit"], *texts]) for kind, texts in told.items()}


_RUBRICS = {"wise": _wise_rubric, "imgedit": _imgedit_rubric, "gedit": _gedit_rubric}


def read_wise_verified(text: str) -> float | None:
    """Read "Score: 0" or "Score: 1", or a bare 0 or 1 on a line."""
    found = re.findall(r"\bscore\*{0,2}\s*[:：]?\s*\*{0,2}\s*([01])\b(?!\s*or\b|[./\d])", text, re.IGNORECASE)
    found = found or re.findall(r"(?m)^\s*([01])\s*$", text)
    return float(found[0]) if len(set(found)) == 1 else None


def read_wise_legacy(text: str) -> dict[str, float] | None:
    """Read consistency, realism and aesthetic quality, 0 to 2 each."""
    out = {}
    for name in ("consistency", "realism", "aesthetic quality"):
        found = re.findall(rf"{name}\*{{0,2}}\s*[:：]?\s*\*{{0,2}}\s*([0-2])\b(?![.\d])", text, re.IGNORECASE)
        if len(set(found)) != 1:
            return None
        out[name.replace(" ", "_")] = float(found[0])
    return out


def read_imgedit(text: str) -> list[float] | None:
    """Read three lines "Name: N" with N from 1 to 5."""
    found = re.findall(r"(?m)^\W*[A-Za-z][A-Za-z &]*\W{0,3}:\W{0,3}([1-5])(?:\s*/\s*5)?\W*$", text)
    return [float(score) for score in found] if len(found) == 3 else None


def read_viescore(text: str) -> float | None:
    """Read the least of the scores (0 to 10) in {"score": [a, b]}; there must be two."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        given = json.loads(found[0] if found else "{}")["score"]
        values = [float(score) for score in given] if isinstance(given, list) else []
    except (ValueError, TypeError, KeyError):
        listed = re.search(r'"score"\s*:\s*\[\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*\]', text)
        values = [float(score) for score in listed.groups()] if listed else []
    return min(values) if len(values) == 2 and all(0 <= value <= 10 for value in values) else None


def _fill(text: str, values: Mapping[str, Any]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: str(values[found[1]]) if found[1] in values else found[0], text)


def _ask_wise(benchmark: Benchmark, rubric: Rubric, item: Item, picture: Path) -> list[Question]:
    verified = benchmark.protocol == "verified"
    text = _fill(rubric.texts.get("question", WORDING[f"wise {benchmark.protocol}"]), item.data)
    system = rubric.texts.get("system", WORDING["wise system"])
    read, most = (read_wise_verified, 500) if verified else (read_wise_legacy, 2000)
    return [Question(item.key, (text, picture.read_bytes()), read, system, most)]


def _ask_imgedit(benchmark: Benchmark, rubric: Rubric, item: Item, picture: Path) -> list[Question]:
    kind = item.data["edit_type"]
    if rubric.texts and kind not in rubric.texts:
        raise UniLIPError(f"The rubric has nothing for edits of the kind {kind!r}; it has {', '.join(rubric.texts)}.")
    own = _fill(WORDING["imgedit"], {"edit_type": kind, "prompt": item.prompt})
    text = rubric.texts[kind].replace("<edit_prompt>", item.prompt) if rubric.texts else own
    assert benchmark.source is not None, "imgedit has sources"
    source = png_bytes(benchmark.source(item).convert("RGB"))
    return [Question(item.key, (text, source, picture.read_bytes()), read_imgedit, max_tokens=1024)]


def _ask_gedit(benchmark: Benchmark, rubric: Rubric, item: Item, picture: Path) -> list[Question]:
    texts = rubric.texts or {name: WORDING[f"gedit {name}"] for name in ("semantics", "quality")}
    source = picture.with_name(f"{picture.stem}_SRCIMG.png").read_bytes()
    made = decode(picture.read_bytes(), str(picture))
    result = png_bytes(made.resize(open_picture(source).size, Image.Resampling.BICUBIC))  # as the authors' scorer does
    follow = texts["semantics"].replace("<instruction>", item.prompt)
    return [
        Question(f"{item.key}/semantics", (follow, source, result), read_viescore, max_tokens=1400),
        Question(f"{item.key}/quality", (texts["quality"], result), read_viescore, max_tokens=1400),
    ]


def _score_wise(values: Sequence[Any]) -> dict[str, float]:
    """verified: 0 or 1. legacy: (0.7 consistency + 0.2 realism + 0.1 aesthetic quality) / 2."""
    (value,) = values
    if isinstance(value, float):
        return {"wiscore": value}
    return {"wiscore": (0.7 * value["consistency"] + 0.2 * value["realism"] + 0.1 * value["aesthetic_quality"]) / 2}


def _score_gedit(values: Sequence[Any]) -> dict[str, float]:
    """Semantics and quality are each the lesser of two scores; overall is the root of their product."""
    semantics, quality = values
    return {"overall": math.sqrt(semantics * quality), "semantics": semantics, "quality": quality}


Asker = Callable[[Benchmark, Rubric, Item, Path], list[Question]]
# What is asked about a picture, and how the values that were read come to scores; the rest has the authors' programs.
JUDGED: dict[str, tuple[Asker, Callable[[Sequence[Any]], dict[str, float]]]] = {
    "wise": (_ask_wise, _score_wise),
    "imgedit": (_ask_imgedit, lambda values: {"score": round(sum(values[0]) / 3, 2)}),
    "gedit": (_ask_gedit, _score_gedit),
}


def judged_row(benchmark: Benchmark, item: Item, answers: Sequence[Answer]) -> Row:
    """Return what the answers about an item come to: scores only if every one could be read."""
    status = max((answer.status for answer in answers), key=STATUSES.index)
    values = [answer.value for answer in answers]
    said = [{"text": a.text, "status": a.status, "reason": a.reason} for a in answers]
    parts = {name: [points, 1] for value in values if isinstance(value, dict) for name, points in value.items()}
    scores = JUDGED[benchmark.name][1](values) if status == "ok" else None
    return item.row(scores, status, answers=said, **({"parts": parts} if parts and scores else {}))
