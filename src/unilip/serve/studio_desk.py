"""What the studio does, without a page: one desk for each visitor, with jobs, a conversation and a history.

In:  words, pictures as paths, settings, from a visitor's desk. Out: updates, dicts of the names of what changes on the
page ("status", "pictures", ...) to its new value; a handler yields them while it works. Bad input raises no error: it
becomes a status that says what to do, and what was there before stays.
"""

from __future__ import annotations

import html
import json
import logging
import os
import secrets
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, cast

import numpy as np
from PIL import Image

from unilip import __version__
from unilip.errors import ImageError, PromptError, UniLIPError
from unilip.pictures import Fit, fit_square, picture_psnr, unfit_square
from unilip.sampling import check_prompt
from unilip.serve.engine import Engine, Ticket
from unilip.serve.intent import intent
from unilip.serve.jobs import Ask, Cancelled, Edit, Event, Generate, Job, Reconstruct, Result, Turn
from unilip.serve.pictures import decode, encode

logger = logging.getLogger(__name__)

Update = dict[str, Any]
Mode = Literal["auto", "ask", "generate", "edit"]
P = ParamSpec("P")
MAX_PICTURES = 300  # of a desk's history; the oldest go first
MAX_DESKS = 200
MAX_PIXELS = 24_000_000  # of an uploaded picture
SAME_COLOUR = 8  # of 255: a pixel that differs by no more counts as unchanged


# --- what a visitor has -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One thing that was done, as it stands in history.json. `files` are names beside it."""

    number: int
    time: str
    verb: str
    text: str
    answer: str = ""
    seeds: tuple[int, ...] = ()
    psnr: float | None = None
    seconds: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


class Desk:
    """One visitor's jobs in progress, conversation and history. The pictures are PNG files in `folder`."""

    def __init__(self, folder: Path, model: str, metadata: bool = True) -> None:
        self.folder = folder
        self.model = model
        self.metadata = metadata
        self.entries: list[Entry] = []
        self.turns: list[Turn] = []
        self.messages: list[dict[str, Any]] = []  # the conversation as it is shown
        self.used = time.monotonic()
        self.uploads: set[Path] = set()  # what was uploaded for it; gone when it closes
        self._tickets: dict[str, Ticket] = {}
        self._numbers = 0
        self._lock = threading.RLock()
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def busy(self) -> bool:
        """Whether a job is in progress."""
        with self._lock:
            return bool(self._tickets)

    def begin(self, place: str, ticket: Ticket) -> None:
        """Remember the job of a place ("chat", "generate", ...), so that it can be cancelled."""
        with self._lock:
            self._tickets[place] = ticket

    def end(self, place: str, ticket: Ticket) -> None:
        """Forget a job; if it still runs nobody wants it any more."""
        ticket.cancel()
        with self._lock:
            if self._tickets.get(place) is ticket:
                del self._tickets[place]

    def cancel(self, place: str) -> bool:
        """Cancel the job of a place; returns whether there was one."""
        with self._lock:
            ticket = self._tickets.get(place)
        return ticket is not None and ticket.cancel()

    def keep(
        self, verb: str, text: str, result: Result, images: Sequence[Image.Image], sources: Sequence[Image.Image] = ()
    ) -> list[Path]:
        """Write pictures to the folder and an entry to the history; returns the files of `images`."""
        with self._lock:
            self._numbers += 1
            number = self._numbers
        stem = f"{number:03d}-{verb}"
        seeds = result.seeds if len(result.seeds) == len(images) else (None,) * len(images)
        files, origins = [], []
        for image, seed in zip(images, seeds, strict=True):
            about = {"model": self.model, "prompt": text, "seed": seed, **result.settings}
            about = {key: value for key, value in about.items() if value not in (None, "")}
            name = f"{stem}-{seed}.png" if seed is not None else f"{stem}.png"
            files.append(self._write(image, name, about if self.metadata else None))
        for i, image in enumerate(sources):
            origins.append(self._write(image, f"{stem}-source{f'-{i + 1}' if i else ''}.png", None))
        score = result.psnr[0] if result.psnr else None
        entry = Entry(
            number, time.strftime("%Y-%m-%dT%H:%M:%S%z"), verb, text, result.text, result.seeds,
            round(score, 3) if score is not None and np.isfinite(score) else None, round(result.seconds, 3),
            dict(result.settings), tuple(path.name for path in origins), tuple(path.name for path in files),
        )  # fmt: skip
        with self._lock:
            self.entries.append(entry)
            while len(self.entries) > 1 and sum(len(e.files) + len(e.sources) for e in self.entries) > MAX_PICTURES:
                self._remove(self.entries.pop(0))
        return files

    def show(self, image: Image.Image) -> str:
        """Write a picture that is only shown; returns its file, which goes with the desk."""
        with self._lock:
            self._numbers += 1
            number = self._numbers
        return str(self._write(image, f"shown-{number}.png", None))

    def _write(self, image: Image.Image, name: str, about: Mapping[str, Any] | None) -> Path:
        path, part = self.folder / name, self.folder / f"{name}.part"
        part.write_bytes(encode(image, "png", about=about))
        os.replace(part, path)
        return path

    def _remove(self, entry: Entry) -> None:
        for name in (*entry.files, *entry.sources):
            (self.folder / name).unlink(missing_ok=True)

    def pictures(self) -> list[tuple[str, str]]:
        """Return the pictures that were made, newest first, each with what to write under it."""
        with self._lock:
            entries = list(self.entries)
        return [
            (str(self.folder / name), f"{entry.number} · {entry.verb}{f' · {entry.text}' if entry.text else ''}")
            for entry in reversed(entries)
            for name in entry.files
        ]

    def archive(self) -> Path:
        """Write the history to a zip: history.json and the pictures it names.

        Raises:
            UniLIPError: there is nothing in it yet.
        """
        with self._lock:
            entries = list(self.entries)
            if not entries:
                raise UniLIPError(
                    "There is nothing in the history yet; draw, edit, ask or reconstruct something first."
                )
            record = {
                "software": f"unilip {__version__}",
                "model": self.model,
                "entries": [asdict(entry) for entry in entries],
            }
            path, part = self.folder / "unilip-history.zip", self.folder / "unilip-history.zip.part"
            with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:  # PNG is compressed already
                archive.writestr("history.json", json.dumps(record, indent=1, ensure_ascii=False))
                for name in (name for entry in entries for name in (*entry.files, *entry.sources)):
                    archive.write(self.folder / name, name)
            os.replace(part, path)
        return path

    def clear(self) -> None:
        """Forget the history and its files; the conversation stays."""
        with self._lock:
            for entry in self.entries:
                self._remove(entry)
            self.entries.clear()
            (self.folder / "unilip-history.zip").unlink(missing_ok=True)

    def close(self) -> None:
        """Cancel what is in progress and delete every file."""
        with self._lock:
            for ticket in self._tickets.values():
                ticket.cancel()
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.uploads:
            path.unlink(missing_ok=True)


