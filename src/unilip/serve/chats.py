"""OpenAI's chat completions and Responses: a conversation in, words or a picture out, whole or as a stream."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from unilip.intent import intent
from unilip.serve import responses, schema
from unilip.serve.conversation import TAKEN, Reader, as_json, read_conversation, wants_json
from unilip.serve.describe import json_body
from unilip.serve.jobs import Ask, Generate, Job, Result
from unilip.serve.pictures import FORMATS
from unilip.serve.problems import JSON, dumps
from unilip.serve.service import KEEP_ALIVE_SECONDS, WAITING, Service, Work


def routes(service: Service) -> APIRouter:
    """The routes of conversations."""
    router = APIRouter(prefix="/v1", tags=["chat"])

    @router.post("/intent", openapi_extra=json_body(schema.Intent))
    async def intention(request: Request) -> Response:
        """How a chat would take a message, and its words that training never read."""
        body, able = await service.read(request, schema.Intent), service.engine.checker
        verb, text = await run_in_threadpool(intent, body.text, body.has_picture)
        unread = await run_in_threadpool(able.unread, text)
        return JSON({"verb": verb if verb in able.verbs else "ask", "text": text, "unread": unread})

    @router.post(
        "/chat/completions",
        responses={200: {"description": "An answer; a stream of chunks where `stream` was asked for."}},
        openapi_extra=json_body(schema.Chat),
    )
    async def chat(request: Request) -> Response:
        """Talk about pictures, have them drawn and changed."""
        body = await service.read(request, schema.Chat)
        if body.partial_images is not None:  # a stream of chunks has no place for them
            body.partial_images = None
            body._ignored += ("partial_images",)
        talk = await start(service, request, body)
        if body.stream:
            return talk.events(talk.chunks(), "data: [DONE]\n\n")
        return JSON(await run_in_threadpool(talk.whole, await talk.finished()))

    @router.post("/responses")
    async def respond(request: Request) -> Response:
        """The same as chat completions, by OpenAI's Responses: text, pictures, the tool image_generation."""
        fields = await service.load(request)
        ours = await run_in_threadpool(responses.read, fields, service.conversations)
        body = await run_in_threadpool(schema.read, schema.Chat, ours, service.settings.strict)
        talk = await start(service, request, body, apart=True)
        answer = responses.Answer(fields, ours, service.conversations, service.named(body))
        if body.stream:
            return talk.events(answer.events(talk.pieces(), talk.drawn))
        return JSON(answer.finish(await run_in_threadpool(talk.whole, await talk.finished())))

    return router


