"""Understanding: multiple-choice and yes/no questions about pictures, in the formats that are published.

Goes in: a file or folder of questions, and a model. Comes out: answers.jsonl and scores in a run folder. Formats:

    MMBench and its kind   .tsv with index, question, A, B, ..., answer, category, image (base64, or a row's index)
    MME                    .tsv with index, question, answer (Yes or No), category, image; or its folders of .txt
    MMVP                   Questions.csv (Question, Options "(a) .. (b) ..", Correct Answer), pictures 1.jpg, 2.jpg, ...
    JSON lines             question or text, image (path or base64), answer or label, options (list or object) or none

An answer that cannot be read is wrong, and counted. For MM-Vet, MMMU, SEED and AI2D use VLMEvalKit or lmms-eval.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from unilip.checkpoints.hub import Source
from unilip.errors import UniLIPError
from unilip.eval.pictures import SUFFIXES
from unilip.eval.runs import RunFolder, batches, model_hash
from unilip.eval.scores import Rule, write_scores
from unilip.files import file_hash, read_json, read_lines, write_lines
from unilip.machine import Place
from unilip.model import UniLIP
from unilip.pictures import load_image

log = logging.getLogger(__name__)

LETTERS = "ABCDEFGHIJ"
DIRECT = "Answer with the letter of the right option only."
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass(frozen=True)
class Asked:
    """One question: `options` is empty for yes/no; `cluster` is what is right or wrong together (image, pair)."""

    key: str
    text: str
    answer: str
    load: Callable[[], Image.Image] = field(repr=False)
    options: tuple[str, ...] = ()
    category: str = "all"
    cluster: str = ""

    @property
    def prompt(self) -> str:
        """What the model is told."""
        if not self.options:
            return self.text
        listed = "\n".join(f"{LETTERS[n]}. {option}" for n, option in enumerate(self.options))
        return f"{self.text}\n{listed}\n{DIRECT}"


@dataclass(frozen=True)
class Sheet:
    """The questions of a file; `kind` is "choice", "yes_no", "mme" or "mmvp"."""

    kind: str
    questions: tuple[Asked, ...]
    sha256: str


# --- reading files --------------------------------------------------------------------------------------------------


def open_questions(path: str | Path, images: str | Path | None = None) -> Sheet:
    """Read a file or folder of questions; the format follows from its ending and columns.

    Args:
        images: the folder that image paths are relative to; that of the file by default.

    Raises:
        UniLIPError: no such file, an unknown format, or a question without picture or answer.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UniLIPError(f"There are no questions at {path}; give a .tsv, .jsonl or Questions.csv, or MME's folder.")
    folder = Path(images).expanduser() if images else (path if path.is_dir() else path.parent)
    if path.is_dir():
        sheet = _of_mme_folder(path)
    elif path.suffix == ".tsv":
        sheet = _of_table(_table(path, "\t"), path, folder)
    elif path.suffix == ".csv":
        sheet = _of_mmvp(_table(path, ","), path, folder)
    elif path.suffix in (".jsonl", ".json"):
        rows = read_json(path, "file of questions") if path.suffix == ".json" else read_lines(path, "file of questions")
        if not isinstance(rows, list):
            raise UniLIPError(f"{path} is not a list of questions; give one object for each.")
        sheet = _of_table([_flatten(row) for row in rows], path, folder)
    else:
        raise UniLIPError(f"{path} has an unknown ending; allowed: .tsv, .jsonl, .json, .csv (MMVP), or MME's folder.")
    if not sheet.questions:
        raise UniLIPError(f"{path} holds no questions.")
    keys = [asked.key for asked in sheet.questions]
    if len(set(keys)) != len(keys):
        twice = next(key for n, key in enumerate(keys) if key in keys[:n])
        raise UniLIPError(f"{path} has the index {twice!r} twice; each question needs its own.")
    return sheet


def _table(path: Path, delimiter: str) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # base64 pictures are long
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter=delimiter))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UniLIPError(f"{path} cannot be read ({error}); give a UTF-8 table with a line of names.") from error
    return [{name: value for name, value in row.items() if name and value is not None} for row in rows]


def _flatten(row: Mapping[str, Any]) -> dict[str, Any]:
    flat = dict(row)
    options = flat.pop("options", flat.pop("choices", None))
    if isinstance(options, Mapping):
        options = [options[key] for key in sorted(options)]
    if isinstance(options, Sequence) and not isinstance(options, str):
        flat |= {LETTERS[n]: str(option) for n, option in enumerate(options[: len(LETTERS)])}
    return flat


