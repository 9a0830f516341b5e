"""OpenAI's Responses (text, pictures, the tool `image_generation`), told in the terms of chat completions."""

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from unilip.errors import UniLIPError
from unilip.serve.service import WAITING, named_event
from unilip.serve.store import Store

DRAWING = ("size", "quality", "output_format", "output_compression", "partial_images")
OTHER = ("input", "instructions", "tools", "tool_choice", "max_output_tokens", "previous_response_id", "text")


def read(fields: Mapping[str, Any], kept: Store) -> dict[str, Any]:
    """Return the chat completion that asks for the same. Raises UniLIPError: bad form, or an earlier one is gone."""
    chat = {name: fields[name] for name in fields if name not in OTHER}
    given = fields.get("tools")
    tools = [tool for tool in given if isinstance(tool, dict)] if isinstance(given, list) else []
    drawing = next((tool for tool in tools if tool.get("type") == "image_generation"), None)
    others = [tool for tool in tools if tool is not drawing]
    choice = fields.get("tool_choice")
    wanted = choice.get("type") if isinstance(choice, dict) else choice
    if wanted == "image_generation" or (wanted == "required" and drawing is not None and not others):
        chat["modalities"] = ["image"]
    elif wanted not in (None, "auto", "none"):
        chat["tool_choice"] = "required"  # refused, with the words for it
    elif drawing is None or wanted == "none":
        chat["modalities"] = ["text"]
    chat |= {name: drawing[name] for name in DRAWING if drawing and name in drawing}
    chat |= {"tools": others} if others else {}
    form = (fields.get("text") or {}).get("format") if isinstance(fields.get("text"), dict) else None
    if isinstance(form, dict) and form.get("type") == "json_schema":  # flat here, in chats a level deeper
        form = {"type": "json_schema", "json_schema": form}
    chat |= {"response_format": form} if form else {}
    if "max_output_tokens" in fields:
        chat["max_tokens"] = fields["max_output_tokens"]
    messages = _messages(fields.get("input"), kept)
    if (earlier := fields.get("previous_response_id")) is not None:
        found = kept.get(str(earlier))
        if found is None:
            raise UniLIPError("previous_response_id names no response that is kept; send the conversation in `input`.")
        messages = [*json.loads(found[0]), *messages]
    if fields.get("instructions"):
        messages.insert(0, {"role": "system", "content": fields["instructions"]})
    return chat | {"messages": messages}