class Talk(Work):
    """One answer of a conversation, whole or in pieces; where pictures are `apart`, they are never Markdown."""

    body: schema.Chat
    text = ""

    def __init__(self, service: Service, request: Request, body: schema.Chat, apart: bool) -> None:
        super().__init__(service, request, body)
        self.apart = apart or "image" in (body.modalities or ())  # who asks for pictures knows the field
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        self.stops = [stop for stop in stops if stop]
        self.json = wants_json(body)
        self.by_words = body.modalities is None and service.settings.chat == "auto" and not self.json

    @property
    def drawn(self) -> bool:
        return self.tickets[0].verb != "ask"

    def head(self, kind: str) -> dict[str, Any]:
        """What every chunk and the whole answer begin with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.named(self.body)}

    def pictures(self, results: Sequence[Result]) -> dict[str, Any]:
        """The content of an answer with pictures: Markdown for those who show text, parts for those who know them."""
        media = FORMATS[self.body.output_format]
        urls = [f"data:{media};base64,{entry['b64_json']}" for entry in self.picture_data(results)]
        note = f"*{TAKEN[self.tickets[0].verb]}*\n\n" if self.by_words else ""
        if self.apart:
            images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            return {"content": note.strip(), "images": images}
        label = " ".join(self.text.split())[:80].translate(str.maketrans("[]()!`\\", " " * 7))
        return {"content": note + "\n".join(f"![{label}]({url})" for url in urls)}

    def about(self, results: Sequence[Result]) -> dict[str, Any]:
        """What was done: an addition to OpenAI's fields."""
        seeds = [seed for result in results for seed in result.seeds]
        verb, first = self.tickets[0].verb, results[0]
        found = {"verb": verb, "seeds": seeds, "settings": dict(first.settings)}
        found |= {"taken": TAKEN[verb]} if self.by_words else {}
        found |= {"plan": first.plan} if first.plan is not None else {}
        if self.json and as_json(first.text)[1]:
            cut = ", cut at max_tokens" if first.finish_reason == "length" else ""
            found["wrapped"] = f"The model wrote no JSON object; its words{cut} are the field `answer` of one."
        return found | self.notes()

    def whole(self, results: Sequence[Result]) -> dict[str, Any]:
        if self.drawn:
            content, reason = self.pictures(results), "stop"
            made = self.picture_usage(results)["output_tokens"]
        else:
            made = results[0].completion_tokens
            text, cut = _cut(results[0].text, self.stops)
            content = {"content": as_json(text)[0] if self.json else text}
            # an object is whole, whatever came after it
            reason = "stop" if cut or self.json else results[0].finish_reason
        message = {"role": "assistant", "refusal": None, **content}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        read = sum(result.prompt_tokens for result in results)
        usage = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        more = {"choices": [choice], "usage": usage, "unilip": self.about(results)}
        return {**self.head("chat.completion"), **more}

    async def pieces(self) -> AsyncGenerator[tuple[str, Any], None]:
        """Yield kinds and values as `told` does, the text up to a stop; at last "end", the whole answer."""
        text, sent, stopped = "", 0, False
        hold = max((len(stop) - 1 for stop in self.stops), default=0)  # this much may be the beginning of a stop
        async for kind, value in self.told(KEEP_ALIVE_SECONDS):
            if kind != "text":
                yield kind, value
            elif not (stopped or self.json):
                text, stopped = _cut(text + value, self.stops)
                ready = len(text) if stopped else max(sent, len(text) - hold)
                if ready > sent:
                    yield "text", text[sent:ready]
                    sent = ready
        said = await run_in_threadpool(self.whole, self.results())
        rest = said["choices"][0]["message"]["content"] if self.json else text[sent:]
        if rest and not self.drawn:
            yield "text", rest
        yield "end", said

    def chunk(self, delta: dict[str, Any] | None, reason: str | None = None, **more: Any) -> str:
        """A chunk with a piece of the answer, or with other things alone."""
        choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}]
        return f"data: {dumps({**self.head('chat.completion.chunk'), 'choices': choices, **more})}\n\n"

    async def chunks(self) -> AsyncGenerator[str, None]:
        options = self.body.stream_options or schema.StreamOptions.model_validate({})
        yield self.chunk({"role": "assistant", "content": ""})
        async for kind, value in self.pieces():
            if kind == "waiting":
                yield WAITING
            elif kind == "step" and options.include_progress:
                yield self.chunk({}, unilip=value)
            elif kind == "text":
                yield self.chunk({"content": value})
            elif kind == "end":
                choice = value["choices"][0]
                if self.drawn:
                    said = choice["message"]
                    yield self.chunk({name: said[name] for name in ("content", "images") if name in said})
                yield self.chunk({}, choice["finish_reason"], unilip=value["unilip"])
                if options.include_usage:
                    yield self.chunk(None, usage=value["usage"])


async def start(service: Service, request: Request, body: schema.Chat, apart: bool = False) -> Talk:
    """Read a conversation, and queue what its last message wants."""
    talk, settings, engine = Talk(service, request, body, apart), service.settings, service.engine
    reader = Reader(talk)
    if settings.allow_url_images:
        await talk.in_time(None, reader.prefetch, body)
    with_pictures = any(part.image_url is not None or "](data:" in (part.text or "") for part in body.parts)
    pool = service.decoders if with_pictures else None
    verb, text, pictures, ask = await talk.in_time(pool, read_conversation, body, reader, engine.checker, settings.chat)
    jobs: Sequence[Job]
    if verb == "generate":
        jobs = [service.job(Generate, body, prompt=text)]
    elif verb == "edit":
        jobs = service.edits(pictures, body, prompt=text, keep_aspect=body.size is None)
    else:
        most = min(body.max_completion_tokens or body.max_tokens or 128, engine.limits.new_tokens)
        jobs = [service.job(Ask, body, **ask, max_new_tokens=most, lower=True)]
    talk.text = text
    await talk.submit(jobs)
    return talk


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """End a text before the first of the stops in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