def _of_table(rows: Sequence[Mapping[str, Any]], path: Path, folder: Path) -> Sheet:
    by_index = {str(row.get("index")): row for row in rows if "index" in row}
    found = []
    for number, row in enumerate(rows):
        key = str(row.get("index", row.get("question_id", row.get("id", number))))
        text = _first(row, ("question", "text", "prompt"), path, key)
        answer = str(_first(row, ("answer", "label", "gt_answer"), path, key)).strip()
        options = tuple(
            str(row[letter]) for letter in LETTERS if row.get(letter) not in (None, "") and str(row[letter]) != "nan"
        )
        if options:
            if answer.isdigit() and int(answer) < len(options):
                answer = LETTERS[int(answer)]
            answer = answer.strip("()").upper()
            if answer not in LETTERS[: len(options)]:
                raise UniLIPError(f"{path}, {key}: the answer is {answer!r}, but there are {len(options)} options.")
        elif answer.lower() not in ("yes", "no"):
            raise UniLIPError(f"{path}, {key}: there are no options, and the answer is {answer!r}, not yes or no.")
        hint = row.get("hint")
        hinted = f"{hint}\n{text}" if hint and str(hint) != "nan" else text
        load, picture = _picture(row, by_index, path, folder, key)
        category = str(row.get("category") or row.get("type") or "all")
        found.append(Asked(key, hinted, answer, load, options, category, picture))
    if found and not found[0].options:
        clusters: dict[tuple[str, str], int] = {}
        for asked in found:
            clusters[asked.category, asked.cluster] = clusters.get((asked.category, asked.cluster), 0) + 1
        mme = {asked.category for asked in found} <= {*PERCEPTION, *COGNITION} and set(clusters.values()) == {2}
        if mme:
            return Sheet("mme", tuple(found), file_hash(path))
    kinds = {bool(asked.options) for asked in found}
    if len(kinds) > 1:
        raise UniLIPError(f"{path} mixes questions with options and without; give them as two files.")
    return Sheet("choice" if kinds == {True} else "yes_no", tuple(found), file_hash(path))


def _first(row: Mapping[str, Any], names: Sequence[str], path: Path, key: str) -> Any:
    for name in names:
        if row.get(name) not in (None, ""):
            return row[name]
    raise UniLIPError(f"{path}, {key} has no {' or '.join(names)}; is this a file of questions with answers?")


def _picture(
    row: Mapping[str, Any], by_index: Mapping[str, Mapping[str, Any]], path: Path, folder: Path, key: str
) -> tuple[Callable[[], Image.Image], str]:
    """Return a loader of a row's picture, and a name that is the same for rows of the same picture."""
    value = row.get("image") or row.get("image_path") or row.get("img")
    for _ in range(3):  # MMBench names another row's index where the picture is the same
        if isinstance(value, str) and value in by_index and len(value) < 20:
            value = by_index[value].get("image")
    if not isinstance(value, str) or not value:
        raise UniLIPError(f"{path}, {key} has no image; give base64, a path, or the index of another row.")
    if len(value) < 300 and Path(value).suffix.lower() in SUFFIXES:
        file = folder / value
        if not file.is_file():
            raise UniLIPError(f"{path}, {key}: there is no picture {file}; give its folder as --images.")
        return lambda: load_image(file), value
    try:
        data = base64.b64decode(value.removeprefix("data:").split("base64,")[-1], validate=True)
    except (binascii.Error, ValueError):
        raise UniLIPError(f"{path}, {key}: the image is neither base64 nor a path of a picture.") from None
    return lambda: load_image(Image.open(io.BytesIO(data))), hashlib.sha256(data).hexdigest()[:16]


def _of_mmvp(rows: Sequence[Mapping[str, str]], path: Path, folder: Path) -> Sheet:
    needed = ("Question", "Options", "Correct Answer")
    missing = [name for name in needed if rows and name not in rows[0]]
    if missing:
        raise UniLIPError(f"{path} has no column {', '.join(missing)}; a .csv is read as MMVP's Questions.csv.")
    places = [folder, folder / "MMVP Images"]
    found = []
    for n, row in enumerate(rows, 1):
        options = tuple(text.strip() for text in re.split(r"\([a-z]\)", row["Options"]) if text.strip())
        letter = row["Correct Answer"].strip().strip("()").upper()
        if letter not in LETTERS[: len(options)] or not letter:
            raise UniLIPError(f"{path}, row {n}: the answer {letter!r} is none of {len(options)} options.")
        file = next((p / f"{n}{s}" for p in places for s in (".jpg", ".png") if (p / f"{n}{s}").is_file()), None)
        if file is None:
            raise UniLIPError(f"{path}, row {n}: there is no picture {n}.jpg in {folder}; give its folder as --images.")
        load = (lambda f: lambda: load_image(f))(file)
        found.append(Asked(str(n), row["Question"], letter, load, options, "all", f"pair {(n + 1) // 2}"))
    if len(found) % 2:
        raise UniLIPError(f"{path} has {len(found)} rows; MMVP's come in pairs.")
    return Sheet("mmvp", tuple(found), file_hash(path))


