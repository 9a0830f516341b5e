"""Conversations about pictures: what was said and shown, which pictures a message is about, and a model that replies.

Out: `Conversation`, which the server builds of what clients send, and `Chat`, which keeps one and has a model draw,
change and answer. The model has read pictures in the user's turns alone: those of an answer go into the next turn.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from unilip.errors import PromptError, check_choice, check_flag, check_number
from unilip.intent import Intent, intent
from unilip.pictures import as_html, each, load_image
from unilip.sampling import check_prompt

if TYPE_CHECKING:
    from unilip.model import UniLIP

SHOWN = "Here is the picture."
VERBS = ("generate", "edit", "ask")
OWN = (  # arguments that the conversation itself gives
    "prompt", "image", "question", "history", "stream", "generator", "latents", "output_type", "num_images_per_prompt",
)  # fmt: skip
Pictures = tuple[Image.Image, ...]


@dataclass(frozen=True)
class Turn:
    """An earlier turn of a conversation: `role` is "user" or "assistant"; its pictures come before its text."""

    role: str
    text: str
    images: Pictures = ()


@dataclass(frozen=True)
class Conversation:
    """What was said, in order, and the pictures `shown` last; those `before` a row of `changes`, and these."""

    turns: tuple[Turn, ...] = ()
    shown: Pictures = ()
    before: Pictures = ()
    changes: tuple[str, ...] = ()
    carried: Pictures = ()

    def heard(self, text: str, images: Sequence[Image.Image] = ()) -> Conversation:
        turn = Turn("user", text or SHOWN, (*self.carried, *images))
        return replace(self._showing(images), turns=(*self.turns, turn), carried=())

    def answered(self, text: str, images: Sequence[Image.Image] = (), change: str | None = None) -> Conversation:
        """Add an answer; `change` is the instruction that its pictures follow, if they are changed ones."""
        turns, carried = (*self.turns, Turn("assistant", text or SHOWN)), (*self.carried, *images)
        told = replace(self, turns=turns, carried=carried)
        if change is None:
            return told._showing(images)
        return replace(told, shown=tuple(images), changes=(*self.changes, change))

    def _showing(self, images: Sequence[Image.Image]) -> Conversation:
        found = tuple(images)
        return replace(self, shown=found, before=found, changes=()) if found else self

    @property
    def recent(self) -> tuple[Turn, ...]:
        """The turns since pictures came last, these in the first of them."""
        return self.turns[self._newest :]

    @property
    def about_the_newest(self) -> tuple[Turn, ...]:
        """All turns, with the pictures that came last alone."""
        return (*(replace(turn, images=()) for turn in self.turns[: self._newest]), *self.recent)

    @property
    def _newest(self) -> int:
        return max((place for place, turn in enumerate(self.turns) if turn.images), default=0)


def joined(instructions: Sequence[str]) -> str:
    """Return several instructions as one, each a sentence."""
    return ". ".join(words.strip().rstrip(".") for words in instructions)


@dataclass(frozen=True)
class Reply:
    """What came of a message: `text`, said or drawn; `images` in PIL; `seed` of the first (further: the next)."""

    verb: Intent
    text: str
    images: Pictures = ()
    seed: int | None = None
    plan: str | None = None

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.text)}</p>{as_html(self.images)}"


@dataclass
class Chat:
    """A conversation with a model; `UniLIP.chat` makes one.

        chat = model.chat(seed=7)
        chat("draw a dog with a hat").images[0]
        chat("now remove the hat")                 # changes the last picture
        chat("What is in the picture?").text
        chat("make it blue", "photo.jpg")          # brings a picture of its own
        chat.undo()

    Attributes: seed: the n-th picture has seed + n; None draws one for each. from_original: let a change read the
    picture that the changes began with and follow all instructions since, as each encoding loses a little. settings: of
    `generate`, `edit` and `ask`, each for those that know it; several pictures of a message belong to one change
    (`joint`) where the model has learned that. replies: all, with pictures and seeds.
    """

    model: UniLIP
    seed: int | None = None
    from_original: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    conversation: Conversation = field(default_factory=Conversation)

    def __post_init__(self) -> None:
        if self.seed is not None:
            self.seed = check_number("seed", self.seed, 0, 2**62, whole=True)
        check_flag("from_original", self.from_original)
        self._arguments("generate", self.settings)
        self._past: list[Conversation] = []

    @property
    def images(self) -> Pictures:
        return self.conversation.shown

    def __call__(self, message: str, image: Any = None, *, verb: str | None = None, **settings: Any) -> Reply:
        """Draw, change or answer, as a message's words want, or `verb`, or `answer:`, `draw:` and `edit:` before them.

        In: image: that the message brings, or several; as for `UniLIP.edit`. settings: for this message; `seed` too.
        Raises UniLIPError: what the verb's own method raises, or an edit without a picture. Nothing was added then.
        """
        check_prompt(message, "message")
        seed = settings.pop("seed", None)
        if seed is not None:
            seed = check_number("seed", seed, 0, 2**62, whole=True)
        given = () if image is None else tuple(map(load_image, each(image)))
        found, words = intent(message, bool(given or self.images))
        if verb is not None:
            check_choice("verb", verb, VERBS)
            found, words = cast(Intent, verb), words if verb == found else message.strip()
        now = self.conversation.heard(words if found == "ask" else message, given)
        arguments = self._arguments(found, self.settings | settings)
        if seed is None:
            drawn = sum(len(reply.images) for reply in self.replies)
            seed = secrets.randbelow(2**31) if self.seed is None else self.seed + drawn
        if found == "ask":
            reply = self._ask(now.recent, seed, arguments)
        else:
            reply = self._draw(found, words, now, seed, arguments)
        self._past.append(self.conversation)
        said = reply.text if found == "ask" else ""
        self.conversation = now.answered(said, reply.images, words if found == "edit" else None)
        self.replies.append(reply)
        return reply

    def undo(self) -> None:
        """Take the last message and its reply back. Raises PromptError: nothing was said."""
        if not self._past:
            raise PromptError("Nothing was said yet, so nothing can be taken back.")
        self.conversation = self._past.pop()
        self.replies.pop()

    def _draw(self, verb: Intent, words: str, now: Conversation, seed: int, arguments: dict[str, Any]) -> Reply:
        if verb == "generate":
            drawn = self.model.generate(words, generator=seed, **arguments)
            return Reply(verb, words, tuple(drawn.images), seed, drawn.plans[0] if drawn.plans else None)
        sources = now.shown
        if not sources:
            raise PromptError("There is no picture to change yet; bring one as `image`, or have one drawn.")
        if self.from_original:
            sources, words = now.before, joined((*now.changes, words))
        joint = check_flag("joint", arguments.pop("joint", self.model.config.sampling.joint)) and len(sources) > 1
        seeds = [seed + place for place in range(1 if joint else len(sources))]
        drawn = self.model.edit(list(sources), words, generator=seeds, joint=joint, **arguments)
        return Reply(verb, words, tuple(drawn), seed)

    def _ask(self, turns: Sequence[Turn], seed: int, arguments: dict[str, Any]) -> Reply:
        """Answer the last turn with those since the picture came, as far back as the model can read."""
        pictures = list(turns[0].images)
        while True:
            history: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns[:-1]]
            if history:
                history[0]["images"] = pictures
            own = None if history else pictures or None
            try:
                answer = self.model.ask(own, turns[-1].text, history=history, generator=seed, **arguments)
                return Reply("ask", cast(str, answer), (), seed if arguments.get("temperature") else None)
            except PromptError:
                if not history:
                    raise
                turns = turns[2:]  # without the oldest question and its answer

    def _arguments(self, verb: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Choose the settings that a verb knows; one that no verb knows is an error."""
        known = {name: set(inspect.signature(getattr(self.model, name)).parameters).difference(OWN) for name in VERBS}
        for name in settings:
            check_choice("setting of a chat called", name, sorted(set.union(*known.values())))
        return {name: value for name, value in settings.items() if name in known[verb]}
