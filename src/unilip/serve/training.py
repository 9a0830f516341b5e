"""Adapters trained from the page: pictures with texts in, an adapter that the server lends out.

In:  5 to 50 pictures with captions, or pairs of pictures with instructions. Out: RUNS/studio/NAME, a run as `unilip
train lora/KIND` leaves it, with the samples in data/; and the adapter of its result under that name. The training has
a process of its own, one at a time; it can be stopped and gone on with.
"""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from pydantic import Field, Json
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from unilip.adapters import library
from unilip.errors import UniLIPError, check_choice, check_number
from unilip.files import content_hash, replacing, write_text
from unilip.sampling import check_prompt
from unilip.serve import schema
from unilip.serve.describe import form_body
from unilip.serve.problems import JSON, Trouble
from unilip.serve.service import NOT_STORED, Service, Work

logger = logging.getLogger(__name__)
KINDS = ("style", "concept", "edit")
FEWEST, MOST, MOST_STEPS = 5, 50, 20_000
GROUP, ABOUT = "studio", "studio.json"  # of the runs; what one was asked to be
SHEETS = 8  # pictures of the progress, over a run
PATIENCE = 60.0  # seconds that a stopped training has to save itself
Sample = tuple[str, Sequence[Image.Image]]  # its text; one picture, or before and after


