"""OpenAI's endpoints for pictures: JSON or forms in, JSON (base64, or addresses in memory) or streamed events out."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from unilip.sampling import check_joint
from unilip.serve import schema
from unilip.serve.describe import form_body, json_body
from unilip.serve.guard import FILES
from unilip.serve.jobs import Generate, Job, Reconstruct
from unilip.serve.pictures import decode_mask, outside_kept
from unilip.serve.problems import JSON, Trouble
from unilip.serve.service import KEEP_ALIVE_SECONDS, MAX_FILES, WAITING, Files, Service, Work, named_event

QUEUE_SECONDS = 0.5  # between two words on the place in the queue, where progress is asked for
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "The pictures; a stream of events where `stream` was asked for."}
}
IMAGE = {"image": MAX_FILES}


def routes(service: Service) -> APIRouter:
    """The routes of pictures."""
    router = APIRouter(prefix="/v1/images", tags=["pictures"])

    @router.post("/generations", responses=ANSWER, openapi_extra=json_body(schema.Generations))
    async def generations(request: Request) -> Response:
        """Draw pictures of a prompt."""
        body = await service.read(request, schema.Generations)
        return await answer(Work(service, request, body), [service.job(Generate, body)], "image_generation")

    @router.post("/variations", responses=ANSWER, openapi_extra=form_body(schema.Variations, IMAGE))
    @router.post("/edits", responses=ANSWER, openapi_extra=form_body(schema.Edits, IMAGE | {"mask": 1}))
    async def edits(request: Request) -> Response:
        """Change pictures as told: the first with the help of the others, or each by itself; none outside a `mask`."""
        kind = schema.Variations if request.url.path.endswith("variations") else schema.Edits
        body, files = await service.form(request, kind, "image", "image[]", "mask")
        if body.joint is not None:
            check_joint(body.joint, sum(name != "mask" for name, _ in files))
        work = Work(service, request, body)
        images = await work.in_time(service.decoders, decoded, work, files)
        return await answer(work, service.edits(images, body, keep_aspect=body.keeps_aspect), "image_edit")

    @router.post("/reconstructions", responses=ANSWER, openapi_extra=form_body(schema.Reconstructions, IMAGE))
    async def reconstructions(request: Request) -> Response:
        """Encode pictures and draw them again, with the PSNR of each in dB."""
        body, files = await service.form(request, schema.Reconstructions, "image", "image[]")
        work = Work(service, request, body)
        images = await work.in_time(service.decoders, decoded, work, files)
        jobs = [service.job(Reconstruct, body, image=image) for image in images]
        return await answer(work, jobs, "image_reconstruction")

    @router.get(FILES.removeprefix(router.prefix) + "{name}", responses={200: {"content": {"image/png": {}}}})
    async def file(name: str) -> Response:
        """A picture that was asked for as a URL; it is forgotten after an hour."""
        found = service.store.get(name)
        if found is None:
            raise Trouble(404, "There is no such picture, or it was forgotten by now.", "not_found")
        data, media = found
        return Response(data, media_type=media, headers={"Cache-Control": "private, max-age=3600"})

    return router


def decoded(work: Work, files: Files) -> list[Image.Image]:
    """Decode the pictures of one request; where it has a mask, what is outside of that is kept in the end."""
    service, body = work.service, work.body
    sources = [data for name, data in files if name != "mask"]
    masks = [data for name, data in files if name == "mask"]
    if len(sources) > MAX_FILES:
        raise Trouble(400, f"{len(sources)} pictures were sent; at most {MAX_FILES}.", "too_many", "image")
    text = ""
    if len(masks) > 1:
        text = "More than one mask was sent; send one."
    elif masks and body.fit == "crop":
        text = 'A mask cannot be kept when fit is "crop", which cuts the picture; use "resize" or "pad".'
    elif masks and len(sources) > 1 and not service.together(getattr(body, "joint", False), len(sources)):
        text = "A mask belongs to one picture, but each of several is changed here; send one, or joint=true."
    if text:
        raise Trouble(400, text, "invalid_mask", "fit" if body.fit == "crop" else "mask")
    images = [work.decode(data) for data in sources]
    if masks:
        mask, source = work.decode(masks[0], decode_mask), images[0]
        if mask.size != source.size:
            sizes = f"{mask.width}x{mask.height} px, the picture {source.width}x{source.height}"
            raise Trouble(400, f"The mask has {sizes}; make them equal.", "invalid_mask", "mask")
        work.after = lambda result: outside_kept(result, source, mask, body.fit)
    return images


async def answer(work: Work, jobs: Sequence[Job], kind: str) -> Response:
    """Answer with the pictures of some jobs: JSON, or a stream of events."""
    await work.submit(jobs)
    notes = work.notes()
    extra = {"unilip": notes} if notes else {}
    if getattr(work.body, "stream", False):
        return work.events(picture_events(work, kind, extra))
    results = await work.finished()
    data = await run_in_threadpool(work.picture_data, results)
    return JSON({
        "created": int(time.time()),
        "model": work.service.named(work.body),
        "data": data,
        "output_format": work.body.output_format,
        "size": data[0]["size"],
        "usage": work.picture_usage(results),
        **extra,
    })  # fmt: skip


async def picture_events(work: Work, kind: str, extra: dict[str, Any]) -> AsyncGenerator[str, None]:
    """Yield the place in the queue and progress, then a completed event for each picture."""
    body: schema.Images = work.body
    quality = {"standard": "medium", "hd": "high", None: "auto"}.get(body.quality, body.quality)
    same = {"background": "opaque", "output_format": body.output_format, "quality": quality}

    async for told, value in work.told(QUEUE_SECONDS if body.include_progress else KEEP_ALIVE_SECONDS):
        if told == "waiting":
            ahead = work.service.engine.ahead(work.tickets[0]) if body.include_progress else 0
            yield named_event(f"{kind}.queued", ahead=ahead) if ahead else WAITING
        elif told == "step" and body.include_progress:
            yield named_event(f"{kind}.progress", **value)
        elif told == "partial":
            yield named_event(f"{kind}.partial_image", **value, created_at=int(time.time()), **same)
    results = work.results()
    usage = work.picture_usage(results)
    for entry in await run_in_threadpool(work.picture_data, results):
        yield named_event(f"{kind}.completed", **entry, created_at=int(time.time()), **same, usage=usage, **extra)
