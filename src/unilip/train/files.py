"""Files of one's own as batches: shards, folders, lists and hub datasets, mixed by weight (`unilip.data.sources`).

Each task (pictures to draw, edits, questions) has its own stream, whose order is a function of (seed, epoch, lane);
every sample comes once in an epoch, and any number can be asked for at once. A sample that cannot be read gives way to
another of the same place, chosen by its number, and is counted.
"""

import io
import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from unilip.data.order import Mixture, Order
from unilip.data.records import Record, Source, Unreadable, clean_text, one_text, read_turns, square
from unilip.data.sources import Weighted, open_source, parse_mixture
from unilip.errors import ConfigError, DataError
from unilip.files import content_hash, stable_hash
from unilip.method.config import UniLIPConfig
from unilip.method.text import Processor
from unilip.recipes.record import FewSteps, Flow, Recipe, Understand
from unilip.shapes import Size
from unilip.train.batches import Batches, Turns, conversation, stack
from unilip.train.cached import cached_sources

logger = logging.getLogger(__name__)
T = TypeVar("T")
ATTEMPTS = 50  # draws in a row that may be unusable before something else must be wrong
TURN_EXTRA = 16  # tokens of the template around a prompt, and more
WORDS = {"image": "pictures", "caption": "pictures with captions", "edit": "edits (NAME.input, NAME.output, NAME.txt)",
         "talk": "pictures with conversations", "text": "conversations without a picture"}  # fmt: skip


class Stream:
    """The samples of one kind in all sources that have it, mixed by weight. Raises ConfigError: none has."""

    def __init__(self, kind: str, sources: Sequence[tuple[Weighted, Source]], recipe: Recipe) -> None:
        sources = [(place, source) for place, source in sources if place.weight]
        having = [(place, source) for place, source in sources if sum(source.counts(kind))]
        if not having:
            have = {k: sum(sum(source.counts(k)) for _, source in sources) for k in WORDS}
            told = {k: count for k, count in have.items() if count and (k != "image" or count == sum(have.values()))}
            found = ", ".join(f"{count} {WORDS[k]}" for k, count in told.items())
            hint = "; for edits alone set data.edit_share=1" if kind == "caption" and have["edit"] else ""
            raise ConfigError(
                f"data.path {recipe.data.path} holds no {WORDS[kind]}, which {recipe.name} learns from. "
                f"It holds {found or 'nothing else'}{hint}."
            )
        lanes = 1 if kind == "text" else recipe.data.lanes
        self.sources = [source for _, source in having]
        self.orders = [
            Order(source.counts(kind), recipe.seed, f"{place.location} ({WORDS[kind]})", recipe.data.window, lanes)
            for place, source in having
        ]
        weights = [place.weight for place, _ in having]
        self.mixtures = [Mixture(weights, recipe.seed, f"data.path ({kind}, {lane})") for lane in range(lanes)]


