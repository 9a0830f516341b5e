"""The HTTP application: OpenAI's endpoints for pictures and chat, on an engine of this process or on replicas."""

import dataclasses
import functools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from unilip import __version__
from unilip.errors import UniLIPError
from unilip.serve import chats, front, images, schema, training
from unilip.serve.describe import page
from unilip.serve.guard import PAGE, Guard
from unilip.serve.metrics import CONTENT_TYPE, Metrics
from unilip.serve.problems import JSON, Trouble, dumps, trouble
from unilip.serve.service import Service
from unilip.serve.service import Settings as Settings
from unilip.serve.serving import Serving


def create_app(
    engine: Serving,
    settings: Settings | None = None,
    metrics: Metrics | None = None,
    trainer: training.Trainer | None = None,
) -> FastAPI:
    """Build the application around an engine, which it drains and closes when it is shut down, as it does a trainer."""
    settings = settings or Settings()
    metrics = metrics or Metrics()
    service = Service(engine, settings, metrics)

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
        openapi_url=None,  # nor pages of the description, for ours load nothing
    )
    app.state.engine, app.state.settings, app.state.metrics, app.state.server = engine, settings, metrics, service
    app.add_middleware(Guard, rules=settings.rules, metrics=metrics)
    metrics.queued.set_function(lambda: engine.stats().queued)
    metrics.running.set_function(lambda: engine.stats().running)

    async def failed(request: Request, error: Exception) -> Response:
        return trouble(error).response()

    for kind in (Trouble, UniLIPError, RequestValidationError, ValidationError, HTTPException):
        app.add_exception_handler(kind, failed)
    for router in (pages(app, settings), images.routes(service), chats.routes(service), operation(service)):
        app.include_router(router)
    if trainer is not None:
        app.include_router(training.routes(service, trainer))
    return app


def pages(app: FastAPI, settings: Settings) -> APIRouter:
    """The routes of the page for browsers, and of the description of the API."""
    router, files = APIRouter(include_in_schema=False), front.files()

    @router.get("/")
    async def root(request: Request) -> Response:
        """The page for browsers; for others a line that says what this is."""
        if "text/html" in request.headers.get("accept", ""):
            return await part("index.html")
        text = (
            f"unilip {__version__} serves {settings.model_name!r} by OpenAI's API: base URL .../v1, described at /docs;"
            " in a browser this address is a page to draw, change and ask."
        )
        return PlainTextResponse(text + "\n", headers={"Vary": "Accept"})

    @router.get(PAGE + "{name}")
    async def part(name: str) -> Response:
        """A script, a style sheet or an example of the page."""
        if name not in files:
            raise HTTPException(404)
        content, media = files[name]
        return Response(content, media_type=media, headers=front.HEADERS)

    @functools.cache  # anybody may ask for these, so that they must cost nothing
    def described_once() -> tuple[bytes, bytes]:
        return dumps(app.openapi()).encode(), page(app.openapi()).encode()

    @router.get("/openapi.json")
    async def openapi() -> Response:
        return Response(described_once()[0], media_type="application/json")

    @router.get("/docs")
    @router.get("/redoc")
    async def docs() -> Response:
        """The description of the API as a page that loads nothing."""
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(described_once()[1], headers=policy)

    return router


def operation(service: Service) -> APIRouter:
    """The routes that tell of the model, and of how the server does."""
    router, engine, started = APIRouter(), service.engine, int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": started,
            "owned_by": "unilip",
            "abilities": list(engine.verbs),
            "image_size": engine.config.image_size,
            "limits": dataclasses.asdict(engine.limits),
            "sampling": dataclasses.asdict(engine.config.sampling),
            "few_steps": list(engine.config.dit.few_steps),
            "about": dict(service.settings.about),
        }

    @router.get("/v1/models", tags=["models"])
    async def models() -> Response:
        """The model, and with each of its adapters."""
        return JSON({"object": "list", "data": [card(name) for name in service.names]})

    @router.get("/v1/models/{name:path}", tags=["models"])
    async def model(name: str) -> Response:
        """The model by its name."""
        if name not in service.names:
            raise Trouble(404, "There is no such model; /v1/models names what there is.", "model_not_found")
        return JSON(card(name))

    @router.get("/health", tags=["operation"])
    async def health() -> Response:
        """Whether the process does its work: 200, or 503."""
        stats, alive = engine.stats(), engine.alive
        state = {"status": "ok" if alive else "failed", "queued": stats.queued, "running": stats.running}
        return JSON(state, 200 if alive else 503)

    @router.get("/ready", tags=["operation"])
    async def ready() -> Response:
        """Whether requests should be sent here: 200, or 503 while it shuts down."""
        good = engine.alive and not engine.draining
        return JSON({"status": "ready" if good else "not ready"}, 200 if good else 503)

    @router.get("/metrics", tags=["operation"], responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    return router