class Desks:
    """The desks of all visitors, by the id of their page; each is there until its page is closed."""

    def __init__(self, folder: Path, model: str, metadata: bool = True) -> None:
        self.folder, self.model, self.metadata = folder, model, metadata
        self._desks: dict[str, Desk] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Desk:
        """Return the desk of a page, a new one at first.

        Where there are too many, one that has nothing on it goes, or one that nobody used for an hour.

        Raises:
            UniLIPError: all are in use.
        """
        with self._lock:
            if key in self._desks:
                self._desks[key] = self._desks.pop(key)  # the last one is the latest in use
                self._desks[key].used = time.monotonic()
                return self._desks[key]
            old: list[Desk] = []
            if len(self._desks) >= MAX_DESKS:
                empty = [k for k, desk in self._desks.items() if not (desk.busy or desk.entries or desk.turns)]
                idle = [k for k, desk in self._desks.items() if not desk.busy and time.monotonic() - desk.used > 3600]
                if not (empty or idle):
                    raise UniLIPError(f"{MAX_DESKS} pages are open here, and all are in use; try again later.")
                old.append(self._desks.pop((empty or idle)[0]))
            desk = self._desks[key] = Desk(self.folder / secrets.token_hex(16), self.model, self.metadata)
        for one in old:
            one.close()
        return desk

    def drop(self, key: str) -> None:
        """Close the desk of a page that was left."""
        with self._lock:
            desk = self._desks.pop(key, None)
        if desk is not None:
            desk.close()

    def __len__(self) -> int:
        return len(self._desks)

    def close(self) -> None:
        """Close all."""
        for key in list(self._desks):
            self.drop(key)


# --- what is shown ----------------------------------------------------------------------------------------------------