@dataclass(eq=False)
class Trainer:
    """Trains adapters of one model, one at a time."""

    runs: Path  # of all kinds
    base: str  # what the adapters are of, as `init` says it: "embedded", a folder, a hub id
    size: str  # the model's name of `unilip.sizes`
    device: str  # where to train
    lend: Callable[[str, Path], None] = lambda *_: None  # called with name and folder of an adapter that is done

    def __post_init__(self) -> None:
        self.root = self.runs.absolute() / GROUP
        self._lock, self._process, self._thread = threading.Lock(), None, None  # type: tuple[Any, Any, Any]
        self._state: dict[str, Any] = {"status": "idle"}
        self._estimates: dict[str, Any] = {}
        self._measuring = threading.Lock()

    def kept(self) -> dict[str, Path]:
        """The adapters that are done, by name."""
        return {path.parent.name: path for path in sorted(self.root.glob("*/final")) if self._asked(path.parent)}

    def unfinished(self) -> list[str]:
        """Names of runs that were stopped, or failed; their pictures and last checkpoints are there."""
        runs = [path.parent for path in sorted(self.root.glob(f"*/{ABOUT}")) if not (path.parent / "final").exists()]
        return [run.name for run in runs if self._asked(run) and not (self.running and run.name == self._state["name"])]

    def _asked(self, run: Path) -> dict[str, Any]:
        """What a run was asked to be; nothing where it is of another model, or none of ours."""
        try:
            about = json.loads((run / ABOUT).read_text(encoding="utf-8"))
            return dict(about) if about["base"] == self.base and about["kind"] in KINDS else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}

    @property
    def running(self) -> bool:
        return self._state["status"] in ("running", "stopping")

    # --- what is asked

    def settings(self, kind: str, steps: int) -> list[str]:
        """The settings of a recipe that make it this model's."""
        check_choice("kind of training", kind, KINDS)
        steps = check_number("steps", steps, 1, MOST_STEPS, whole=True)
        often = max(1, steps // SHEETS)
        return [
            f"init=all={self.base}", f"model={self.size}", f"steps={steps}", f"log_every={min(10, often)}",
            f"sample_every={often}", f"save_every={often}",
        ]  # fmt: skip

    def estimate(self, kind: str, steps: int) -> dict[str, Any]:
        """What memory (GiB) and time (hours) a training needs here. Raises UniLIPError: it cannot fit."""
        from unilip.recipes.catalog import get_recipe
        from unilip.recipes.record import override
        from unilip.train.preflight import GIB, hardware, preflight

        recipe = override(get_recipe(f"lora/{kind}"), self.settings(kind, steps))
        with self._measuring:  # what a step takes is the same for any number of them
            if kind not in self._estimates:
                self._estimates[kind] = preflight(recipe, hardware("here"))
        found = self._estimates[kind]
        usable, hours = found.hardware.usable / GIB, found.seconds * steps / 3600
        return {"memory": found.total / GIB, "usable": usable, "hours": hours, "hardware": str(found.hardware)}

    def begin(self, name: str, kind: str, steps: int, samples: Sequence[Sample]) -> None:
        """Keep samples and train on them. Raises UniLIPError: something is wrong with them; nothing was written."""
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", name):
            raise UniLIPError(f"The name is {name!r}; give 1 to 40 of a-z, 0-9, - and _, a letter or digit first.")
        self.settings(kind, steps)
        library()
        if not FEWEST <= len(samples) <= MOST:
            what = "pairs" if kind == "edit" else "pictures"
            raise UniLIPError(f"{len(samples)} {what} were given; a training takes {FEWEST} to {MOST}.")
        for number, (text, _) in enumerate(samples, 1):
            check_prompt(text, f"text of picture {number}")
        run = self.root / name
        with self._lock:
            self._check_free()
            if run.exists():
                more = "; go on with it" if name in self.unfinished() else ""
                raise UniLIPError(f"There is an adapter {name} already{more}, or give this one another name.")
            endings = (".input", ".output") if kind == "edit" else ("",)
            try:
                with replacing(run) as part:
                    (part / "data").mkdir(parents=True)
                    for number, (text, pictures) in enumerate(samples, 1):
                        for ending, picture in zip(endings, pictures, strict=True):
                            picture.save(part / "data" / f"{number:02}{ending}.png")
                        (part / "data" / f"{number:02}.txt").write_text(text, encoding="utf-8")
                    write_text(part / ABOUT, json.dumps({"kind": kind, "steps": steps, "base": self.base}))
            except OSError as error:
                raise UniLIPError(f"{self.root} cannot be written ({error.strerror}); make room there.") from error
            self._start(name)

    def go_on(self, name: Any) -> None:
        """Go on with a run that was stopped, or failed. Raises UniLIPError: there is none of that name."""
        with self._lock:
            self._check_free()
            check_choice("unfinished training", name, self.unfinished())
            self._start(name)

    def _check_free(self) -> None:
        if self.running:
            raise UniLIPError(f"{self._state['name']} is being trained; wait for it, or stop it first.")

    # --- the process

    def _start(self, name: str) -> None:
        run = self.root / name
        about = self._asked(run)
        words = [sys.executable, "-m", "unilip", "train", f"lora/{about['kind']}", "--data", str(run / "data")]
        words += ["--runs", str(self.root.parent), "--device", self.device, "--no-progress"]
        for setting in (f"name={GROUP}/{name}", *self.settings(about["kind"], about["steps"])):
            words += ["--set", setting]
        with (run / "output.txt").open("wb") as output:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            self._process = subprocess.Popen(words, start_new_session=True, **pipes)
        self._state = {"status": "running", "name": name, "kind": about["kind"], "steps": about["steps"]}
        self._thread = threading.Thread(target=self._watch, args=(name,), name="unilip-training", daemon=True)
        self._thread.start()
        logger.info("training the adapter %s in %s", name, run)

    def _watch(self, name: str) -> None:
        run, code = self.root / name, self._process.wait()
        said = (run / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
        found: dict[str, Any] = {"status": "done"}
        if code == 0 and (run / "final").is_dir():
            try:
                self.lend(name, run / "final")
            except Exception as error:  # the result is there, whatever keeps it from acting
                logger.exception("the adapter %s is not lent", name)
                found = {"status": "failed", "error": f"It is kept in {run / 'final'}, but cannot act here: {error}"}
        elif self._state["status"] == "stopping" or code == 130:
            found = {"status": "stopped"}
        else:
            last = next((line for line in reversed(said) if line.startswith("unilip: error: ")), "")
            text = last.removeprefix("unilip: error: ") or f"It ended ({code}); {run / 'output.txt'} says more."
            found = {"status": "failed", "error": text}
        logger.info("the training of %s: %s", name, found.get("error", found["status"]))
        self._state = self._state | found

    def stop(self) -> None:
        """Stop the training under way: it saves itself, and can be gone on with; asked again, it goes on saving."""
        if self._state["status"] == "running":
            self._state = self._state | {"status": "stopping"}
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGINT)

    def close(self) -> None:
        """Stop, and wait until all is saved."""
        self.stop()
        if self._thread is not None:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._process.kill()
                self._thread.join()

    # --- what is told

    def state(self) -> dict[str, Any]:
        """How it goes: status (idle, running, stopping, stopped, done, failed), name, step, loss, seconds left, ..."""
        found = dict(self._state) | {"unfinished": self.unfinished(), "kinds": KINDS, "fewest": FEWEST, "most": MOST}
        if "name" not in found:
            return found
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):  # none yet, and a line that is being written
            for line in (self.root / found["name"] / "log.jsonl").read_text(encoding="utf-8").splitlines():
                lines.append(json.loads(line))
        if lines:
            first, last = lines[0], lines[-1]
            found |= {"step": last["step"], "loss": last.get("loss")}
            if self.running and last["step"] > first["step"]:
                pace = (last["time"] - first["time"]) / (last["step"] - first["step"])
                found["left"] = round(max(0.0, last["time"] + pace * (found["steps"] - last["step"]) - time.time()))
        if (sheet := self.sheet()) is not None:
            found["sheet"] = content_hash(str(sheet))  # another one, another name
        return found

    def sheet(self) -> Path | None:
        """The newest picture of the progress: wanted above made."""
        sheets = (self.root / str(self._state.get("name")) / "samples").glob("*.png")
        return max(sheets, key=lambda path: path.stem.rpartition("_")[2], default=None)


