"""Tiny prompt files in the published formats, and a judge that can misbehave, for the tests of evaluation."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position", "prompt": "a photo of a dog right of a cat",
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}],
    },
]  # fmt: skip
GENEVAL2 = [
    {
        "prompt": "two metal toys", "atom_count": 3, "skills": ["count", "attribute", "object"],
        "vqa_list": [
            ["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"],
            ["Are there any toys in the image?", "Yes"],
        ],
    },
    {
        "prompt": "a pig", "atom_count": 1, "skills": ["count", "object"],
        "vqa_list": [["How many pigs are in the image?", "one"], ["Are there any pigs in the image?", "Yes"]],
    },
]  # fmt: skip


def wise_rows(protocol: str) -> list[dict[str, Any]]:
    """A prompt of each group, at both ends of its ids."""
    groups = {
        "legacy": [(1, 400, "Cultural knowledge"), (401, 567, "time"), (568, 700, "Space"), (701, 800, "Biology"),
                   (801, 900, "Physical Knowledge"), (901, 1000, "Chemistry")],
        "verified": [(1, 400, "Cultural knowledge"), (401, 520, "time"), (521, 640, "Space"), (641, 760, "Biology"),
                     (761, 880, "Physical Knowledge"), (881, 1000, "Chemistry")],
    }[protocol]  # fmt: skip
    return [
        {
            "Prompt": f"hint {number}", "Explanation": f"meant {number}", "Category": category, "Subcategory": "s",
            "prompt_id": number,
        }
        for low, high, category in groups
        for number in (low, high)
    ]  # fmt: skip


def paint(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Write a small picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(colours).resize(size).save(path)
    return path


def write_prompts(folder: Path) -> dict[str, dict[str, Any]]:
    """Write a prompt file of every benchmark; returns the arguments of `open_benchmark` by name."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, GENEVAL)) + "\n")
    (folder / "geneval2.jsonl").write_text("\n".join(map(json.dumps, GENEVAL2)) + "\n")
    for name, text in (("0", "Eight cabbages."), ("whoops7", "A red truck.")):
        (folder / "dpg").mkdir(exist_ok=True)
        (folder / "dpg" / f"{name}.txt").write_text(text)
    for protocol in ("legacy", "verified"):
        (folder / protocol).mkdir(exist_ok=True)
        (folder / protocol / "all.json").write_text(json.dumps(wise_rows(protocol)))
    edits = {
        "1082": {"id": "animal/1.jpg", "prompt": "Make the shell smooth.", "edit_type": "adjust"},
        "97": {"id": "for_add/2.jpg", "prompt": "Add a lamp.", "edit_type": "add"},
    }
    (folder / "imgedit.json").write_text(json.dumps(edits))
    for n, edit in enumerate(edits.values()):
        paint(folder / "pictures" / edit["id"], n)
    write_gedit(folder / "gedit")
    own = {"own_prompts": True}
    return {
        "geneval": {"prompts": folder / "geneval.jsonl", **own},
        "geneval2": {"prompts": folder / "geneval2.jsonl", **own},
        "dpg": {"prompts": folder / "dpg", **own},
        "wise": {"prompts": folder / "verified", **own},
        "imgedit": {"prompts": folder / "imgedit.json", "sources": folder / "pictures", **own},
        "gedit": {"prompts": folder / "gedit", **own},
    }


def write_gedit(folder: Path) -> None:
    """Write GEdit-Bench's columns as Parquet, pictures as datasets stores them."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = []
    for n, (task, language) in enumerate([("subject-add", "en"), ("subject-add", "cn"), ("text_change", "en")]):
        data = paint(folder.parent / "raw" / f"{n}.png", n, (48, 36)).read_bytes()
        rows.append({
            "key": f"key{n}", "task_type": task, "instruction": f"do {n}", "instruction_language": language,
            "input_image": {"bytes": data, "path": None}, "Intersection_exist": n == 0,
        })  # fmt: skip
    folder.mkdir()
    parquet.write_table(pa.Table.from_pylist(rows[:2]), folder / "train-00000.parquet")
    parquet.write_table(pa.Table.from_pylist(rows[2:]), folder / "train-00001.parquet")


Reply = Callable[[dict[str, Any], int], Any]


class FakeJudge:
    """A judge on this machine: `reply(request, n)` returns a text, a whole answer, or (status, headers, body).

    A text is answered as it is; "hang" keeps the line open; "drop" closes it; "broken" sends half a JSON.
    """

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.most = self.under_way = 0
        lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    judge.requests.append(body)
                    judge.times.append(time.monotonic())
                    number = len(judge.requests) - 1
                    judge.under_way += 1
                    judge.most = max(judge.most, judge.under_way)
                try:
                    self.answer(judge.reply(body, number))
                finally:
                    with lock:
                        judge.under_way -= 1

            def answer(self, said: Any) -> None:
                status, headers = 200, {}
                if said == "hang":
                    time.sleep(1.5)
                    return
                if said == "drop":
                    self.connection.close()
                    return
                if isinstance(said, tuple):
                    status, headers, said = said
                elif isinstance(said, str) and said != "broken":
                    said = completion(said)
                data = b'{"choices": [' if said == "broken" else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def completion(text: str, **changes: Any) -> dict[str, Any]:
    """An answer of the API around a text."""
    message = {"role": "assistant", "content": text, **changes.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": "stop", **changes}
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}


def texts_of(request: dict[str, Any]) -> str:
    """All that a request says in words."""
    return "\n".join(
        part["text"]
        for message in request["messages"]
        for part in (message["content"] if isinstance(message["content"], list) else [])
        if part["type"] == "text"
    )


def pictures_of(request: dict[str, Any]) -> int:
    """How many pictures a request holds."""
    content = request["messages"][-1]["content"]
    return sum(part["type"] == "image_url" for part in content)
