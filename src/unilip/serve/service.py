"""What all routes share: requests that `Guard` let through are read, jobs queued and waited for, pictures encoded."""

import asyncio
import base64
import contextvars
import dataclasses
import json
import logging
import math
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from fastapi import Request
from PIL import Image, ImageOps
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import StreamingResponse

from unilip.errors import UniLIPError, check_choice
from unilip.sampling import NOT_TAUGHT
from unilip.serve import schema
from unilip.serve.fetch import fetch
from unilip.serve.guard import FILES, STARTED, Rules
from unilip.serve.jobs import Ask, DeadlineExceeded, Edit, Job, QueueFull, Result, Strengths
from unilip.serve.metrics import Metrics
from unilip.serve.pictures import FORMATS, decode, encode
from unilip.serve.problems import Trouble, dumps, trouble
from unilip.serve.serving import Serving
from unilip.serve.store import Store
from unilip.serve.tickets import Ticket, merged
from unilip.shapes import cells

logger = logging.getLogger(__name__)

MAX_FILES = 16
DECODERS = 2  # pictures of strangers that are decoded at the same time
FETCHERS = 8  # and fetched
IN_MEMORY = 8  # requests' worth of pixels that are kept at the same time
APART = (
    "Each picture was changed by itself, for this model has not learned edits of several; joint=true asks for one all "
    "the same, joint=false for this without a warning."
)
KEEP_ALIVE_SECONDS = 15.0
NOT_STORED = {"Cache-Control": "no-store"}
WAITING = ": waiting\n\n"  # a comment, which keeps a stream open