def _messages(given: Any, kept: Store) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise UniLIPError("input must be text, or a list of messages.")
    messages, kind = list[dict[str, Any]](), None
    for item in given:
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            content = item.get("content")
            parts = [_part(part) for part in content] if isinstance(content, list) else content
            messages.append({"role": item.get("role"), "content": parts})
        elif kind == "image_generation_call" and isinstance(item.get("result"), str):
            url = f"data:image/png;base64,{item['result']}"
            messages.append({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": url}}]})
        elif kind in ("image_generation_call", "item_reference"):
            messages.append(_kept(str(item.get("id")), kept))
        elif kind == "function_call_output":
            messages.append({"role": "tool", "content": str(item.get("output", ""))})
        elif kind not in ("function_call", "reasoning"):
            raise UniLIPError("input holds an item that is not understood; messages with text and pictures are.")
    if kind == "image_generation_call":  # OpenAI's guide names the picture after the words about it
        last = max((n for n, one in enumerate(messages) if one["role"] == "user"), default=-1)
        messages.append(messages.pop(last))
    whole = list[dict[str, Any]]()
    for one in messages:  # the items of one answer belong together
        same = whole and one["role"] == whole[-1]["role"] == "assistant"
        if same and isinstance(one["content"], list) and isinstance(whole[-1]["content"], list):
            whole[-1] = {"role": "assistant", "content": [*whole[-1]["content"], *one["content"]]}
        else:
            whole.append(one)
    return whole


def _kept(name: str, kept: Store) -> dict[str, Any]:
    """Return the answer that is an item of a kept response, by the item's id."""
    _, key, number = f"{name}__".split("_")[:3]
    if found := kept.get(f"resp_{key}"):
        content = json.loads(found[0])[-1]["content"]
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
        if number in map(str, range(len(parts))):
            return {"role": "assistant", "content": [parts[int(number)]]}
    raise UniLIPError("input names an item of no response that is kept; send the item itself.")


def _part(part: Any) -> Any:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("input_text", "output_text", "text"):
        return {"type": "text", "text": part.get("text")}
    if kind == "input_image":
        return {"type": "image_url", "image_url": {"url": part.get("image_url"), "detail": part.get("detail")}}
    raise UniLIPError("A message holds a part that is not understood; input_text and input_image are.")


class Answer:
    """One response, from what a chat completion would say."""

    def __init__(self, fields: Mapping[str, Any], chat: Mapping[str, Any], kept: Store, model: str) -> None:
        self.fields, self.chat, self.kept, self.model = fields, chat, kept, model
        self.key, self.created, self.number = secrets.token_hex(16), int(time.time()), -1
        self.id = f"resp_{self.key}"

    def whole(self, status: str, output: Sequence[Any] = (), said: Mapping[str, Any] | None = None) -> dict[str, Any]:
        used = (said or {}).get("usage") or {}
        read, made = used.get("prompt_tokens", 0), used.get("completion_tokens", 0)
        usage = {
            "input_tokens": read, "output_tokens": made, "total_tokens": read + made,
            "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
        }  # fmt: skip
        form = self.chat.get("response_format") or {"type": "text"}
        same = {name: self.fields.get(name) for name in ("instructions", "previous_response_id", "max_output_tokens")}
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "model": self.model,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(output), "usage": usage if said else None, **same, "parallel_tool_calls": True,
            "tool_choice": self.fields.get("tool_choice") or "auto", "tools": self.fields.get("tools") or [],
            "temperature": self.chat.get("temperature") or 0.0, "top_p": self.chat.get("top_p") or 1.0,
            "metadata": self.fields.get("metadata") or {}, "text": {"format": form.get("json_schema", form)},
            "truncation": "disabled",
            **({"unilip": said["unilip"]} if said else {}),
        }  # fmt: skip

    def finish(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """The response object at the end; the conversation is kept with it."""
        message = said["choices"][0]["message"]
        words, pictures = message["content"], message.get("images", ())
        content = [*pictures, {"type": "text", "text": words}] if pictures else words
        history = self.chat["messages"][1 if self.fields.get("instructions") else 0 :]  # which are of this one alone
        if self.fields.get("store") is not False:
            kept = json.dumps([*history, {"role": "assistant", "content": content}]).encode()
            self.kept.put(kept, "application/json", self.id)
        output = [self.picture(n, one["image_url"]["url"]) for n, one in enumerate(pictures)]
        output.append(self.text(len(output), words))  # beside pictures, too: the Agents SDK goes on until words come
        cut = said["choices"][0]["finish_reason"] == "length"
        return self.whole("incomplete" if cut else "completed", output, said)

    def event(self, kind: str, **more: Any) -> str:
        self.number += 1
        return named_event(f"response.{kind}", sequence_number=self.number, **more)

    async def events(self, pieces: AsyncIterator[tuple[str, Any]], drawn: bool) -> AsyncGenerator[str, None]:
        for kind in ("created", "in_progress"):
            yield self.event(kind, response=self.whole("in_progress"))
        for event in self.begun(0, first := self.picture(0) if drawn else self.text(0)):
            yield event
        where: dict[str, Any] = {"output_index": 0, "item_id": first["id"]}
        inside = where | {"content_index": 0}
        async for kind, value in pieces:
            if kind == "partial":
                shown = {"partial_image_b64": value["b64_json"], "partial_image_index": value["partial_image_index"]}
                yield self.event("image_generation_call.partial_image", **where, **shown)
            elif kind == "waiting":
                yield WAITING
            elif kind == "text":
                yield self.event("output_text.delta", **inside, delta=value, logprobs=[])
            elif kind == "end":
                done = self.finish(value)
        for number, one in enumerate(done["output"]):
            where = {"output_index": number, "item_id": one["id"]}
            inside = where | {"content_index": 0}
            if number:
                for event in self.begun(number, self.picture(number) if "result" in one else self.text(number)):
                    yield event
            if "result" in one:
                yield self.event("image_generation_call.completed", **where)
            else:
                words = one["content"][0]["text"]
                if number and words:
                    yield self.event("output_text.delta", **inside, delta=words, logprobs=[])
                yield self.event("output_text.done", **inside, text=words, logprobs=[])
                yield self.event("content_part.done", **inside, part=one["content"][0])
            yield self.event("output_item.done", output_index=number, item=one)
        yield self.event("incomplete" if done["status"] == "incomplete" else "completed", response=done)

    def begun(self, number: int, item: dict[str, Any]) -> Iterator[str]:
        """The events of an item of which nothing is there yet."""
        where, parts = {"output_index": number, "item_id": item["id"]}, item.pop("content", [])
        begin: dict[str, Any] = {"status": "in_progress"} | ({"content": []} if parts else {})
        yield self.event("output_item.added", output_index=number, item=item | begin)
        for part in parts:
            yield self.event("content_part.added", **where, content_index=0, part=part)
        for kind in () if parts else ("in_progress", "generating"):
            yield self.event(f"image_generation_call.{kind}", **where)

    def text(self, number: int, words: str = "") -> dict[str, Any]:
        """The item of words; its id says where `_kept` finds it."""
        part = {"type": "output_text", "text": words, "annotations": [], "logprobs": []}
        item = {"id": f"msg_{self.key}_{number}", "type": "message", "role": "assistant", "status": "completed"}
        return item | {"content": [part]}

    def picture(self, number: int, url: str = "") -> dict[str, Any]:
        """An item of a picture, from its data URL."""
        item = {"id": f"ig_{self.key}_{number}", "type": "image_generation_call", "status": "completed"}
        return item | {"result": url.partition(",")[2] or None}
