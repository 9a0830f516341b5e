"""The HTTP application: OpenAI's endpoints for pictures and chat, on an engine.

In:  requests that `Guard` let through; JSON, or forms with files. Out: JSON, server-sent events, pictures from memory.
Jobs go to the engine, which may be this process's own or a set of replicas; the application only needs its `submit`.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import dataclasses
import functools
import json
import logging
import math
import secrets
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse

from unilip import __version__
from unilip.errors import UniLIPError
from unilip.intent import intent
from unilip.method.config import UniLIPConfig
from unilip.sampling import NOT_TAUGHT, check_joint
from unilip.serve import front, responses, schema
from unilip.serve.checks import Checker, Limits
from unilip.serve.conversation import TAKEN, Reader, as_json, has_pictures, read_conversation, wants_json
from unilip.serve.describe import inlined, page
from unilip.serve.engine import Stats
from unilip.serve.fetch import fetch
from unilip.serve.guard import FILES, PAGE, STARTED, Guard, Rules
from unilip.serve.jobs import (
    Ask,
    Cancelled,
    DeadlineExceeded,
    Edit,
    Event,
    Generate,
    Job,
    QueueFull,
    Reconstruct,
    Result,
    Strengths,
)
from unilip.serve.metrics import CONTENT_TYPE, Metrics
from unilip.serve.pictures import FORMATS, decode, decode_mask, encode, outside_kept, sized
from unilip.serve.problems import JSON, Trouble, dumps, trouble, validation
from unilip.serve.store import Store
from unilip.serve.tickets import Ticket
from unilip.serve.training import KINDS, MOST, Trainer
from unilip.shapes import cells

logger = logging.getLogger(__name__)

MAX_FILES = 16
DECODERS = 2  # pictures of strangers that are decoded at the same time
FETCHERS = 8  # and fetched
IN_MEMORY = 8  # requests' worth of pixels that are kept at the same time
MARKDOWN = "![{}]({})"
NOT_STORED = {"Cache-Control": "no-store"}
_TEXT: dict[str, Any] = {"type": "string"}
TRAINING_FORM: dict[str, Any] = {"required": True, "content": {"multipart/form-data": {"schema": {
    "type": "object", "required": ["name", "kind", "texts", "image"],
    "properties": {
        "name": _TEXT, "kind": {"enum": list(KINDS)}, "steps": {"type": "integer"},
        "texts": {**_TEXT, "description": "A JSON list: a caption of each picture, or the instruction of each pair."},
        "image": {"type": "array", "items": {**_TEXT, "format": "binary"}},
    },
}}}}  # fmt: skip
APART = (
    "Each picture was changed by itself, for this model has not learned edits of several; joint=true asks for one all "
    "the same, joint=false for this without a warning."
)
KEEP_ALIVE_SECONDS = 15.0
QUEUE_SECONDS = 0.5  # between two words on the place in the queue, where progress is asked for

B = TypeVar("B", bound=schema.Body)
T = TypeVar("T")


class Serving(Protocol):
    """What the application needs of an engine."""

    config: UniLIPConfig
    limits: Limits
    deadline: float | None

    checker: Checker

    @property
    def verbs(self) -> tuple[str, ...]: ...
    @property
    def alive(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    def submit(self, job: Job, *, deadline: float | None = None) -> Ticket: ...
    def ahead(self, ticket: Ticket) -> int: ...
    def stats(self) -> Stats: ...
    def stop_accepting(self) -> None: ...
    def drain(self, timeout: float | None = None) -> bool: ...
    def close(self, timeout: float = 0.0) -> None: ...


@dataclass(frozen=True)
class Settings:
    """How the application behaves.

    Args:
        model_name: what the model is called in answers, in /v1/models and in the metadata of pictures.
        rules: who may ask, how often, how much.
        max_pixels: of all pictures of one request together.
        allow_url_images: fetch pictures from public http(s) addresses.
        metadata: write model and seed into the pictures.
        drain_seconds: at the end, how long to go on with what was accepted.
        strict: refuse fields that are not understood, instead of ignoring and naming them.
        chat: "auto" lets the words of a message decide whether to draw; "text" always answers in words, unless
            `modalities` asks for a picture.
        about: what the page says of the model, as JSON.
    """

    model_name: str = "unilip"
    rules: Rules = field(default_factory=Rules)
    max_pixels: int = 24_000_000
    allow_url_images: bool = False
    metadata: bool = True
    drain_seconds: float = 30.0
    strict: bool = False
    chat: Literal["auto", "text"] = "auto"
    about: Mapping[str, Any] = field(default_factory=dict)


class _Refused(Exception):
    """An answer that is not a success, from anywhere in a handler."""

    def __init__(self, found: Trouble) -> None:
        super().__init__(found.message)
        self.trouble = found


def create_app(
    engine: Serving, settings: Settings | None = None, metrics: Metrics | None = None, trainer: Trainer | None = None
) -> FastAPI:
    """Build the application around an engine, which it drains and closes when it is shut down, as it does a trainer."""
    settings = settings or Settings()
    metrics = metrics or Metrics()
    server = _Server(engine, settings, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        if trainer is not None:
            await run_in_threadpool(trainer.close)
        await run_in_threadpool(engine.close, settings.drain_seconds)

    failures: dict[int | str, dict[str, Any]] = {
        "4XX": {"model": schema.Failure, "description": "What is wrong with the request, or when to send it again."},
        503: {"model": schema.Failure, "description": "Shutting down, or a replica was lost; send it again."},
    }
    app = FastAPI(
        title="UniLIP",
        version=__version__,
        description="Pictures drawn, changed, asked about and reconstructed by one model; compatible with OpenAI.",
        lifespan=lifespan,
        responses=failures,
        default_response_class=JSON,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.engine, app.state.settings, app.state.metrics, app.state.server = engine, settings, metrics, server
    app.add_middleware(Guard, rules=settings.rules, metrics=metrics)
    metrics.watch(lambda: engine.stats().queued, lambda: engine.stats().running)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, _Refused)
        return error.trouble.response()

    async def bad_input(request: Request, error: Exception) -> Response:
        assert isinstance(error, UniLIPError)
        return trouble(error).response()

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation(error.errors()).response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = 400 if error.status_code == 422 else error.status_code
        codes = {404: "not_found", 405: "method_not_allowed"}
        text = "There is nothing here; see /docs for what there is." if status == 404 else str(error.detail)
        return Trouble(status, text, codes.get(status, "bad_request"), headers=error.headers or {}).response()

    handlers: dict[type[Exception], Any] = {
        _Refused: refused, UniLIPError: bad_input, RequestValidationError: invalid, HTTPException: http_error
    }  # fmt: skip
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    _routes(app, server)
    if trainer is not None:
        _training(app, server, trainer)
    return app


def _routes(app: FastAPI, server: _Server) -> None:
    settings, engine = server.settings, server.engine
    picture_answer: dict[int | str, dict[str, Any]] = {
        200: {"description": "The pictures; a stream of events where `stream` was asked for."}
    }

    def described(kind: type[schema.Body]) -> dict[str, Any]:
        """The OpenAPI description of a JSON body."""
        content = {"application/json": {"schema": inlined(kind.model_json_schema())}}
        return {"requestBody": {"required": True, "content": content}}

    def form(kind: type[schema.Body], mask: bool = False) -> dict[str, Any]:
        """The OpenAPI description of a form with files."""
        fields = kind.model_json_schema()
        file = {"type": "string", "contentMediaType": "application/octet-stream", "format": "binary"}
        files: dict[str, Any] = {"image": {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_FILES}}
        if mask:
            files["mask"] = file
        required = [*fields.get("required", ()), "image"]
        body = {**fields, "properties": {**fields["properties"], **files}, "required": required}
        return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": body}}}}

    files = front.files()

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        """The page for browsers; for others a line that says what this is."""
        if "text/html" in request.headers.get("accept", ""):
            return front.answer(files, front.INDEX)
        text = (
            f"unilip {__version__} serves {settings.model_name!r} by OpenAI's API: base URL .../v1, described at /docs;"
            " in a browser this address is a page to draw, change and ask."
        )
        return PlainTextResponse(text + "\n", headers={"Vary": "Accept"})

    @app.get(PAGE + "{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """A script, a style sheet or an example of the page."""
        if name not in files:
            raise HTTPException(404)
        return front.answer(files, name)

    @app.post("/v1/intent", openapi_extra=described(schema.Intent), tags=["chat"])
    async def intention(request: Request) -> Response:
        """How a chat would take a message, and its words that training never read."""
        body = await server.read(request, schema.Intent)
        verb, text = await run_in_threadpool(intent, body.text, body.has_picture)
        unread = await run_in_threadpool(engine.checker.unread, text)
        return JSON({"verb": verb if verb in engine.verbs else "ask", "text": text, "unread": unread})

    @functools.cache  # anybody may ask for these, so that they must cost nothing
    def described_once() -> tuple[bytes, bytes]:
        return dumps(app.openapi()).encode(), page(app.openapi()).encode()

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        """The description of the API."""
        return Response(described_once()[0], media_type="application/json")

    @app.get("/docs", include_in_schema=False)
    @app.get("/redoc", include_in_schema=False)
    async def docs() -> Response:
        """The description of the API as a page that loads nothing."""
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(described_once()[1], headers=policy)

    @app.post(
        "/v1/images/generations",
        responses=picture_answer,
        openapi_extra=described(schema.Generations),
        tags=["pictures"],
    )
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt."""
        body = await server.read(request, schema.Generations)
        job = Generate(body.prompt, count=body.n or 1, plan=body.plan, best_of=body.best_of, **server.drawing(body))
        return await server.pictures(request, body, [job], "image_generation")

    @app.post(
        "/v1/images/variations", responses=picture_answer, openapi_extra=form(schema.Variations), tags=["pictures"]
    )
    @app.post("/v1/images/edits", responses=picture_answer, openapi_extra=form(schema.Edits, True), tags=["pictures"])
    async def edits(request: Request) -> Response:
        """Change pictures as told: the first with the help of the others, or each by itself; none outside a `mask`."""
        kind = schema.Variations if request.url.path.endswith("variations") else schema.Edits
        fields, files = await read_form(request, settings.rules.max_body, {"image", "image[]", "mask"})
        body = server.parse(kind, fields)
        sources = [data for name, data in files if name != "mask"]
        masks = [data for name, data in files if name == "mask"]
        if body.joint is not None:
            check_joint(body.joint, len(sources))
        images, after = await server.in_time(request, body, server.decoders, server.decoded, sources, masks, body)
        common = server.drawing(body) | {"count": body.n or 1, "fit": body.fit, "keep_aspect": body.keeps_aspect}
        jobs = server.edits(images, body.prompt, body.joint, common)
        return await server.pictures(request, body, jobs, "image_edit", after)

    @app.post(
        "/v1/images/reconstructions",
        responses=picture_answer,
        openapi_extra=form(schema.Reconstructions),
        tags=["pictures"],
    )
    async def reconstructions(request: Request) -> Response:
        """Encode pictures and draw them again, with the PSNR of each in dB."""
        fields, files = await read_form(request, settings.rules.max_body, {"image", "image[]"})
        body = server.parse(schema.Reconstructions, fields)
        sources = [data for _, data in files]
        images, _ = await server.in_time(request, body, server.decoders, server.decoded, sources, [], body)
        size = schema.size_of(body.size)
        more = (size, body.image_size, body.fit, body.keep_aspect, server.strengths(body))
        jobs = [Reconstruct(image, *more) for image in images]
        return await server.pictures(request, body, jobs, "image_reconstruction")

    @app.post(
        "/v1/chat/completions",
        responses={200: {"description": "An answer; a stream of chunks where `stream` was asked for."}},
        openapi_extra=described(schema.Chat),
        tags=["chat"],
    )
    async def chat(request: Request) -> Response:
        """Talk about pictures, have them drawn and changed."""
        return await server.chat(request, await server.read(request, schema.Chat))

    @app.post("/v1/responses", tags=["chat"])
    async def respond(request: Request) -> Response:
        """The same as chat completions, by OpenAI's Responses: text, pictures, the tool image_generation."""
        return await server.respond(request)

    @app.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The model, and with each of its adapters."""
        return JSON({"object": "list", "data": [server.model_card(name) for name in server.names]})

    @app.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> Response:
        """The model by its name."""
        if name not in server.names:
            raise _Refused(Trouble(404, "There is no such model; /v1/models names what there is.", "model_not_found"))
        return JSON(server.model_card(name))

    @app.get(FILES + "{name}", tags=["pictures"], responses={200: {"content": {"image/png": {}}}})
    async def file(name: str) -> Response:
        """A picture that was asked for as a URL; it is forgotten after an hour."""
        found = server.store.get(name)
        if found is None:
            raise _Refused(Trouble(404, "There is no such picture, or it was forgotten by now.", "not_found"))
        data, media = found
        return Response(data, media_type=media, headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """Whether the process does its work: 200, or 503."""
        stats = engine.stats()
        state = {"status": "ok" if engine.alive else "failed", "queued": stats.queued, "running": stats.running}
        return JSON(state, 200 if engine.alive else 503)

    @app.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """Whether requests should be sent here: 200, or 503 while it shuts down."""
        good = engine.alive and not engine.draining
        return JSON({"status": "ready" if good else "not ready"}, 200 if good else 503)

    @app.get("/metrics", tags=["operation"], responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(server.metrics.page(), headers={"Content-Type": CONTENT_TYPE})


def _training(app: FastAPI, server: _Server, trainer: Trainer) -> None:
    """The routes of the page's trainings; what they answer is `Trainer.state`."""

    @app.get("/v1/training", tags=["training"])
    async def state() -> Response:
        """How the training goes, and which ones can be gone on with."""
        return JSON(await run_in_threadpool(trainer.state))

    @app.get("/v1/training/estimate", tags=["training"])
    async def estimate(kind: str, steps: int) -> Response:
        """Memory in GiB and hours that a training would take here."""
        return JSON(await run_in_threadpool(trainer.estimate, kind, steps))

    @app.get("/v1/training/sheet", tags=["training"])
    async def sheet() -> Response:
        """The newest picture of the progress: wanted above made."""
        if (found := trainer.sheet()) is None:
            raise _Refused(Trouble(404, "There is no picture of the training yet.", "not_found"))
        return Response(await run_in_threadpool(found.read_bytes), media_type="image/png", headers=NOT_STORED)

    @app.post("/v1/training", tags=["training"], openapi_extra={"requestBody": TRAINING_FORM})
    async def begin(request: Request) -> Response:
        """Train an adapter: files `image` in the order of `texts`; of edits each is followed by its result."""
        most = MOST * 2
        fields, files = await read_form(request, server.settings.rules.max_body, {"image"}, most)
        kind, each = fields.get("kind", ""), 2 if fields.get("kind") == "edit" else 1
        try:
            texts, steps = json.loads(fields.get("texts", "")), int(fields.get("steps", "300"))
        except (ValueError, RecursionError):
            raise _Refused(Trouble(400, "texts must be a JSON list, steps a whole number.", "invalid_form")) from None
        if not isinstance(texts, list) or len(texts) * each != len(files):
            raise _Refused(Trouble(400, f"{len(files)} pictures need {len(files) // each} texts.", "invalid_form"))

        def read() -> list[Image.Image]:
            images, left = [], server.settings.max_pixels
            for _, data in files:
                images.append(server.decode(data, left))
                left -= images[-1].width * images[-1].height
            return images

        images = await asyncio.get_running_loop().run_in_executor(server.decoders, read)
        samples = [(text, images[i * each : (i + 1) * each]) for i, text in enumerate(texts)]
        await run_in_threadpool(trainer.begin, fields.get("name", ""), kind, steps, samples)
        return JSON(await run_in_threadpool(trainer.state), 202)

    @app.post("/v1/training/continue", tags=["training"])
    async def go_on(request: Request) -> Response:
        """Go on with the training `name` that was stopped, or failed."""
        await run_in_threadpool(trainer.go_on, (await server.load(request)).get("name"))
        return JSON(await run_in_threadpool(trainer.state), 202)

    @app.post("/v1/training/stop", tags=["training"])
    async def stop() -> Response:
        """Stop the training, which saves itself."""
        trainer.stop()
        return JSON(await run_in_threadpool(trainer.state), 202)