def note(text: str, kind: Literal["info", "done", "error"] = "info") -> str:
    """Return a line of status as HTML; errors are announced by screen readers at once."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="note {kind}" role="{role}">{html.escape(text)}</div>'


def bar(event: Event, unit: str = "step") -> str:
    """Return a progress bar of an event as HTML."""
    if event.kind == "start" or not event.steps:
        return '<div class="note info" role="status"><progress></progress> starting</div>'
    text = f"{unit} {event.step} of {event.steps}"
    return (
        f'<div class="note info" role="status"><progress value="{event.step}" max="{event.steps}" '
        f'aria-label="{text}"></progress> {text}</div>'
    )


def difference(one: Image.Image, other: Image.Image) -> tuple[Image.Image, float]:
    """Return a map of how much two RGB pictures of one size differ, and the share of pixels that differ visibly.

    The map shows the largest difference of the three colours: black for none, over orange to white for all of it.
    """
    a, b = (np.asarray(image.convert("RGB"), dtype=np.int16) for image in (one, other))
    gap = np.abs(a - b).max(-1)  # H W
    ramp = np.array([[0, 0, 0], [214, 92, 16], [255, 255, 255]], dtype=np.float64)
    shades = np.stack([np.interp(np.arange(256), [0, 96, 255], ramp[:, c]) for c in range(3)], -1)
    return Image.fromarray(shades.round().astype(np.uint8)[gap]), float((gap > SAME_COLOUR).mean())


def read_picture(path: str | None, what: str, folder: Path | None = None) -> Image.Image:
    """Return an uploaded picture as upright RGB.

    Raises:
        ImageError: there is none, it is not in `folder`, or it cannot be read; only the file's own name is told.
    """
    if not path:
        raise ImageError(f"There is no {what} yet; upload, paste or drop one, or click an example.")
    name = Path(path).name
    if folder is not None and not is_within(path, folder):
        raise ImageError(f"{name} was not uploaded here.")
    try:
        return decode(Path(path).read_bytes(), MAX_PIXELS)
    except OSError as error:
        raise ImageError(f"{name} is gone; upload it again.") from error
    except ImageError as error:
        raise ImageError(f"{name} is not an image that can be read: {error}") from error


def is_within(path: Any, folder: Path) -> bool:
    """Whether this is the path of something in a folder, links followed."""
    try:
        return isinstance(path, str) and Path(path).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a null byte, a loop of links
        return False


def whole(value: float | None, what: str) -> int | None:
    """Return a number of the page as a whole one; an empty field is None."""
    if value is None:
        return None
    if value != int(value):
        raise UniLIPError(f"{what} is {value}; it must be a whole number.")
    return int(value)


def kindly(handler: Callable[P, Iterator[Update]]) -> Callable[P, Iterator[Update]]:
    """Turn the errors of a handler into a last update that says what happened and what to do."""

    @wraps(handler)
    def run(*args: P.args, **kwargs: P.kwargs) -> Iterator[Update]:
        try:
            yield from handler(*args, **kwargs)
        except Cancelled:
            yield {"status": note("Cancelled. Nothing was changed.")}
        except UniLIPError as error:
            yield {"status": note(str(error), "error")}
        except Exception as error:
            logger.exception("the studio failed: %r", error)
            yield {"status": note("Something went wrong here; the program's log says what. Try again.", "error")}

    return run


# --- what can be done -------------------------------------------------------------------------------------------------


class Studio:
    """The handlers of the page: each takes a desk and inputs, and yields updates. Pictures are read from `folder`."""

    def __init__(self, engine: Engine, folder: Path | None = None) -> None:
        self.engine = engine
        self.folder = folder
        self.kept: frozenset[Path] = frozenset()  # files of the folder that are everybody's: the examples
        self.size = engine.config.image_size

    def _follow(
        self, desk: Desk, place: str, job: Job, show: Callable[[Event], Update]
    ) -> Generator[Update, None, Result]:
        """Give the engine a job, yield an update for each of its events, and return the result.

        Whoever stops listening, or calls `desk.cancel(place)`, cancels the job.
        """
        ticket = self.engine.submit(job)
        desk.begin(place, ticket)
        try:
            if ticket.started is None and self.engine.stats().running:
                yield {"status": note("Waiting for earlier work to finish.")}
            for event in ticket.events():
                yield show(event)
            return ticket.result()
        finally:
            desk.end(place, ticket)

    def _read(self, desk: Desk, path: str | None, what: str) -> Image.Image:
        """Return an uploaded picture, which the desk has from now on."""
        image = read_picture(path, what, self.folder)
        if self.folder is not None and path and Path(path).resolve() not in self.kept:
            desk.uploads.add(Path(path).resolve())
        return image

    @staticmethod
    def _step(event: Event) -> Update:
        return {"status": bar(event)}

    @kindly
    def generate(
        self, desk: Desk, prompt: str, negative: str | None, seed: float | None, fresh: bool, steps: float,
        guidance: float, solver: str, count: float,
    ) -> Iterator[Update]:  # fmt: skip
        """Draw `count` pictures: "pictures" [(file, caption)], "seed" of the first. `fresh` takes a new seed."""
        job = Generate(
            prompt, count=int(count), seed=None if fresh else whole(seed, "The seed"), steps=int(steps),
            guidance_scale=guidance, solver=solver, negative_prompt=(negative or "").strip() or None,
        )  # fmt: skip
        result = yield from self._follow(desk, "generate", job, self._step)
        files = desk.keep("generate", prompt.strip(), result, result.images)
        captions = [f"seed {seed}" for seed in result.seeds]
        yield {
            "pictures": [(str(path), caption) for path, caption in zip(files, captions, strict=True)],
            "seed": result.seeds[0],
            "status": note(f"{_pictures(len(files))} of {job.steps} steps in {result.seconds:.1f} s.", "done"),
        }

    @kindly
    def edit(
        self, desk: Desk, path: str | None, instruction: str, negative: str | None, seed: float | None, fresh: bool,
        steps: float, guidance: float, solver: str, fit: str, keep_aspect: bool,
    ) -> Iterator[Update]:  # fmt: skip
        """Change a picture: "slider" (before, after), "difference", "edited" the file, "seed"."""
        source = self._read(desk, path, "picture to change")
        shape = cast(Fit, fit)
        job = Edit(
            source, instruction, seed=None if fresh else whole(seed, "The seed"), steps=int(steps),
            guidance_scale=guidance, solver=solver, negative_prompt=(negative or "").strip() or None, fit=shape,
            keep_aspect=keep_aspect,
        )  # fmt: skip
        result = yield from self._follow(desk, "edit", job, self._step)
        before = self._seen(source, shape, keep_aspect)
        made = result.images[0]
        (file,) = desk.keep("edit", instruction.strip(), result, [made], [before])
        gap, share = difference(before, made)
        yield {
            "slider": (before, str(file)),
            "difference": gap,
            "edited": str(file),
            "seed": result.seeds[0],
            "status": note(
                f"{share:.0%} of the pixels changed, {picture_psnr(before, made):.1f} dB between before and after; "
                f"seed {result.seeds[0]}, {result.seconds:.1f} s.",
                "done",
            ),
        }

    def _seen(self, source: Image.Image, fit: Fit, keep_aspect: bool) -> Image.Image:
        """Return a picture as the model saw it, in the shape of what comes back."""
        square = fit_square(source, self.size, fit)
        return unfit_square(square, source.size, fit) if keep_aspect else square

    @kindly
    def reconstruct(self, desk: Desk, path: str | None, fit: str) -> Iterator[Update]:
        """Encode a picture and draw it again: "seen", "again" (files), "difference", the PSNR in "score"."""
        source = self._read(desk, path, "picture to reconstruct")
        shape = cast(Fit, fit)
        result = yield from self._follow(
            desk, "reconstruct", Reconstruct(source, fit=shape), lambda event: {"status": bar(event)}
        )
        seen, again = self._seen(source, shape, False), result.images[0]
        (file,) = desk.keep("reconstruct", "", result, [again], [seen])
        gap, share = difference(seen, again)
        score = result.psnr[0]
        yield {
            "seen": seen,
            "again": str(file),
            "difference": gap,
            "score": score,
            "status": note(
                f"PSNR {score:.1f} dB at {self.size} px ({_quality(score)}); {share:.0%} of the pixels differ visibly; "
                f"{result.seconds:.1f} s.",
                "done",
            ),
        }

    # --- the conversation

    def say(self, desk: Desk, message: Mapping[str, Any], mode: Mode = "auto") -> Iterator[Update]:
        """Answer, draw or change a picture, as a message {"text", "files"} wants.

        Yields "messages", the whole conversation as it is shown, and "box", the message again if it was refused.
        A picture that is asked about, or changed, is the newest one; an answer knows what was said since it appeared.
        """
        shown = len(desk.messages)
        try:
            yield from self._say(desk, message, mode)
        except Cancelled:
            desk.messages.append(_message("assistant", "*Cancelled.*"))
            yield {"messages": list(desk.messages), "status": note("Cancelled.")}
        except UniLIPError as error:
            del desk.messages[shown:]
            yield {"messages": list(desk.messages), "box": dict(message), "status": note(str(error), "error")}
        except Exception as error:
            logger.exception("the studio failed: %r", error)
            del desk.messages[shown:]
            text = "Something went wrong here; the program's log says what. Try again."
            yield {"messages": list(desk.messages), "box": dict(message), "status": note(text, "error")}

    def _say(self, desk: Desk, message: Mapping[str, Any], mode: Mode) -> Iterator[Update]:
        files = list(message.get("files") or ())
        text = str(message.get("text") or "").strip()
        pictures = tuple(self._read(desk, path, "picture") for path in files)
        text = check_prompt(text, "message") if text or not pictures else "Describe the picture."
        newest = pictures or next((turn.images for turn in reversed(desk.turns) if turn.images), ())
        wanted, words = intent(text, bool(newest)) if mode == "auto" else (mode, text)
        if mode == "generate" and (guess := intent(text, False))[0] == "generate":
            words = guess[1]
        if wanted == "edit" and not newest:
            raise ImageError("There is no picture to change yet; add one to your message, or have one drawn first.")
        desk.messages += [_message("user", {"path": path}) for path in files]
        desk.messages.append(_message("user", text))
        yield {"messages": list(desk.messages), "status": bar(Event("start"))}
        images: tuple[Image.Image, ...] = ()
        if wanted == "ask":
            reply = yield from self._answer(desk, text, pictures)
        else:
            job: Job = Generate(words) if wanted == "generate" else Edit(newest[-1], words)
            result = yield from self._follow(desk, "chat", job, self._step)
            images = result.images
            sources = [fit_square(newest[-1], self.size)] if wanted == "edit" else []
            (file,) = desk.keep(wanted, words, result, images, sources)
            reply = f"{'Drawn' if wanted == 'generate' else 'Changed'}: “{words}”, seed {result.seeds[0]}."
            desk.messages.append(_message("assistant", {"path": str(file), "alt_text": words}))
            desk.messages.append(_message("assistant", reply))
        desk.turns += [Turn("user", text, pictures), Turn("assistant", reply, images)]
        yield {"messages": list(desk.messages), "status": note("")}

    def _answer(self, desk: Desk, question: str, pictures: tuple[Image.Image, ...]) -> Generator[Update, None, str]:
        """Stream an answer into the last message; the oldest turns are left out where the model cannot read all."""
        history, images = _context(desk.turns, pictures)
        desk.messages.append(_message("assistant", ""))

        def show(event: Event) -> Update:
            if event.kind == "text":
                desk.messages[-1] = _message("assistant", desk.messages[-1]["content"] + event.text)
            return {"messages": list(desk.messages), "status": note("")} if event.kind == "text" else {}

        while True:
            try:
                job = Ask(question, images, tuple(history))
                result = yield from self._follow(desk, "chat", job, show)
                break
            except PromptError:
                if not history:
                    raise
                pinned = history[0].images
                history = history[2:]
                if pinned and history:
                    history[0] = Turn(history[0].role, history[0].text, pinned)
                elif pinned:
                    images = pinned
        desk.messages[-1] = _message("assistant", result.text or "(no answer)")
        desk.keep("ask", question, result, [], [fit_square(image, self.size) for image in pictures])
        return result.text

    def forget(self, desk: Desk) -> Update:
        """Start a new conversation; the history keeps what was made."""
        desk.cancel("chat")
        desk.turns.clear()
        desk.messages.clear()
        return {"messages": [], "status": note("")}


def _context(turns: Sequence[Turn], pictures: tuple[Image.Image, ...]) -> tuple[list[Turn], tuple[Image.Image, ...]]:
    """Return the turns that a question builds on, and the pictures that it brings along itself.

    That is what was said since the newest picture appeared. A picture that was drawn, and so has no question of its
    own, goes with the first question about it.
    """
    if pictures:
        return [], pictures
    since = max((i for i, turn in enumerate(turns) if turn.images), default=None)
    if since is None:
        return list(turns), ()
    if turns[since].role == "user":
        return list(turns[since:]), ()
    later, drawn = list(turns[since + 1 :]), turns[since].images
    if not later:
        return [], drawn
    return [Turn(later[0].role, later[0].text, drawn), *later[1:]], ()


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _pictures(count: int) -> str:
    return f"{count} picture{'' if count == 1 else 's'}"


def _quality(score: float) -> str:
    """Say a PSNR in words."""
    steps = ((40, "hardly to be told apart"), (30, "close"), (24, "softened"), (18, "blurred"))
    return next((words for least, words in steps if score >= least), "hardly to be recognised")


def parameters(engine: Engine) -> int:
    """Count the parameters of the engine's model."""
    return sum(value.numel() for value in engine.model.parameters())