def _of_mme_folder(path: Path) -> Sheet:
    digest = hashlib.sha256()
    found = []
    for task in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        texts = task / "questions_answers_YN" if (task / "questions_answers_YN").is_dir() else task
        pictures = task / "images" if (task / "images").is_dir() else task
        for file in sorted(texts.glob("*.txt")):
            digest.update(f"{task.name}/{file.name}\0{file_hash(file)}\n".encode())
            beside = [pictures / f"{file.stem}{suffix}" for suffix in SUFFIXES]
            picture = next((place for place in beside if place.is_file()), None)
            if picture is None:
                raise UniLIPError(f"There is no picture for {file} in {pictures}; MME keeps both under one name.")
            for n, line in enumerate(line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()):
                question, _, answer = line.rpartition("\t")
                if not question or answer.strip().lower() not in ("yes", "no"):
                    raise UniLIPError(f"{file}, line {n + 1} is not a question, a tab, and Yes or No.")
                load = (lambda f: lambda: load_image(f))(picture)
                key = f"{task.name}/{file.stem}"
                found.append(Asked(f"{key}/{n}", question.strip(), answer.strip(), load, (), task.name, key))
    return Sheet("mme", tuple(found), digest.hexdigest())


# --- answers --------------------------------------------------------------------------------------------------------


def read_choice(answer: str, options: Sequence[str]) -> str | None:
    """Return the letter that an answer chooses; None if it cannot be told."""
    letters = LETTERS[: len(options)]
    text = answer.strip()
    found = re.match(rf"\W*([{letters}])(?:[).:,*\]]|\s*$)", text) or re.match(
        rf"\(?([{letters.lower()}])[).]?\s*$", text
    )
    if found:
        return found[1].upper()
    said = re.findall(rf"(?:answer|option|choice)(?: is|:)?\s*\(?([{letters}])\b", text, re.IGNORECASE)
    if len({letter.upper() for letter in said}) == 1:
        return str(said[0]).upper()
    bare = _bare(text)
    named = [letters[n] for n, option in enumerate(options) if _bare(option) == bare]
    named = named or [
        letters[n] for n, option in enumerate(options) if re.search(rf"\b{re.escape(_bare(option))}\b", bare)
    ]
    if named:  # before a letter in front of words, which may be the article of "A dog"
        return named[0] if len(named) == 1 else None
    found = re.match(rf"([{letters}])\s", text)
    return found[1] if found and found[1] != "A" else None


def read_verdict(answer: str) -> str | None:
    """Return "yes" or "no" as an answer begins with it, or holds only one of them; None if it cannot be told."""
    found = re.match(r"\W*(yes|no)\b", answer, re.IGNORECASE)
    if found:
        return found[1].lower()
    words = {word.lower() for word in re.findall(r"\b(yes|no)\b", answer, re.IGNORECASE)}
    return words.pop() if len(words) == 1 else None


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"[^\w\s]", " ", text.lower())).strip()


def rotate(asked: Asked) -> list[Asked]:
    """Return a question with its options in every rotation: circular evaluation asks all of them."""
    count = len(asked.options)
    right = LETTERS.index(asked.answer)
    return [
        replace(
            asked,
            key=f"{asked.key}/{turn}",
            options=asked.options[turn:] + asked.options[:turn],
            answer=LETTERS[(right - turn) % count],
            cluster=asked.key,
        )
        for turn in range(count)
    ]


# --- the run --------------------------------------------------------------------------------------------------------