# --- over HTTP


class Asked(schema.Body):
    """POST /v1/training: the fields beside the files `image`."""

    name: str
    kind: str = Field(description=f"One of {', '.join(KINDS)}.")
    steps: int = 300
    texts: Json[list[Any]] = Field(description="A caption of each picture, or the instruction of each pair.")


def routes(service: Service, trainer: Trainer) -> APIRouter:
    """The routes of the page's trainings; what they answer is `Trainer.state`."""
    router = APIRouter(prefix="/v1/training", tags=["training"])

    async def told(status: int = 202) -> Response:
        return JSON(await run_in_threadpool(trainer.state), status)

    @router.get("")
    async def state() -> Response:
        """How the training goes, and which ones can be gone on with."""
        return await told(200)

    @router.get("/estimate")
    async def estimate(kind: str, steps: int) -> Response:
        """Memory in GiB and hours that a training would take here."""
        return JSON(await run_in_threadpool(trainer.estimate, kind, steps))

    @router.get("/sheet")
    async def sheet() -> Response:
        """The newest picture of the progress: wanted above made."""
        if (found := trainer.sheet()) is None:
            raise Trouble(404, "There is no picture of the training yet.", "not_found")
        return Response(await run_in_threadpool(found.read_bytes), media_type="image/png", headers=NOT_STORED)

    @router.post("", openapi_extra=form_body(Asked, {"image": MOST * 2}))
    async def begin(request: Request) -> Response:
        """Train an adapter: files `image` in the order of `texts`; of edits each is followed by its result."""
        body, files = await service.form(request, Asked, "image", most=MOST * 2)
        each = 2 if body.kind == "edit" else 1
        if len(body.texts) * each != len(files):
            what = f"{len(files)} pictures and {len(body.texts)} texts were sent"
            raise Trouble(400, f"{what}; {each} for each text are needed.", "invalid_form")
        work = Work(service, request, body)
        images = await work.in_time(service.decoders, lambda: [work.decode(data) for _, data in files])
        samples = [(text, images[i * each : (i + 1) * each]) for i, text in enumerate(body.texts)]
        await run_in_threadpool(trainer.begin, body.name, body.kind, body.steps, samples)
        return await told()

    @router.post("/continue")
    async def go_on(request: Request) -> Response:
        """Go on with the training `name` that was stopped, or failed."""
        await run_in_threadpool(trainer.go_on, (await service.load(request)).get("name"))
        return await told()

    @router.post("/stop")
    async def stop() -> Response:
        """Stop the training, which saves itself."""
        trainer.stop()
        return await told()

    return router
