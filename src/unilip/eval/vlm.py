"""A vision-language model behind an OpenAI-compatible address, as a judge of pictures.

Every question gets an answer with a status: "ok", "refused", "unparsable" or "failed"; only "ok" has a value. Answers
are kept on disk, so a rerun asks only what is open. Nothing that the judge did not say becomes a score.
"""

import contextlib
import hashlib
import json
import os
import re
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unilip.errors import UniLIPError, install, reason
from unilip.files import write_json

STATUSES = ("ok", "refused", "unparsable", "failed")
SPENT = ("requests", "from_cache", "retries", "tokens_in", "tokens_out")
# A refusal is an answer that says so in its first words and that cannot be read as a score.
REFUSAL = re.compile(
    r"^\W*(i['’]?m (really |very )?sorry|i am sorry|sorry|i (can(no|')?t|can’t|am unable|am not able|won['’]?t)|"
    r"unfortunately,? i|as an ai)",
    re.IGNORECASE,
)
POLICY = ("content_policy_violation", "content_filter", "ResponsibleAIPolicyViolation", "moderation_blocked")
ATTEMPTS = 3  # at an answer that can be read
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One thing to ask: texts and PNG bytes in order; `read` returns None for what it cannot read."""

    key: str
    parts: tuple[str | bytes, ...]
    read: Callable[[str], Any]
    system: str = ""
    max_tokens: int = 500


@dataclass(frozen=True)
class Answer:
    """What came of a question: the value only where the status is "ok"."""

    key: str
    status: str
    text: str = ""
    value: Any = None
    reason: str = ""
    cached: bool = False


@dataclass(frozen=True)
class Terms:
    """How a judge is asked."""

    url: str  # of the API, such as https://api.openai.com/v1
    model: str  # its name there
    key: str | None = None  # from OPENAI_API_KEY by default, else "none"
    workers: int = 8  # questions under way at once
    retries: int = 6  # after timeouts, lost connections, 408, 409, 429 and 5xx, with growing pauses
    timeout: float = 120.0  # seconds for one answer
    prices: tuple[float, float] | None = None  # of a million tokens in and out
    cache: Path | None = None  # folder of the answers

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UniLIPError(f"--judge is {self.url!r}; give the address of an API, such as http://127.0.0.1:8000/v1.")
        if not self.model.strip():
            raise UniLIPError("--judge needs --judge-model: the judge's name at that address.")


class Tally(Counter[str]):
    """What asking cost: requests, from_cache, retries, tokens_in, tokens_out; and how many answers have a status."""

    def to_dict(self, prices: tuple[float, float] | None) -> dict[str, Any]:
        """Return plain values; "cost" only where prices are known."""
        found: dict[str, Any] = {name: self[name] for name in SPENT}
        if prices is not None:
            found["cost"] = round((self["tokens_in"] * prices[0] + self["tokens_out"] * prices[1]) / 1e6, 6)
        return found


class RemoteJudge:
    """Asks many questions of one judge. Raises UniLIPError: the `openai` package is missing."""

    def __init__(self, terms: Terms) -> None:
        try:
            import openai
        except ImportError as error:
            raise UniLIPError(f"A judge needs the package openai; {install('eval')}.") from error
        key = terms.key or os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(base_url=terms.url, api_key=key, timeout=terms.timeout, max_retries=terms.retries)
        self.terms, self.tally, self._errors = terms, Tally(), openai
        self._lock, self._stop = threading.Lock(), threading.Event()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question, in order. Raises UniLIPError: a wrong address, key or model; answers are kept."""
        self._stop.clear()
        with ThreadPoolExecutor(max_workers=self.terms.workers) as pool:
            try:
                answers = list(pool.map(self._one, questions))
            except BaseException:
                self._stop.set()
                raise
        self.tally.update(answer.status for answer in answers)
        return answers

    def _one(self, question: Question) -> Answer:
        place = self._place(question)
        kept: Any = None
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # not there, or damaged: asked anew
            kept = None if place is None else json.loads(place.read_text(encoding="utf-8"))["text"]
        if isinstance(kept, str) and (value := question.read(kept)) is not None:
            self._count("from_cache")
            return Answer(question.key, "ok", kept, value, cached=True)
        answer = Answer(question.key, "failed", reason="not asked")
        for _ in range(ATTEMPTS):
            if self._stop.is_set():
                return answer
            answer = self._request(question)
            if answer.status != "unparsable":
                break
        if answer.status == "ok" and place is not None:
            write_json(place, {"model": self.terms.model, "key": question.key, "text": answer.text})
        return answer

    def _request(self, question: Question) -> Answer:
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64encode(part).decode()}"}}
            for part in question.parts
        ]
        messages: list[Any] = [{"role": "system", "content": question.system}] if question.system else []
        messages.append({"role": "user", "content": content})
        e = self._errors
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=self.terms.model, messages=messages, temperature=0.0, max_tokens=question.max_tokens
            )
            reply = raw.parse()
        except (e.AuthenticationError, e.PermissionDeniedError, e.NotFoundError) as error:
            self._stop.set()
            raise UniLIPError(
                f"The judge {self.terms.model} at {self.terms.url} does not answer us ({reason(error, 300)}); check "
                "--judge, --judge-model and OPENAI_API_KEY. Pictures and answers so far are kept."
            ) from error
        except e.BadRequestError as error:
            refused = any(code in f"{error} {error.code} {error.body}" for code in POLICY)
            self._count("requests")
            return Answer(question.key, "refused" if refused else "failed", reason=reason(error, 300))
        except Exception as error:  # timeouts, lost connections, what the server says after all retries, broken JSON
            self._count("requests", retries=self.terms.retries)
            return Answer(question.key, "failed", reason=reason(error, 300))
        usage, choices = getattr(reply, "usage", None), getattr(reply, "choices", None)  # whatever came is in them
        spent = {"tokens_in": getattr(usage, "prompt_tokens", 0), "tokens_out": getattr(usage, "completion_tokens", 0)}
        spent = {name: count if isinstance(count, int) else 0 for name, count in spent.items()}
        self._count("requests", retries=raw.retries_taken, **spent)
        choice = choices[0] if isinstance(choices, list) and choices else None
        message = getattr(choice, "message", None)
        said = getattr(message, "content", None) or ""
        if message is None or not isinstance(said, str):
            return Answer(question.key, "unparsable", reason="the answer holds no message")
        text = THOUGHTS.sub("", said).strip()
        refusal = getattr(message, "refusal", None)
        if refusal or getattr(choice, "finish_reason", None) == "content_filter":
            return Answer(question.key, "refused", text, reason=str(refusal or "filtered"))
        value = question.read(text)
        if value is None:
            status = "refused" if REFUSAL.match(text) else "unparsable"
            return Answer(question.key, status, text, reason=text[:200] or "an empty answer")
        return Answer(question.key, "ok", text, value)

    def _count(self, what: str, **more: int) -> None:
        with self._lock:
            self.tally.update({what: 1, **more})

    def _place(self, question: Question) -> Path | None:
        if self.terms.cache is None:
            return None
        digest = hashlib.sha256()
        settings = (self.terms.url, self.terms.model, question.system, question.max_tokens)
        for part in (json.dumps(settings), *question.parts):
            data = part.encode("utf-8", "backslashreplace") if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "big") + data)
        name = digest.hexdigest()
        return self.terms.cache / name[:2] / f"{name}.json"