class FileBatches(Batches):
    """Pictures, captions, edits and conversations from files.

    Raises ConfigError: the files have nothing that the objective learns from; DataError: a place cannot be opened.
    """

    def __init__(self, recipe: Recipe, config: UniLIPConfig, processor: Processor | None) -> None:
        super().__init__(recipe, config, processor)
        data = recipe.data
        if isinstance(recipe.objective, (Understand, Flow)):
            _ = self.processor  # texts need one
        self.sources = [(place, open_source(place.location, data.keep_gb)) for place in parse_mixture(data.path)]
        if data.cache:
            self.sources = cached_sources(recipe, self.sources)
        self.kinds = kinds_of_recipe(recipe)
        self.streams = {kind: Stream(kind, self.sources, recipe) for kind in self.kinds}
        self.samples = sum(sum(source.counts(kind)) for kind in self.kinds for _, source in self.sources)
        self.signature = content_hash([(place.weight, source.signature()) for place, source in self.sources])
        for _, source in self.sources:
            for note in source.notes:
                logger.warning("%s: %s", source.location, note)
        self.step_samples = recipe.batch_size * recipe.accumulate
        self.tasks = Mixture([1 - data.edit_share, data.edit_share], recipe.seed, "data.edit_share")
        self.longest = data.max_tokens or (processor.max_tokens if processor else 0)
        self._tried: list[Unreadable | None] = []  # for each sample of a batch that was read: what is wrong with it

    def is_edit(self, step: int) -> bool:
        """Whether the batches of a step hold edits: exactly the share of them, in every 10,000 steps."""
        return self.tasks.pick(step)[0] == 1

    def _draw(self, kind: str, sample: int) -> tuple[int, int]:
        """Turn the number of a sample in the run into lane and number in the stream of its kind."""
        if kind == "text":
            batch, place = divmod(sample, self.size)
            return 0, batch * round(self.size * self.recipe.data.text_share) + place
        step, inside = divmod(sample, self.step_samples)
        own = self.step_samples // self.recipe.data.lanes
        lane, place = divmod(inside, own)
        return lane, self.tasks.pick(step)[1] * own + place

    def _take(self, kind: str, sample: int, use: Callable[[Record], T]) -> T:
        """Read a sample and use it; where that cannot be, another one, and so on."""
        stream = self.streams[kind]
        lane, number = self._draw(kind, sample)
        which, own = stream.mixtures[lane].pick(number)
        source, order, tried, problem = stream.sources[which], stream.orders[which], set(), ""
        source.expect(order.ahead(own, lane))  # fetched meanwhile
        shard, place = order.place(own, lane)
        for attempt in range(1, ATTEMPTS + 1):
            if (shard, place) not in tried:
                tried.add((shard, place))
                self._tried.append(None)
                name = ""  # what goes wrong before the record is there names its file itself
                try:
                    record = one_text(source.read(kind, shard, place), sample)
                    name = f"{record.name}: "
                    return use(record)
                except Unreadable as error:
                    problem = f"{name}{error}"
                    self._tried[-1] = Unreadable(error.reason, problem, error.left_out)
            draw = stable_hash("instead", self.recipe.seed, kind, sample, attempt) % order.total(lane)
            shard, place = order.place(draw, lane)  # another of the same source and lane
        raise DataError(
            f"{source.location} has no sample that can be used: {len(tried)} were tried in a row, the last: {problem}. "
            "`unilip data check` lists what is wrong."
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._tried = []
        return super().__getitem__(index) | {"tried": self._tried}

    def item(self, record: Record, kind: str, turns: int = 1) -> Any:
        """Decode a record: (picture), (picture, caption), (source, target, instruction), (picture, caption, turns)."""
        if kind == "image":
            return (self._picture(record, 0, self.target_size, kind),)
        if kind == "text":
            return (self._turns(record, 1, 0),)
        if kind == "caption" and isinstance(self.recipe.objective, Flow):
            text = self.text(record, "caption", kind)
            return self._picture(record, 0, self.target_size, kind), text
        if kind == "edit":
            text = self.text(record, "instruction", kind)
            source = self._picture(record, 0, self.image_size, kind, ("features",))
            made = ("latents", "conditions", "unconditional")
            return source, self._picture(record, -1, self.target_size, kind, made), text
        objective = self.objective
        text = self.text(record, "caption", kind) if objective.contrastive or objective.words else ""
        said = self._turns(record, turns, 1) if objective.next_token else ()
        return self._picture(record, 0, self.image_size, "talk"), text, said

    def assemble(self, kind: str, items: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """Put decoded records together as the frozen parts read them, with nothing dropped."""
        if isinstance(self.recipe.objective, Flow):
            text = self.processor.edit_text if kind == "edit" else self.processor.generate_text
            prompts = self.processor.tokenize([text(item[-1]) for item in items])
            sources = {"sources": stack([item[0] for item in items])} if kind == "edit" else {}
            return {**sources, "targets": stack([item[-2] for item in items]), "prompts": prompts}
        return {"images": stack([item[0] for item in items])}

    def _picture(self, record: Record, place: int, size: int | Size, kind: str, names: Sequence[str] = ()) -> Any:
        """The picture of a record at its size; of a cache the arrays of these names, and the picture if it is read."""
        fit: Any = self.recipe.data.fit
        if fit == "auto":
            fit = "resize" if kind == "talk" else "crop"
        picture = square(record.pictures[place], size, fit) if record.pictures else None
        if record.tensors is None:
            return picture
        found = {name: array for name, array in unpacked(record.tensors).items() if not names or name in names}
        return found if picture is None else found | {"images": picture}

    def _conditioned(self, record: Record, kind: str, index: int) -> Any:
        """Decode a record; of what a cache holds, take the condition of the prompt or of the one that replaces it."""
        item = self.item(record, kind)
        target = item[-2]
        if isinstance(target, dict) and "conditions" in target:
            blank, few = target.pop("unconditional", None), isinstance(self.recipe.objective, FewSteps)
            if few or self._kept("", index) is None:
                blank = unpacked(record.blank or b"")["conditions"] if blank is None else blank
                target["unconditional" if few else "conditions"] = blank
        return item

    def text(self, record: Record, what: str, kind: str) -> str:
        """The caption or instruction of a record, within the limits."""
        text = clean_text(record.text, what, self.recipe.data.max_characters)
        taken = TURN_EXTRA + ((self.source_cells or self.processor.num_image_tokens) + 2 if kind == "edit" else 0)
        if taken + len(text.encode()) > self.longest:  # a text never has more tokens than bytes
            count = taken + len(self.processor.ids(text))
            if count > self.longest:
                raise Unreadable(f"{what} over {self.longest} tokens", f"it has {count}", left_out=True)
        return text

    def image_item(self, index: int) -> Any:
        return self._take("image", index, lambda record: self.item(record, "image"))[0]

    def caption_item(self, index: int) -> tuple[Any, str]:
        return self._take("caption", index, lambda record: self._conditioned(record, "caption", index))

    def caption(self, index: int) -> str:
        return self._take(self.kinds[0], index, lambda record: self.text(record, "caption", self.kinds[0]))

    def edit_item(self, index: int) -> tuple[Sequence[Any], Any, str]:
        source, target, text = self._take("edit", index, lambda record: self._conditioned(record, "edit", index))
        return (source,), target, text

    def questions_item(self, index: int, turns: int) -> tuple[Any, str, Turns]:
        return self._take(self.kinds[0], index, lambda record: self.item(record, self.kinds[0], turns))

    def _turns(self, record: Record, most: int, pictures: int) -> Turns:
        """The first turns of a conversation, as many as are wanted and fit."""
        turns = read_turns(record.conversation)[:most]
        while conversation(self.processor, [(pictures, turns)])[0].input_ids.shape[1] > self.longest:
            if not (turns := turns[:-1]):
                raise Unreadable(f"conversation over {self.longest} tokens", left_out=True)
        return turns

    def text_item(self, index: int) -> tuple[str, str]:
        return self._take("text", index, lambda record: self.item(record, "text"))[0][0]


def unpacked(data: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file's bytes."""
    with np.load(io.BytesIO(data)) as arrays:
        return dict(arrays)


def kinds_of_recipe(recipe: Recipe) -> tuple[str, ...]:
    """Return the kinds of samples that a recipe learns from."""
    data, objective = recipe.data, recipe.objective
    if isinstance(objective, Flow):
        return (*(["caption"] if data.edit_share < 1 else []), *(["edit"] if data.edit_share > 0 else []))
    if isinstance(objective, Understand):
        main = "talk" if objective.next_token else "caption"
        return (main, "text") if data.text_share else (main,)
    return ("caption",) if objective.contrastive else ("image",)