# --- reading ----------------------------------------------------------------------------------------------------------


async def read_form(
    request: Request, max_body: int, allowed: set[str], most: int = MAX_FILES + 1
) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
    """Read a form in memory: its fields, and its files as (name, bytes) in their order."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise _Refused(Trouble(400, "Send a form: multipart/form-data with the file `image`.", "invalid_form"))
    parser = MultiPartParser(request.headers, request.stream(), max_files=most, max_fields=64, max_part_size=64 * 1024)
    parser.spool_max_size = max_body + 1  # what has no room in memory was refused before; nothing is spooled to disk
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise _Refused(Trouble(400, f"The form is malformed: {error.message}", "invalid_form")) from None
    except (ValueError, KeyError) as error:
        raise _Refused(Trouble(400, "The form is malformed; send multipart/form-data.", "invalid_form")) from error
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    for name, value in form.multi_items():
        shown = name.encode("ascii", "backslashreplace").decode()[:64]
        if isinstance(value, UploadFile):
            if name not in allowed:
                raise _Refused(Trouble(400, f"There is no file field {shown!r}.", "invalid_form", shown))
            files.append((name, await value.read()))
            await value.close()
        elif name in allowed:
            raise _Refused(Trouble(400, f"{shown} must be a file, not text.", "invalid_form", shown))
        elif name in fields:
            raise _Refused(Trouble(400, f"{shown} was given twice.", "invalid_form", shown))
        else:
            fields[name] = value
    if not any(name != "mask" for name, _ in files):
        raise _Refused(Trouble(400, "There is no picture; send it as the file `image`.", "invalid_form", "image"))
    return fields, files


# --- serving ----------------------------------------------------------------------------------------------------------

After = Callable[[int, Image.Image], Image.Image]


class _Server:
    """What the routes share."""

    def __init__(self, engine: Serving, settings: Settings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.store, self.conversations = Store(), Store(64 * 2**20)
        self.decoders = ThreadPoolExecutor(DECODERS, "unilip-decoder")  # a pool of its own, so that text need not wait
        self._fetchers = threading.BoundedSemaphore(FETCHERS)
        self._counting, self._pixels = threading.RLock(), 0
        self._started = int(time.time())

    @property
    def names(self) -> list[str]:
        """What `model` may be: the model, and the model with an adapter."""
        own = self.settings.model_name
        return [own, *(f"{own}:{name}" for name in self.engine.checker.adapters)]

    def named(self, body: schema.Adapting | schema.Reconstructions) -> str:
        """What the model that a request asks for is called in its answer."""
        return body.model if body.model in self.names else self.settings.model_name

    def strengths(self, body: schema.Adapting) -> Strengths:
        """The adapters that act on a request."""
        return body.strengths(self.engine.checker.adapters, self.settings.model_name)

    def model_card(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "unilip",
            "abilities": list(self.engine.verbs),
            "image_size": self.engine.config.image_size,
            "limits": dataclasses.asdict(self.engine.limits),
            "sampling": dataclasses.asdict(self.engine.config.sampling),
            "few_steps": list(self.engine.config.dit.few_steps),
            "about": dict(self.settings.about),
        }

    def notes(self, body: schema.Body, jobs: Sequence[Job]) -> dict[str, Any]:
        """What an answer says beside itself: fields that were ignored, unlearned words and edits."""
        taught, warning = self.engine.config.sampling.joint, ""
        if not taught and any(isinstance(job, Edit) and job.others for job in jobs):
            warning = NOT_TAUGHT
        elif not taught and len(jobs) > 1 and getattr(body, "joint", False) is None:
            warning = APART
        texts = [job.question if isinstance(job, Ask) else getattr(job, "prompt", "") for job in jobs]
        unread = list(dict.fromkeys(word for text in texts for word in self.engine.checker.unread(text)))
        found: tuple[tuple[str, Any], ...] = (("ignored", body.ignored), ("unread", unread), ("warning", warning))
        return {name: value for name, value in found if value}

    def drawing(self, body: schema.Drawing) -> dict[str, Any]:
        """The settings of a drawing, as a job takes them."""
        own = body.quality is not None and body.preset is None
        steps = schema.steps_of(body.quality, self.engine.config.sampling) if own else None
        return {
            "seed": body.seed,
            "steps": body.steps or (None if steps is None else min(steps, self.engine.limits.steps)),
            "guidance_scale": body.guidance,
            "solver": body.solver,
            "preset": body.preset or "quality",
            "negative_prompt": body.negative_prompt,
            "size": schema.size_of(body.size),
            "image_size": body.image_size,
            "adapters": self.strengths(body),
            "partials": (body.partial_images or 0) if getattr(body, "stream", False) else 0,
        }

    def together(self, joint: bool | None, count: int) -> bool:
        """Whether COUNT pictures belong to one edit, as OpenAI has it: else each is changed by itself."""
        return count > 1 and (self.engine.config.sampling.joint if joint is None else joint)

    def edits(
        self, images: Sequence[Image.Image], prompt: str, joint: bool | None, common: Mapping[str, Any]
    ) -> list[Job]:
        """One edit for each picture; or a joint one of the first, where that is asked for or the model learned it."""
        if self.together(joint, len(images)):
            return [Edit(images[0], prompt, others=tuple(images[1:]), **common)]
        return [Edit(image, prompt, **common) for image in images]

    def parse(self, kind: type[B], fields: dict[str, Any], form: bool = True) -> B:
        """Check the fields of a request."""
        try:
            return schema.read(kind, fields, self.settings.strict, form)
        except ValidationError as error:
            raise _Refused(validation([dict(e) for e in error.errors()])) from None

    async def read(self, request: Request, kind: type[B]) -> B:
        """Read and check a JSON body."""
        fields = await self.load(request)
        return await run_in_threadpool(self.parse, kind, fields, form=False)

    async def load(self, request: Request) -> dict[str, Any]:
        """Read a JSON body, outside the event loop."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise _Refused(Trouble(400, "Send JSON, with the header Content-Type: application/json.", "invalid_json"))
        data = await request.body()

        def load() -> dict[str, Any]:
            try:
                fields = json.loads(data)
            except (ValueError, RecursionError) as error:
                where = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
                raise _Refused(Trouble(400, f"The body is no valid JSON{where}.", "invalid_json")) from None
            if not isinstance(fields, dict):
                raise _Refused(Trouble(400, "The body must be a JSON object: {...}.", "invalid_json"))
            return fields

        return await run_in_threadpool(load)

    def left(self, request: Request, body: schema.Body) -> float | None:
        """Seconds that a request still has: its own deadline or the server's, whichever is earlier."""
        allowed = [seconds for seconds in (body.deadline, self.engine.deadline) if seconds is not None]
        return max(0.001, min(allowed) - (time.monotonic() - request.scope[STARTED])) if allowed else None

    async def in_time(
        self, request: Request, body: schema.Body, pool: ThreadPoolExecutor | None, work: Callable[..., T], *given: Any
    ) -> T:
        """Run something in a thread, for as long as the request has time."""
        context = contextvars.copy_context()
        future = asyncio.get_running_loop().run_in_executor(pool, lambda: context.run(work, *given))
        try:
            return await asyncio.wait_for(future, self.left(request, body))
        except asyncio.TimeoutError:
            raise DeadlineExceeded("The request's time was over before its pictures were read.", 1.0) from None

    def decode(self, data: bytes, max_pixels: int, how: Callable[[bytes, int], Image.Image] = decode) -> Image.Image:
        """Decode a picture in one of the decoders' threads: memory is what a decoder needs most."""
        if self._pixels > IN_MEMORY * self.settings.max_pixels:
            raise QueueFull("Too many pictures are being read at once; send the request again.", 2.0)
        image = how(data, max_pixels)
        size = image.width * image.height
        self._count_pixels(size)
        weakref.finalize(image, self._count_pixels, -size)  # given back with the picture's memory
        return image

    def _count_pixels(self, change: int) -> None:
        with self._counting:
            self._pixels += change

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """Fetch a picture in the calling thread; slow hosts must not keep all threads."""
        if not self._fetchers.acquire(blocking=False):
            raise QueueFull("Too many pictures are being fetched; send them as data URLs, or try again.", 5.0)
        try:
            return fetch(url, max_bytes)
        finally:
            self._fetchers.release()

    def decoded(
        self, files: Sequence[bytes], masks: Sequence[bytes], body: schema.Edits | schema.Reconstructions
    ) -> tuple[list[Image.Image], After | None]:
        """Decode the pictures of one request, which share `max_pixels`, and what keeps the outside of a mask."""
        if len(files) > MAX_FILES:
            raise _Refused(Trouble(400, f"{len(files)} pictures were sent; at most {MAX_FILES}.", "too_many", "image"))
        if masks:
            text = ""
            if len(masks) > 1:
                text = "More than one mask was sent; send one."
            elif body.fit == "crop":
                text = 'A mask cannot be kept when fit is "crop", which cuts the picture; use "resize" or "pad".'
            elif len(files) > 1 and not self.together(getattr(body, "joint", False), len(files)):
                text = "A mask belongs to one picture, but each of several is changed here; send one, or joint=true."
            if text:
                raise _Refused(Trouble(400, text, "invalid_mask", "fit" if body.fit == "crop" else "mask"))
        images, left = [], self.settings.max_pixels
        for data in files:
            images.append(self.decode(data, left))
            left -= images[-1].width * images[-1].height
        if not masks:
            return images, None
        mask, source = self.decode(masks[0], left, decode_mask), images[0]
        if mask.size != source.size:
            sizes = f"{mask.width}x{mask.height} px, the picture {source.width}x{source.height}"
            text = f"The mask has {sizes}; make them equal."
            raise _Refused(Trouble(400, text, "invalid_mask", "mask"))
        return images, lambda job, result: outside_kept(result, source, mask, body.fit)

    async def submit(self, request: Request, body: schema.Body, jobs: Sequence[Job]) -> list[Ticket]:
        """Queue all jobs, or none."""
        most = max(self.engine.limits.count, MAX_FILES)
        pictures = sum(getattr(job, "count", 1) for job in jobs)
        if pictures > most:
            raise _Refused(Trouble(400, f"{pictures} pictures would be made; at most {most}.", "too_many", "n"))

        def queue() -> list[Ticket]:
            tickets: list[Ticket] = []
            try:
                for job in jobs:
                    tickets.append(self.engine.submit(job, deadline=self.left(request, body)))
            except UniLIPError:
                for ticket in tickets:
                    ticket.cancel()
                raise
            return tickets

        return await run_in_threadpool(queue)

    async def finished(self, request: Request, tickets: Sequence[Ticket]) -> list[Result]:
        """Wait for all results; a client that leaves meanwhile cancels them."""
        results = asyncio.gather(*(ticket.result_async() for ticket in tickets))
        gone = asyncio.ensure_future(_left(request))
        try:
            waiting: set[asyncio.Future[Any]] = {results, gone}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not results.done():
                raise Cancelled("The client left.")
            return results.result()
        finally:
            gone.cancel()
            for ticket in tickets:
                ticket.cancel()
            if not results.done():
                results.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await results

    # pictures

    async def pictures(
        self,
        request: Request,
        body: schema.Images | schema.Reconstructions,
        jobs: Sequence[Job],
        kind: str,
        after: After | None = None,
    ) -> Response:
        """Answer with pictures: JSON, or a stream of events."""
        tickets = await self.submit(request, body, jobs)
        if getattr(body, "stream", False):
            assert isinstance(body, schema.Images)
            return events(self.picture_events(tickets, body, kind, after, self.notes(body, jobs)))
        results = await self.finished(request, tickets)
        base, notes = str(request.base_url).rstrip("/"), self.notes(body, jobs)
        data = await run_in_threadpool(self.picture_data, tickets, results, body, after, base)
        return JSON({
            "created": int(time.time()),
            "model": self.named(body),
            "data": data,
            "output_format": body.output_format,
            "size": data[0]["size"],
            "usage": self.picture_usage(tickets, results),
            **({"unilip": notes} if notes else {}),
        })  # fmt: skip

    async def picture_events(
        self, tickets: Sequence[Ticket], body: schema.Images, kind: str, after: After | None, notes: dict[str, Any]
    ) -> AsyncIterator[str]:
        """Yield the place in the queue and progress, then a completed event for each picture."""
        steps = [0] * len(tickets)
        async for number, event in merged(tickets, QUEUE_SECONDS if body.include_progress else KEEP_ALIVE_SECONDS):
            if event is None:
                ahead = self.engine.ahead(tickets[0]) if body.include_progress else 0
                queued = {"type": f"{kind}.queued", "ahead": ahead}
                yield f"event: {kind}.queued\ndata: {dumps(queued)}\n\n" if ahead else ": waiting\n\n"
            elif event.kind == "step" and body.include_progress:
                steps[number] = event.step
                total = sum(ticket.total for ticket in tickets)
                progress = {"type": f"{kind}.progress", "step": sum(steps), "steps": total}
                yield f"event: {kind}.progress\ndata: {dumps(progress)}\n\n"
            elif event.kind == "partial" and event.image is not None:
                shown = await run_in_threadpool(self.encoded, event.image, body, number, after)
                part = {
                    "type": f"{kind}.partial_image", "b64_json": base64.b64encode(shown[0]).decode(),
                    "partial_image_index": event.number, "size": shown[1], **self.said(body),
                }  # fmt: skip
                yield f"event: {kind}.partial_image\ndata: {dumps(part)}\n\n"
        results = [ticket.result(0) for ticket in tickets]
        usage = self.picture_usage(tickets, results)
        for entry in await run_in_threadpool(self.picture_data, tickets, results, body, after, ""):
            done = {"type": f"{kind}.completed", **entry, **self.said(body), "usage": usage}
            done |= {"unilip": notes} if notes else {}
            yield f"event: {kind}.completed\ndata: {dumps(done)}\n\n"

    def said(self, body: schema.Drawing) -> dict[str, Any]:
        """What every event with a picture tells about it."""
        return {
            "created_at": int(time.time()), "background": "opaque",
            "output_format": body.output_format, "quality": _quality(body.quality),
        }  # fmt: skip

    def encoded(
        self,
        image: Image.Image,
        body: schema.Drawing | schema.Reconstructions,
        number: int,
        after: After | None,
        about: Mapping[str, Any] | None = None,
    ) -> tuple[bytes, str]:
        """Return the file of a picture of the ticket `number`, at the size that was asked for, and that size."""
        wanted, shaped = schema.size_of(body.size), image if after is None else after(number, image)
        if wanted is not None:
            shaped = sized(shaped, wanted, after is not None or bool(getattr(body, "keep_aspect", False)))
        quality = 95 if body.output_compression is None else body.output_compression
        return encode(shaped, body.output_format, quality, about), f"{shaped.width}x{shaped.height}"

    def picture_data(
        self,
        tickets: Sequence[Ticket],
        results: Sequence[Result],
        body: schema.Drawing | schema.Reconstructions,
        after: After | None,
        base: str,
    ) -> list[dict[str, Any]]:
        """Encode all pictures of some results."""
        data = []
        for number, (ticket, result) in enumerate(zip(tickets, results, strict=True)):
            for i, image in enumerate(result.images):
                about: dict[str, Any] = {"model": self.settings.model_name, "verb": ticket.verb}
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
                noted = about if self.settings.metadata else None
                encoded, entry["size"] = self.encoded(image, body, number, after, noted)
                if getattr(body, "response_format", "b64_json") == "url":
                    name = self.store.put(encoded, FORMATS[body.output_format])
                    entry["url"] = f"{base}{FILES}{name}"
                else:
                    entry["b64_json"] = base64.b64encode(encoded).decode()
                data.append(entry)
        return data

    def picture_usage(self, tickets: Sequence[Ticket], results: Sequence[Result]) -> dict[str, Any]:
        """Count tokens as OpenAI does: what was read, and the latent cells that were drawn."""
        grid = 0
        read = looked = 0
        for ticket, result in zip(tickets, results, strict=True):
            own = cells((result.settings["width"], result.settings["height"]))
            grid += own * len(result.images)
            seen = 0 if ticket.verb == "generate" else own
            looked += seen
            read += max(result.prompt_tokens, seen)
        return {
            "input_tokens": read,
            "output_tokens": grid,
            "total_tokens": read + grid,
            "input_tokens_details": {"text_tokens": read - looked, "image_tokens": looked},
        }

    # chat

    async def chat(self, request: Request, body: schema.Chat) -> Response:
        """Answer the last message of a conversation."""
        if body.partial_images is not None:  # a stream of chunks has no place for them
            body.partial_images = None
            body._ignored = (*body.ignored, "partial_images")
        talk = await self.start(request, body)
        if body.stream:
            return events(talk.chunks(), done="[DONE]")
        return JSON(talk.whole(await self.finished(request, talk.tickets)))

    async def respond(self, request: Request) -> Response:
        """Answer in the form of OpenAI's Responses."""
        fields = await self.load(request)
        ours = await run_in_threadpool(responses.read, fields, self.conversations)
        body = await run_in_threadpool(self.parse, schema.Chat, ours, form=False)
        talk = await self.start(request, body)
        answer = responses.Answer(fields, ours, self.conversations, self.named(body))

        def urls(said: Mapping[str, Any]) -> list[str]:
            return [part["image_url"]["url"] for part in said["choices"][0]["message"].get("images", ())]

        if body.stream:
            return events(answer.events(talk.pieces(), talk.drawn, urls))
        said = await run_in_threadpool(talk.whole, await self.finished(request, talk.tickets), True)
        return JSON(answer.finish(said, urls(said)))

    async def start(self, request: Request, body: schema.Chat) -> _Talk:
        """Read a conversation, and queue what its last message wants."""
        settings = self.settings
        reader = Reader(
            settings.max_pixels, settings.rules.max_body, settings.allow_url_images, self.store, self.decode, self.fetch
        )
        pool = self.decoders if has_pictures(body) else None
        if settings.allow_url_images:
            await self.in_time(request, body, None, reader.prefetch, body)
        found = await self.in_time(request, body, pool, read_conversation, body, reader, self.engine, settings.chat)
        common = self.drawing(body)
        if found.verb == "generate":
            jobs: list[Job] = [Generate(found.text, **common)]
        elif found.verb == "edit":
            keep = schema.size_of(body.size) is None
            jobs = self.edits(found.pictures, found.text, body.joint, common | {"keep_aspect": keep})
        else:
            more = {"max_new_tokens": self.answer_length(body), "adapters": common["adapters"]}
            jobs = [dataclasses.replace(found.ask, lower=True, **more)]
        return _Talk(self, body, await self.submit(request, body, jobs), found.text)

    def answer_length(self, body: schema.Chat) -> int:
        """The most tokens of an answer: what was asked for, as far as the server allows."""
        asked = body.max_completion_tokens or body.max_tokens
        return min(asked or 128, self.engine.limits.new_tokens)


