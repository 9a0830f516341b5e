"""Errors -> answers in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, and when to try again."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from unilip.errors import ImageError, PromptError, UniLIPError
from unilip.files import read_table
from unilip.serve.jobs import EngineError

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class JSON(Response):
    """A JSON answer in plain ASCII, so that half a surrogate pair in what a client sent cannot break it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content).encode("ascii")


def dumps(content: Any) -> str:
    """Encode as compact ASCII JSON; NaN is a mistake of ours."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


@dataclass(eq=False)
class Trouble(Exception):
    """An answer that is not a success: a status, what to say, how many seconds to wait before trying again."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSON:
        wait = {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}
        return JSON(self.body, self.status, {**wait, **self.headers})


def trouble(error: Exception) -> Trouble:
    """Turn an error of ours, or of the framework about a request, into its answer; any other is the server's fault."""
    if isinstance(error, Trouble):
        return error
    if isinstance(error, (RequestValidationError, ValidationError)):
        return validation(error.errors())
    if isinstance(error, HTTPException):
        status = 400 if error.status_code == 422 else error.status_code
        codes = {404: "not_found", 405: "method_not_allowed"}
        text = "There is nothing here; see /docs for what there is." if status == 404 else str(error.detail)
        return Trouble(status, text, codes.get(status, "bad_request"), headers=error.headers or {})
    if isinstance(error, EngineError):
        return Trouble(error.status, str(error), error.code, retry_after=error.retry_after)
    if not isinstance(error, UniLIPError):
        return Trouble(500, "Something went wrong in the server; its log says more.", "internal_error")
    what = "image" if isinstance(error, ImageError) else "prompt" if isinstance(error, PromptError) else "value"
    return Trouble(400, str(error), f"invalid_{what}")


# What is said of pydantic's complaints by their type, and of some fields whatever is wrong with them.
SAID: dict[str, dict[str, str]] = read_table("unilip.serve", "problems.json")
_KINDS = ("string_type", "list_type", "dict_type")  # a way that was not meant at all
_WAY = re.compile(
    r"body|query|str|bool|constrained-.*|(list|dict|literal)\[.*", re.DOTALL
)  # of several that a field has


def validation(errors: Sequence[Mapping[str, Any]]) -> Trouble:
    """Turn pydantic's complaints into one: of the way that went furthest, and how many more there are.

    What was sent is not repeated.
    """
    first = max(errors, key=lambda one: (len(one["loc"]), one["type"] not in _KINDS))
    parts = [str(part) for part in first["loc"] if not _WAY.fullmatch(str(part))]
    place = ".".join(parts).encode("ascii", "backslashreplace").decode()[:200]
    message = str(first["msg"]).removeprefix("Value error, ")
    known = SAID["words"].get(first["type"])
    if place in SAID["fields"] and first["type"] in ("literal_error", "too_long", "extra_forbidden"):
        known = SAID["fields"][place]
    if known is not None:
        message = known.format(**first.get("ctx", {}))
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    if place and not message.startswith(f"{place} "):
        message = f"{place}{' ' if known else ': '}{message}"
    return Trouble(400, f"{message}{more}"[:1000], str(first["type"])[:80], place or None)