Files = list[tuple[str, bytes]]  # of a form, by the names of their fields
B = TypeVar("B", bound=schema.Body)
J = TypeVar("J", bound=Job)
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How the application behaves."""

    model_name: str = "unilip"  # in answers, in /v1/models and in the metadata of pictures
    rules: Rules = field(default_factory=Rules)  # who may ask, how often, how much
    max_pixels: int = 24_000_000  # of all pictures of one request together
    allow_url_images: bool = False  # fetch pictures from public http(s) addresses
    metadata: bool = True  # write model and seed into the pictures
    drain_seconds: float = 30.0  # at the end, how long to go on with what was accepted
    strict: bool = False  # refuse fields that are not understood, instead of ignoring and naming them
    chat: Literal["auto", "text"] = "auto"  # whether words can ask for a picture, or `modalities` alone
    about: Mapping[str, Any] = field(default_factory=dict)  # what the page says of the model, as JSON


class Service:
    """An engine with its settings, and what is kept between requests."""

    def __init__(self, engine: Serving, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.store, self.conversations = Store(), Store(64 * 2**20)
        self.decoders = ThreadPoolExecutor(DECODERS, "unilip-decoder")  # a pool of its own, so that text need not wait
        self._fetchers = threading.BoundedSemaphore(FETCHERS)
        self._counting, self.pixels = threading.RLock(), 0  # of all pictures in memory

    @property
    def names(self) -> list[str]:
        """What `model` may be: the model, and the model with an adapter."""
        own = self.settings.model_name
        return [own, *(f"{own}:{name}" for name in self.engine.checker.adapters)]

    def named(self, body: schema.Pictures) -> str:
        """What the model that a request asks for is called in its answer."""
        return body.model if body.model in self.names else self.settings.model_name

    def strengths(self, body: schema.Pictures) -> Strengths:
        """Return the adapters that act, with their strengths. Raises UniLIPError: one that is not offered."""
        known, (head, _, tail) = self.engine.checker.adapters, (body.model or "").rpartition(":")
        found = {tail: known[tail]} if tail in known and head else {}
        if head == self.settings.model_name and not found:
            check_choice(f"adapter of {head} called", tail, known or ["(none)"])
        given = body.adapters.split(",") if isinstance(body.adapters, str) else body.adapters or ()
        pairs = given.items() if isinstance(given, dict) else (one.strip().partition(":")[::2] for one in given)
        for word, scale in pairs:
            check_choice("adapter", word.strip(), known or ["(none)"])
            try:
                found[word.strip()] = known[word.strip()] if scale == "" else float(scale)
            except ValueError as error:
                raise UniLIPError(f"The strength of adapter {word} is {scale!r}; write it as {word}:0.5.") from error
        return tuple(found.items())

    # --- reading

    async def load(self, request: Request) -> dict[str, Any]:
        """Read a JSON body, outside the event loop."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Trouble(400, "Send JSON, with the header Content-Type: application/json.", "invalid_json")
        try:
            fields = await run_in_threadpool(json.loads, await request.body())
        except (ValueError, RecursionError) as error:
            where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
            raise Trouble(400, f"The body is no valid JSON{where}.", "invalid_json") from None
        if not isinstance(fields, dict):
            raise Trouble(400, "The body must be a JSON object: {...}.", "invalid_json")
        return fields

    async def read(self, request: Request, kind: type[B]) -> B:
        """Read a JSON body and check it, outside the event loop. Raises UniLIPError, ValidationError: `schema.read`."""
        return await run_in_threadpool(schema.read, kind, await self.load(request), self.settings.strict)

    async def form(self, request: Request, kind: type[B], *allowed: str, most: int = MAX_FILES + 1) -> tuple[B, Files]:
        """Read a form in memory: its fields, checked, and its files, called as `allowed`, in their order."""
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Trouble(400, "Send a form: multipart/form-data with the file `image`.", "invalid_form")
        limits = {"max_files": most, "max_fields": 64, "max_part_size": most * 2**14}  # all of a training's texts
        parser = MultiPartParser(request.headers, request.stream(), **limits)
        # what has no room in memory was refused before; nothing is spooled to disk
        parser.spool_max_size = self.settings.rules.max_body + 1
        try:
            form = await parser.parse()
        except MultiPartException as error:
            raise Trouble(400, f"The form is malformed: {error.message}", "invalid_form") from None
        except (ValueError, KeyError) as error:
            raise Trouble(400, "The form is malformed; send multipart/form-data.", "invalid_form") from error
        fields, files = dict[str, str](), Files()
        for name, value in form.multi_items():
            shown = name.encode("ascii", "backslashreplace").decode()[:64]
            if isinstance(value, UploadFile):
                if name not in allowed:
                    raise Trouble(400, f"There is no file field {shown!r}.", "invalid_form", shown)
                if (data := await value.read()) or value.filename:  # neither: none was chosen
                    files.append((name, data))
                await value.close()
            elif name in allowed:
                if value:
                    raise Trouble(400, f"{shown} must be a file, not text.", "invalid_form", shown)
            elif name in fields:
                raise Trouble(400, f"{shown} was given twice.", "invalid_form", shown)
            else:
                fields[name] = value
        if not any(name != "mask" for name, _ in files):
            raise Trouble(400, "There is no picture; send it as the file `image`.", "invalid_form", "image")
        return schema.read(kind, fields, self.settings.strict, form=True), files

    def count_pixels(self, change: int) -> None:
        with self._counting:
            self.pixels += change

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """Fetch a picture in the calling thread; slow hosts must not keep all threads."""
        if not self._fetchers.acquire(blocking=False):
            raise QueueFull("Too many pictures are being fetched; send them as data URLs, or try again.", 5.0)
        try:
            return fetch(url, max_bytes)
        finally:
            self._fetchers.release()

    # --- working

    def job(self, kind: type[J], body: schema.Pictures, **own: Any) -> J:
        """Make a job of a request: its fields of the same names, others of another, and what is the job's `own`."""
        said = {**dict(body), "adapters": self.strengths(body)}
        said |= {"guidance_scale": said.get("guidance"), "count": said.get("n")}
        said["partials"] = said.get("partial_images") if said.get("stream") else None
        if isinstance(body, schema.Drawing) and body.quality and body.steps is None and body.preset is None:
            usual, most = self.engine.config.sampling.num_inference_steps, self.engine.limits.steps
            said["steps"] = min(max(1, round(schema.QUALITY[body.quality] * usual)), most)
        known = [one.name for one in dataclasses.fields(kind)]
        return kind(**{name: value for name, value in (said | own).items() if name in known and value is not None})

    def together(self, joint: bool | None, count: int) -> bool:
        """Whether COUNT pictures belong to one edit, as OpenAI has it: else each is changed by itself."""
        return count > 1 and (self.engine.config.sampling.joint if joint is None else joint)

    def edits(self, images: Sequence[Image.Image], body: schema.Edits | schema.Chat, **own: Any) -> list[Edit]:
        """One edit for each picture; or a joint one of the first, where that is asked for or the model learned it."""
        if self.together(body.joint, len(images)):
            return [self.job(Edit, body, image=images[0], others=tuple(images[1:]), **own)]
        return [self.job(Edit, body, image=image, **own) for image in images]