class _Talk:
    """One answer of a conversation, whole or in chunks."""

    def __init__(self, server: _Server, body: schema.Chat, tickets: Sequence[Ticket], text: str) -> None:
        self.server, self.body, self.tickets, self.text = server, body, tickets, text
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.stops = [stop for stop in stops if stop]
        self.json = wants_json(body)
        self.by_words = body.modalities is None and server.settings.chat == "auto" and not self.json

    @property
    def drawn(self) -> bool:
        """Whether the answer is a picture."""
        return self.tickets[0].verb != "ask"

    def head(self, kind: str) -> dict[str, Any]:
        """What every chunk and the whole answer begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.server.named(self.body)}

    def pictures(self, results: Sequence[Result], apart: bool = False) -> dict[str, Any]:
        """The content of an answer with pictures: Markdown for those who show text, parts for those who know them."""
        label = " ".join(self.text.split())[:80].translate(str.maketrans("[]()!", "     "))
        urls = [
            f"data:{FORMATS[self.body.output_format]};base64,{entry['b64_json']}"
            for entry in self.server.picture_data(self.tickets, results, self.body, None, "")
        ]
        if apart or "image" in (
            self.body.modalities or ()
        ):  # who asks for pictures knows the field; all others read Markdown
            return {"content": "", "images": [{"type": "image_url", "image_url": {"url": url}} for url in urls]}
        note = f"*{TAKEN[self.tickets[0].verb]}*\n\n" if self.by_words else ""
        return {"content": note + "\n".join(MARKDOWN.format(label, url) for url in urls)}

    def about(self, results: Sequence[Result]) -> dict[str, Any]:
        """What was done: an addition to OpenAI's fields."""
        seeds = [seed for result in results for seed in result.seeds]
        verb = self.tickets[0].verb
        found = {"verb": verb, "seeds": seeds, "settings": dict(results[0].settings)}
        found |= {"taken": TAKEN[verb]} if self.by_words else {}
        found |= {"plan": results[0].plan} if results[0].plan is not None else {}
        if self.json and as_json(results[0].text)[1]:
            cut = ", cut at max_tokens" if results[0].finish_reason == "length" else ""
            found["wrapped"] = f"The model wrote no JSON object; its words{cut} are the field `answer` of one."
        return found | self.server.notes(self.body, [ticket.job for ticket in self.tickets])

    def usage(self, results: Sequence[Result]) -> dict[str, Any]:
        """Count tokens."""
        read = sum(result.prompt_tokens for result in results)
        made = sum(result.completion_tokens for result in results)
        if self.drawn:
            made = self.server.picture_usage(self.tickets, results)["output_tokens"]
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}

    def whole(self, results: Sequence[Result], apart: bool = False) -> dict[str, Any]:
        """The answer as one object; with `apart` its pictures are never Markdown."""
        reason = "stop" if self.drawn else results[0].finish_reason
        if self.drawn:
            content = self.pictures(results, apart)
        else:
            text, cut = _cut(results[0].text, self.stops)
            content = {"content": as_json(text)[0] if self.json else text}
            reason = "stop" if cut or self.json else reason  # an object is whole, whatever came after it
        message = {"role": "assistant", "refusal": None, **content}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        more = {"choices": [choice], "usage": self.usage(results), "unilip": self.about(results)}
        return {**self.head("chat.completion"), **more}

    def chunk(self, delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
        """One event of the stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return f"data: {dumps({**self.head('chat.completion.chunk'), 'choices': [choice], **more})}\n\n"

    async def pieces(self) -> AsyncIterator[str | dict[str, Any]]:
        """Yield pieces of text as they come, comments (": ...") meanwhile, and at last the whole answer."""
        async for number, event in merged(self.tickets):
            if event is None:
                yield ": waiting\n\n"
            elif event.kind == "text" and not self.json:
                yield event.text
            elif event.kind == "partial" and event.image is not None:
                shown, _ = await run_in_threadpool(self.server.encoded, event.image, self.body, number, None)
                data = base64.b64encode(shown).decode()
                yield {"partial_image_b64": data, "partial_image_index": event.number}
        said = await run_in_threadpool(self.whole, [ticket.result(0) for ticket in self.tickets], True)
        if self.json:
            yield said["choices"][0]["message"]["content"]
        yield said

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the answer as it comes."""
        options = self.body.stream_options or schema.StreamOptions.model_validate({})
        yield self.chunk({"role": "assistant", "content": ""})
        steps = [0] * len(self.tickets)
        text, sent, stopped = "", 0, False
        hold = max((len(stop) - 1 for stop in self.stops), default=0)  # this much may be the beginning of a stop
        async for number, event in merged(self.tickets):
            if event is None:
                yield ": waiting\n\n"
            elif event.kind == "step" and options.include_progress:
                steps[number] = event.step
                total = sum(ticket.total for ticket in self.tickets)
                yield self.chunk({}, unilip={"step": sum(steps), "steps": total})
            elif event.kind == "text" and not stopped:
                text, stopped = _cut(text + event.text, self.stops)
                ready = sent if self.json else len(text) if stopped else max(sent, len(text) - hold)
                if ready > sent:
                    yield self.chunk({"content": text[sent:ready]})
                    sent = ready
        results = [ticket.result(0) for ticket in self.tickets]
        if self.drawn:
            yield self.chunk(await run_in_threadpool(self.pictures, results))
        elif sent < len(text) or self.json:
            yield self.chunk({"content": as_json(text)[0] if self.json else text[sent:]})
        reason = "stop" if self.drawn or stopped or self.json else results[0].finish_reason
        yield self.chunk({}, reason, unilip=self.about(results))
        if options.include_usage:
            usage = {**self.head("chat.completion.chunk"), "choices": [], "usage": self.usage(results)}
            yield f"data: {dumps(usage)}\n\n"


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """End a text before the first of the stops in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def _quality(quality: str | None) -> str:
    return {"standard": "medium", "hd": "high", None: "auto"}.get(quality, quality or "auto")


async def _left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def merged(
    tickets: Sequence[Ticket], patience: float = KEEP_ALIVE_SECONDS
) -> AsyncIterator[tuple[int, Event | None]]:
    """Yield the events of several tickets as they come, and None after `patience` seconds in which nothing happens.

    Ends when all tickets have; a consumer that stops earlier cancels them.
    """
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

    def listener(number: int) -> Callable[[Event], None]:
        def put(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, (number, event))

        return put

    for number, ticket in enumerate(tickets):
        ticket.listen(listener(number))
    left = len(tickets)
    try:
        while left:
            try:
                number, event = await asyncio.wait_for(queue.get(), patience)
            except asyncio.TimeoutError:
                yield 0, None
                continue
            if event.kind == "end":
                left -= 1
                tickets[number].result(0)
            else:
                yield number, event
    finally:
        for ticket in tickets:
            ticket.cancel()


def events(source: AsyncIterator[str], done: str | None = None) -> StreamingResponse:
    """Send server-sent events; an error on the way becomes the last event."""

    async def body() -> AsyncIterator[str]:
        try:
            async for event in source:
                yield event
        except UniLIPError as error:
            yield f"data: {dumps(trouble(error).body)}\n\n"
        except Exception:
            logger.exception("a stream failed")
            text = "Something went wrong in the server; its log says more."
            yield f"data: {dumps(Trouble(500, text, 'internal_error').body)}\n\n"
        finally:
            closing: Callable[[], Coroutine[Any, Any, None]] | None = getattr(source, "aclose", None)
            if closing is not None:
                await closing()
        if done is not None:
            yield f"data: {done}\n\n"

    return StreamingResponse(body(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