def evaluate(
    sheet: Sheet,
    output: Path,
    source: Source = None,
    *,
    name: str = "questions",
    circular: bool = False,
    count: int | None = None,
    max_tiles: int = 1,
    max_new_tokens: int = 16,
    batch_size: int = 8,
    device: str = "cpu",
    dtype: str | None = None,
    place: Place | None = None,
    progress: bool = False,
) -> list[dict[str, Any]] | None:
    """Ask a model all questions and score the answers; returns the summaries, or None where the rank is not 0.

    Args:
        name: of the questions, for people.
        circular: choices only: a question is right if it is in every rotation of its options.
        count: only the first so many questions.
        max_tiles, max_new_tokens: of `UniLIP.ask`.

    Raises:
        UniLIPError: circular for other questions, or another run's folder.
    """
    place = place or Place.of_environment()
    questions = list(sheet.questions[:count])
    if circular:
        if sheet.kind != "choice":
            raise UniLIPError(f"--circular turns options round; questions of the kind {sheet.kind} have none to turn.")
        questions = [turned for asked in questions for turned in rotate(asked)]
    identity = {
        "task": "understand",
        "protocol": f"{sheet.kind}{' circular' if circular else ''}",
        "prompts": {"sha256": sheet.sha256, "published": None, "count": len(sheet.questions)},
        "model": model_hash(source),
        "settings": {"max_tiles": max_tiles, "max_new_tokens": max_new_tokens, "dtype": dtype or "float32"},
    }
    named = "embedded" if source is None else str(source)
    with RunFolder(output, identity, place, named) as folder:
        said = _stored(output)
        work = [
            left
            for _, batch in batches(questions, batch_size, place)
            if (left := [q for q in batch if q.key not in said])
        ]
        if work:
            model = UniLIP.from_pretrained(source, device=device, dtype=dtype or "float32", parts=("encoder", "mllm"))
            total = len(questions)
            with tqdm(total=total, initial=len(said), desc="understand", unit="question", disable=not progress) as bar:
                for left in work:
                    pictures, prompts = [q.load() for q in left], [q.prompt for q in left]
                    answers = model.ask(pictures, prompts, max_new_tokens=max_new_tokens, max_tiles=max_tiles)
                    rows = [{"key": q.key, "answer": a} for q, a in zip(left, answers, strict=True)]
                    tag = file_tag(left[0].key)
                    folder.commit(f"part-{tag}", {f"parts/{tag}.jsonl": _lines(rows)})
                    bar.update(len(left))
        if place.rank:
            return None
        while any(q.key not in said for q in questions):  # what other processes still answer
            said = _stored(output)
            if place.world > 1:
                time.sleep(0.5)
        return _score(sheet, questions, said, output, identity, named, name, circular)


def file_tag(key: str) -> str:
    """Return a file name for a batch that begins with this key."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _stored(output: Path) -> dict[str, str]:
    files = sorted((output / "parts").glob("*.jsonl"))
    return {row["key"]: row["answer"] for file in files for row in read_lines(file, "answers")}


def _score(
    sheet: Sheet, questions: Sequence[Asked], said: Mapping[str, str], output: Path, identity: Mapping[str, Any],
    named: str, name: str, circular: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    table = []
    for asked in questions:
        answer = said[asked.key]
        read = read_choice(answer, asked.options) if asked.options else read_verdict(answer)
        right = read is not None and read.lower() == asked.answer.lower()
        table.append({
            "key": asked.key, "cluster": asked.cluster or asked.key, "category": asked.category, 
            "question": asked.prompt,
            "answer": answer, "read": read, "truth": asked.answer, "right": right,
        })  # fmt: skip
    write_lines(output / "answers.jsonl", table)
    about: dict[str, Any] = {
        "task": f"understand {name}", "protocol": identity["protocol"], "scorer": "built-in reading of answers",
        "model": named, "model_hash": identity["model"], "settings": identity["settings"],
        "prompts": identity["prompts"], "prompts_scored": len({q.key.rsplit("/", 1)[0] for q in questions}) if circular
        else len(questions), "counted_wrong": sum(row["read"] is None for row in table),
    }  # fmt: skip
    if sheet.kind == "yes_no":
        about["whole"] = _yes_no(table)
    paired = sheet.kind in ("mme", "mmvp") or circular
    rows = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        cluster = f"{row['category']}/{row['cluster']}" if paired else str(row["key"])
        groups.setdefault(cluster, []).append(row)
    for cluster, members in groups.items():
        share, whole = sum(m["right"] for m in members) / len(members), float(all(m["right"] for m in members))
        scores = {"accuracy": share}
        if paired:
            scores = {"mme": {"accuracy_plus": whole}, "mmvp": {"pair_accuracy": whole}}.get(
                sheet.kind, {"circular_accuracy": whole}
            ) | {"accuracy": share}
        rows.append({
            "key": cluster, "cluster": cluster, "group": members[0]["category"], "split": "", "picture": None,
            "status": "ok", "scores": scores,
        })  # fmt: skip
    found = [write_scores(output, "understand", rows, Rule(), about)]
    if sheet.kind == "mme":
        for part, tasks in (("perception", PERCEPTION), ("cognition", COGNITION)):
            own = [row for row in rows if row["group"] in tasks]
            if own:
                points = [
                    {
                        **row,
                        "scores": {f"mme_{part}": 100 * (row["scores"]["accuracy"] + row["scores"]["accuracy_plus"])},
                    }
                    for row in own
                ]
                told = {**about, "protocol": f"mme {part}, sum of {len({row['group'] for row in own})} tasks"}
                found.append(write_scores(output, f"mme-{part}", points, Rule("sum"), told))
    return found


def _yes_no(table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return precision, recall and F1 of "yes", and how often yes was said."""
    said = [row["read"] == "yes" for row in table]
    true = [row["truth"].lower() == "yes" for row in table]
    both = sum(s and t for s, t in zip(said, true, strict=True))
    precision, recall = both / max(1, sum(said)), both / max(1, sum(true))
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1, "yes_share": sum(said) / len(table)}