def named_event(name: str, **fields: Any) -> str:
    """A server-sent event that has its name inside as well, as OpenAI's have."""
    return f"event: {name}\ndata: {dumps({'type': name, **fields})}\n\n"


@dataclass
class Work:
    """One request at work: its fields, the tickets of its jobs, and what is done `after` with each of its pictures."""

    service: Service
    request: Request
    body: Any  # of `schema`
    tickets: list[Ticket] = field(default_factory=list)
    after: Callable[[Image.Image], Image.Image] | None = None

    def __post_init__(self) -> None:
        self.pixels = self.service.settings.max_pixels  # that its pictures may still have together

    @property
    def left(self) -> float | None:
        """Seconds that the request still has: its own deadline or the server's, whichever is earlier."""
        allowed = [one for one in (self.body.deadline, self.service.engine.deadline) if one is not None]
        return max(0.001, min(allowed) - (time.monotonic() - self.request.scope[STARTED])) if allowed else None

    async def in_time(self, pool: ThreadPoolExecutor | None, work: Callable[..., T], *given: Any) -> T:
        """Run something in a thread, for as long as the request has time."""
        context = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work, *given))
        try:
            return await asyncio.wait_for(future, self.left)
        except asyncio.TimeoutError:
            raise DeadlineExceeded("The request's time was over before its pictures were read.", 1.0) from None

    def decode(self, data: bytes, how: Callable[[bytes, int], Image.Image] = decode) -> Image.Image:
        """Decode one of its pictures in one of the decoders' threads: memory is what a decoder needs most."""
        service = self.service
        if service.pixels > IN_MEMORY * service.settings.max_pixels:
            raise QueueFull("Too many pictures are being read at once; send the request again.", 2.0)
        image = how(data, self.pixels)
        size = image.width * image.height
        self.pixels -= size
        service.count_pixels(size)
        weakref.finalize(image, service.count_pixels, -size)  # given back with the picture's memory
        return image

    async def submit(self, jobs: Sequence[Job]) -> None:
        """Queue all jobs, or none."""
        engine = self.service.engine
        most = min(max(engine.limits.count, MAX_FILES), engine.max_queue)  # more would never find room
        pictures = sum(getattr(job, "count", 1) for job in jobs)
        if pictures > most:
            raise Trouble(400, f"{pictures} pictures would be made; at most {most}.", "too_many", "n")

        def queue() -> None:
            try:
                for job in jobs:
                    self.tickets.append(engine.submit(job, deadline=self.left))
            except UniLIPError:
                self.cancel()
                raise

        await run_in_threadpool(queue)

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def finished(self) -> list[Result]:
        """Wait for all results; a client that leaves meanwhile cancels them."""

        async def listen() -> None:
            while (await self.request.receive())["type"] != "http.disconnect":
                pass
            self.cancel()

        listening = asyncio.ensure_future(listen())
        try:
            async for _ in merged(self.tickets):
                pass
            return self.results()
        finally:
            listening.cancel()
            self.cancel()

    def results(self) -> list[Result]:
        """What came of all jobs, counted. Raises UniLIPError: what one of them ended with."""
        found = [ticket.result(0) for ticket in self.tickets]
        for ticket, result in zip(self.tickets, found, strict=True):
            self.service.metrics.results.labels(ticket.verb).inc(len(result.images) or 1)
        return found

    async def told(self, patience: float) -> AsyncGenerator[tuple[str, Any], None]:
        """Yield kinds and values as the jobs go on: "waiting", where nothing came for `patience` seconds; "step", those
        done of all; "text", a piece; "partial", fields of a picture on the way.
        """
        steps = [0] * len(self.tickets)
        async for number, event in merged(self.tickets, patience):
            if event is None:
                yield "waiting", None
            elif event.kind == "step":
                steps[number] = event.step
                yield "step", {"step": sum(steps), "steps": sum(ticket.total for ticket in self.tickets)}
            elif event.kind == "text":
                yield "text", event.text
            elif event.image is not None:
                shown, size = await run_in_threadpool(self.encoded, event.image)
                data = base64.b64encode(shown).decode()
                yield "partial", {"b64_json": data, "partial_image_index": event.number, "size": size}

    def events(self, source: AsyncGenerator[str, None], done: str = "") -> StreamingResponse:
        """Send server-sent events, an error as the last of them, then `done`; who stops reading cancels the jobs."""

        async def body() -> AsyncGenerator[str, None]:
            try:
                async with aclosing(source):
                    async for event in source:
                        yield event
            except Exception as error:
                if not isinstance(error, UniLIPError):
                    logger.exception("a stream failed")
                yield f"data: {dumps(trouble(error).body)}\n\n"
            finally:
                self.cancel()
            if done:
                yield done

        return StreamingResponse(body(), media_type="text/event-stream", headers=NOT_STORED)

    # --- what is answered

    def notes(self) -> dict[str, Any]:
        """What an answer says beside itself: fields that were ignored, unlearned words and edits."""
        jobs, checker = [ticket.job for ticket in self.tickets], self.service.engine.checker
        warning = ""
        if not checker.config.sampling.joint:
            if any(isinstance(job, Edit) and job.others for job in jobs):
                warning = NOT_TAUGHT
            elif len(jobs) > 1 and getattr(self.body, "joint", False) is None:
                warning = APART
        texts = [job.question if isinstance(job, Ask) else getattr(job, "prompt", "") for job in jobs]
        if isinstance(self.body, schema.Variations) and "prompt" not in self.body.model_fields_set:
            texts = []  # the words are ours
        unread = list(dict.fromkeys(word for text in texts for word in checker.unread(text)))
        found = {"ignored": self.body.ignored, "unread": unread, "warning": warning}
        return {name: value for name, value in found.items() if value}

    def encoded(self, image: Image.Image, about: Mapping[str, Any] | None = None) -> tuple[bytes, str]:
        """Return the file of a picture, at the size that was asked for, and that size."""
        body, shaped = self.body, image if self.after is None else self.after(image)
        if body.size is not None:
            inside = self.after is not None or getattr(body, "keep_aspect", False)
            scale = ImageOps.contain if inside else Image.Image.resize
            shaped = scale(shaped, body.size, Image.Resampling.BICUBIC)
        quality = 95 if body.output_compression is None else body.output_compression
        return encode(shaped, body.output_format, quality, about), f"{shaped.width}x{shaped.height}"

    def picture_data(self, results: Sequence[Result]) -> list[dict[str, Any]]:
        """Encode all pictures of some results, in base64 or kept under an address."""
        service, data = self.service, []
        for ticket, result in zip(self.tickets, results, strict=True):
            for i, image in enumerate(result.images):
                about: dict[str, Any] = {"model": service.settings.model_name, "verb": ticket.verb}
                if adapters := result.settings.get("adapters"):
                    about["adapters"] = json.dumps(adapters)
                entry: dict[str, Any] = {}
                if result.seeds:
                    entry["seed"] = about["seed"] = result.seeds[i]
                    names = ("num_inference_steps", "guidance_scale", "solver", "preset", "width", "height")
                    about |= {name: result.settings[name] for name in names}
                if result.plan is not None:
                    entry["plan"] = about["plan"] = result.plan
                if result.psnr:
                    entry["psnr"] = round(result.psnr[i], 3) if math.isfinite(result.psnr[i]) else None
                encoded, entry["size"] = self.encoded(image, about if service.settings.metadata else None)
                if getattr(self.body, "response_format", "b64_json") == "url":
                    name = service.store.put(encoded, FORMATS[self.body.output_format])
                    entry["url"] = f"{str(self.request.base_url).rstrip('/')}{FILES}{name}"
                else:
                    entry["b64_json"] = base64.b64encode(encoded).decode()
                data.append(entry)
        return data

    def picture_usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Count tokens as OpenAI does: what was read, and the latent cells that were drawn."""
        grid = read = looked = 0
        for ticket, result in zip(self.tickets, results, strict=True):
            own = cells((result.settings["width"], result.settings["height"]))
            grid += own * len(result.images)
            seen = 0 if ticket.verb == "generate" else own
            looked += seen
            read += max(result.prompt_tokens, seen)
        details = {"text_tokens": read - looked, "image_tokens": looked}
        total = {"input_tokens": read, "output_tokens": grid, "total_tokens": read + grid}
        return total | {"input_tokens_details": details}
