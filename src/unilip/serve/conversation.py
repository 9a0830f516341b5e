"""OpenAI's messages -> what the last of them wants, with the pictures it is about.

In:  messages with text, data URLs, pictures in Markdown, pictures of earlier answers. Out: a verb, a text, pictures,
and the question with its history. The model knows no system turn: a system message goes before the user's first words.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from unilip.chat import Conversation
from unilip.errors import ImageError, PromptError
from unilip.intent import intent
from unilip.sampling import check_prompt
from unilip.serve.checks import Checker
from unilip.serve.guard import FILES
from unilip.serve.pictures import from_data_url
from unilip.serve.schema import Chat, ChatMessage
from unilip.serve.service import Work

MAX_PICTURES = 16
_MARKDOWN = re.compile(r"!\[[^\[\]]{0,200}\]\((data:image/[a-z]{1,8};base64,[A-Za-z0-9+/=]+)\)")
# as Open WebUI adds
_ATTACHED = re.compile(r"\s*<attached_files>(?:[^<]|<(?!/attached_files>)){0,4000}</attached_files>\s*")
TAKEN = {  # how a message was understood, where its words decided
    "generate": "Drawn; begin with “answer:” to ask instead.",
    "edit": "Changed; begin with “answer:” to ask instead.",
    "ask": "Answered; begin with “draw:” or “edit:” to get a picture instead.",
}
_NOTES = re.compile("|".join(rf"\*{re.escape(note)}\*" for note in TAKEN.values()))


@dataclass
class Reader:
    """Turns addresses of pictures into pictures, within the limits of one request."""

    work: Work
    count: int = 0
    fetched: dict[str, bytes] = field(default_factory=dict)

    def prefetch(self, body: Chat) -> None:
        """Fetch what has to come from the network, so that no decoder waits for it."""
        for part in body.parts[: 4 * MAX_PICTURES]:
            if part.image_url is not None and part.image_url.url[:5].lower() != "data:":
                self._bytes(part.image_url.url)

    def read(self, url: str) -> Image.Image:
        """Return the picture of a data URL, of a URL that this server gave, or, where allowed, of any public one."""
        self.count += 1
        if self.count > MAX_PICTURES:
            raise ImageError(f"The conversation has more than {MAX_PICTURES} pictures; leave old ones out.")
        return self.work.decode(self._bytes(url))

    def _bytes(self, url: str) -> bytes:
        if url[:5].lower() == "data:":
            return from_data_url(url)
        try:
            path = urlsplit(url).path
        except ValueError as error:
            raise ImageError("The image URL is malformed; send the picture as a data URL.") from error
        service = self.work.service
        if path.startswith(FILES) and (found := service.store.get(path.removeprefix(FILES))):
            return found[0]
        if not service.settings.allow_url_images:
            raise ImageError("This server fetches no pictures by address; send data URLs (data:image/png;base64,...).")
        if url not in self.fetched:
            self.fetched[url] = service.fetch(url, service.settings.rules.max_body)
        return self.fetched[url]


def read_conversation(
    body: Chat, reader: Reader, able: Checker, chat: str = "auto"
) -> tuple[str, str, tuple[Image.Image, ...], dict[str, Any]]:
    """Return what the last message wants: verb, text, pictures to change; and as an `Ask` has it, with what was before.

    A question after a picture that the model made is about that one, not about earlier ones.
    Raises ImageError, PromptError: a picture cannot be read; the last message is not the user's, or empty.
    """
    if body.messages[-1].role in ("system", "developer", "assistant"):
        raise PromptError("The last message must be the user's; put what you want to know there.")
    told = Conversation()
    system: list[str] = []
    made = False  # whether the newest pictures are the model's
    recall = able.config.sampling.recall
    if any("<attached_files>" in (part.text or "") for part in body.parts):
        body._ignored += ("attached_files",)  # their pictures come as parts
    for message in body.messages:
        text, images = _content(message, reader)
        made = message.role == "assistant" if images else made
        if message.role in ("system", "developer", "tool", "function") and message is not body.messages[-1]:
            if images:
                raise PromptError(f"A {message.role} message has a picture; only the user's and the assistant's may.")
            if wants_json(body) and not recall:  # it tells of a form, which a model of plain questions never read
                body._ignored += (f"the {message.role} message",)
                continue
            system += [text] if text else []
        elif message.role == "assistant":
            told = told.answered(text, images)
        else:
            told = told.heard("\n".join([*system, text]).strip(), images)
            system = []
            last = text
    kept = told.recent if not recall else told.about_the_newest if made else told.turns
    if len(kept) < len(told.turns):
        body._ignored += (f"messages 1 to {len(told.turns) - len(kept)}, from before the newest picture",)
    *turns, question = kept
    if last.strip():
        check_prompt(last, "message")
    verb, words = _decide(body, last, bool(told.shown), able.verbs, chat)
    if verb == "ask" and not last.strip():
        raise PromptError("The last message has no words; ask something, or say what to draw.")
    # a model of single plain questions is asked plainly; its words become the object
    words_of_form = _form(body, [turn.text for turn in (*turns, question)]) if recall else ""
    asked = {"question": question.text + words_of_form, "images": question.images, "history": tuple(turns)}
    return verb, words, told.shown, asked


def _decide(body: Chat, text: str, has_picture: bool, verbs: tuple[str, ...], chat: str) -> tuple[str, str]:
    modalities = set(body.modalities or (("text",) if chat == "text" or wants_json(body) else ("text", "image")))
    verb, words = intent(text, has_picture)
    if modalities == {"text"}:
        return "ask", text
    if modalities == {"image"} and verb == "ask":
        return ("edit" if has_picture else "generate"), text.strip()
    return (verb, words) if verb in verbs or modalities == {"image"} else ("ask", text)


def wants_json(body: Chat) -> bool:
    """Whether the answer shall be a JSON object."""
    return body.response_format is not None and body.response_format.type != "text"


def _form(body: Chat, said: Sequence[str]) -> str:
    """Return what to add to a question so that it is answered in JSON, unless its own words say so."""
    if body.response_format is None or not wants_json(body):
        return ""
    if form := (body.response_format.json_schema or {}).get("schema"):
        return f"\nAnswer with one JSON object of this schema and nothing else: {json.dumps(form)}"
    return "" if "json" in "".join(said).lower() else "\nAnswer with one JSON object and nothing else."


def as_json(text: str) -> tuple[str, bool]:
    """Return the first JSON object in an answer; or one that holds the answer, and True, where there is none."""
    for place in (match.start() for match in re.finditer(r"\{", text)):
        try:
            return json.dumps(json.JSONDecoder().raw_decode(text, place)[0], ensure_ascii=False), False
        except (ValueError, RecursionError):
            continue
    return json.dumps({"answer": text}, ensure_ascii=False), True


def _content(message: ChatMessage, reader: Reader) -> tuple[str, tuple[Image.Image, ...]]:
    words: list[str] = []
    images: list[Image.Image] = []
    for part in message.parts:
        if part.image_url is not None:
            images.append(reader.read(part.image_url.url))
        elif part.text:
            images += [reader.read(url) for url in _MARKDOWN.findall(part.text)]
            words.append(_ATTACHED.sub("\n", _NOTES.sub("", _MARKDOWN.sub("", part.text))).strip())
    if not images:  # an answer of ours has its pictures twice: in its words, and as parts
        images = [reader.read(part.image_url.url) for part in message.images or () if part.image_url is not None]
    return "\n".join(word for word in words if word), tuple(images)
