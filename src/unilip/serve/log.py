"""The log of server and studio: lines that say when, how bad, of which request, what, and why; as text or JSON."""

import json
import logging
import sys
import time
from contextvars import ContextVar
from typing import Any

REQUEST: ContextVar[str] = ContextVar("unilip_request", default="")  # the id of what is being worked on; set by Guard
CLIENT: ContextVar[str] = ContextVar("unilip_client", default="")  # who asked for it: key and address
access = logging.getLogger("unilip.access")
access.setLevel(logging.WARNING)  # its lines are of INFO


class Formatter(logging.Formatter):
    """A line of text, with the traceback below it, or a JSON object with everything in it."""

    def __init__(self, form: str = "text") -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        request = getattr(record, "request", None) or REQUEST.get()
        error = record.exc_info[1] if record.exc_info else None
        fields: dict[str, Any] = {
            "time": moment, "level": record.levelname, "logger": record.name, "request": request,
            "message": record.getMessage(), "cause": f"{type(error).__name__}: {error}" if error else "",
            "traceback": self.formatException(record.exc_info) if error and record.exc_info else "",
        }  # fmt: skip
        if self.form == "json":
            return json.dumps({name: value for name, value in fields.items() if value != ""}, ensure_ascii=True)
        # what others sent must not look like a line of its own
        message = fields["message"].encode("unicode_escape").decode() if not record.exc_info else fields["message"]
        head = f"{moment} {record.levelname} {record.name}{f' [{request}]' if request else ''} {message}"
        return "\n".join(filter(None, (f"{head}: {fields['cause']}" if error else head, fields["traceback"])))


class Handler(logging.StreamHandler):  # type: ignore[type-arg]  # which Python 3.10 has no argument for
    """Writes to what is stderr at the time: a full disk, or a reader that has gone, never stops what it tells of."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Give the record up."""


def set_up(level: str = "info", form: str = "text", with_access: bool = False) -> None:
    """Send the log of the whole process to stderr: ours from `level`, that of libraries from warnings on."""
    handler = Handler(sys.stderr)
    handler.setFormatter(Formatter(form))
    logging.getLogger().handlers[:] = [handler]
    ours = logging.getLogger("unilip")
    ours.handlers.clear()
    ours.setLevel(level.upper())
    access.setLevel(logging.INFO if with_access else logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # strangers must not fill the log with their warnings
