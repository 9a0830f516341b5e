"""A vision-language model behind an OpenAI-compatible address, as a judge of pictures.

Every question gets an answer with a status: "ok", "refused", "unparsable" or "failed"; only "ok" has a value. Answers
are kept on disk, so a rerun asks only what is open. Nothing that the judge did not say becomes a score.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from unilip.errors import UniLIPError, install, reason
from unilip.files import write_json

log = logging.getLogger(__name__)

STATUSES = ("ok", "refused", "unparsable", "failed")
# A refusal is an answer that says so in its first words and that cannot be read as a score.
REFUSAL = re.compile(
    r"^\W*(i['’]?m (really |very )?sorry|i am sorry|sorry|i (can(no|')?t|can’t|am unable|am not able|won['’]?t)|"
    r"unfortunately,? i|as an ai)",
    re.IGNORECASE,
)
POLICY = ("content_policy_violation", "content_filter", "ResponsibleAIPolicyViolation", "moderation_blocked")
THOUGHTS = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One thing to ask: texts and PNG or JPEG bytes in order; `read` returns None for what it cannot read."""

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
    tokens: tuple[int, int] = (0, 0)
    cached: bool = False


@dataclass(frozen=True)
class Terms:
    """How a judge is asked.

    In: url: of the API, such as https://api.openai.com/v1. model: its name there. key: from OPENAI_API_KEY by default,
    else "none". workers: questions under way at once. rate: questions a minute at most (None: no limit). retries: after
    timeouts, lost connections, 408, 409, 429 and 5xx, with growing pauses. attempts: for an answer that cannot be read.
    timeout: seconds for one answer. prices: of a million tokens in and out. cache: folder of the answers (None: none).
    """

    url: str
    model: str
    key: str | None = None
    workers: int = 8
    rate: float | None = None
    retries: int = 6
    attempts: int = 3
    timeout: float = 120.0
    prices: tuple[float, float] | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UniLIPError(f"--judge is {self.url!r}; give the address of an API, such as http://127.0.0.1:8000/v1.")
        if not self.model.strip():
            raise UniLIPError("--judge needs --judge-model: the judge's name at that address.")


@dataclass
class Tally:
    """What asking cost."""

    asked: int = 0
    cached: int = 0
    retried: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    statuses: Counter[str] = field(default_factory=Counter)

    def to_dict(self, prices: tuple[float, float] | None) -> dict[str, Any]:
        """Return plain values; "cost" only where prices are known."""
        cost = None if prices is None else sum(n * price for n, price in zip(self.tokens, prices, strict=True)) / 1e6
        return {
            "requests": self.asked,
            "from_cache": self.cached,
            "retries": self.retried,
            "tokens_in": self.tokens[0],
            "tokens_out": self.tokens[1],
            **({} if cost is None else {"cost": round(cost, 6)}),
        }


class JudgeStopped(UniLIPError):
    """The judge cannot be asked at all: wrong address, key or name. Answers so far are kept."""


class RemoteJudge:
    """Asks many questions of one judge. Raises UniLIPError: the `openai` package is missing."""

    def __init__(self, terms: Terms) -> None:
        try:
            import openai
        except ImportError as error:
            raise UniLIPError(f"A judge needs the package openai; {install('eval')}.") from error
        self.terms = terms
        self.tally = Tally()
        self._errors = openai
        self._client = openai.OpenAI(
            base_url=terms.url,
            api_key=terms.key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=terms.timeout,
            max_retries=terms.retries,
        )
        self._lock = threading.Lock()
        self._next = 0.0
        self._stop = threading.Event()

    def ask(self, questions: Sequence[Question], progress: bool = False) -> list[Answer]:
        """Answer each question, in order. Raises JudgeStopped: a wrong address, key or model; answers are kept."""
        answers: list[Answer] = []
        self._stop.clear()
        with (
            tqdm(total=len(questions), desc="judge", unit="question", disable=not progress) as bar,
            ThreadPoolExecutor(max_workers=self.terms.workers) as pool,
        ):
            try:
                for answer in pool.map(self._one, questions):
                    answers.append(answer)
                    self.tally.statuses[answer.status] += 1
                    bar.update()
            except BaseException:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return answers

    def _one(self, question: Question) -> Answer:
        place = self._place(question)
        if place is not None and place.is_file():
            stored = json.loads(place.read_text(encoding="utf-8"))
            value = question.read(stored["text"])
            if value is not None:
                with self._lock:
                    self.tally.cached += 1
                return Answer(question.key, "ok", stored["text"], value, cached=True)
        answer = Answer(question.key, "failed", reason="not asked")
        for _ in range(self.terms.attempts):
            if self._stop.is_set():
                return answer
            answer = self._request(question)
            if answer.status in ("ok", "refused", "failed"):
                break
        if answer.status == "ok" and place is not None:
            write_json(place, {"model": self.terms.model, "key": question.key, "text": answer.text})
        return answer

    def _request(self, question: Question) -> Answer:
        self._wait()
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": _data_url(part)}}
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
            raise JudgeStopped(
                f"The judge {self.terms.model} at {self.terms.url} does not answer us ({reason(error, 300)}); check "
                "--judge, --judge-model and OPENAI_API_KEY. Pictures and answers so far are kept."
            ) from error
        except e.BadRequestError as error:
            said = f"{error} {error.code} {error.body}"
            refused = any(code in said for code in POLICY)
            self._count(1, 0)
            return Answer(question.key, "refused" if refused else "failed", reason=reason(error, 300))
        except Exception as error:  # timeouts, lost connections, what the server says after all retries, broken JSON
            self._count(1, self.terms.retries)
            return Answer(question.key, "failed", reason=reason(error, 300))
        self._count(1, raw.retries_taken)
        choice = reply.choices[0] if getattr(reply, "choices", None) else None
        if choice is None or choice.message is None:
            return Answer(question.key, "unparsable", reason="the answer holds no message")
        used = (reply.usage.prompt_tokens or 0, reply.usage.completion_tokens or 0) if reply.usage else (0, 0)
        with self._lock:
            self.tally.tokens[0] += used[0]
            self.tally.tokens[1] += used[1]
        text = THOUGHTS.sub("", choice.message.content or "").strip()
        if choice.message.refusal or choice.finish_reason == "content_filter":
            why = str(choice.message.refusal or "filtered")
            return Answer(question.key, "refused", text, reason=why, tokens=used)
        value = question.read(text)
        if value is None:
            status = "refused" if REFUSAL.match(text) else "unparsable"
            return Answer(question.key, status, text, reason=text[:200] or "an empty answer", tokens=used)
        return Answer(question.key, "ok", text, value, tokens=used)

    def _count(self, asked: int, retried: int) -> None:
        with self._lock:
            self.tally.asked += asked
            self.tally.retried += retried

    def _wait(self) -> None:
        """Keep to the rate: each question takes the next free moment."""
        if self.terms.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            moment = max(now, self._next)
            self._next = moment + 60.0 / self.terms.rate
        time.sleep(max(0.0, moment - now))

    def _place(self, question: Question) -> Path | None:
        if self.terms.cache is None:
            return None
        digest = hashlib.sha256()
        settings = (self.terms.url, self.terms.model, question.system, question.max_tokens)
        for part in (json.dumps(settings), *question.parts):
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "big") + data)
        name = digest.hexdigest()
        return self.terms.cache / name[:2] / f"{name}.json"


def _data_url(data: bytes) -> str:
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
