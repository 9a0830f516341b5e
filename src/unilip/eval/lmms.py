"""UniLIP as a model of lmms-eval.

In: the kit's requests. Out: answers. The kit finds `manifest` through the entry point `lmms_eval.models`, so with both
packages installed this is all:

    python -m lmms_eval --model unilip --model_args pretrained=kanashi6/UniLIP-1B,max_tiles=12 --tasks mme
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from unilip.machine import Place, choose_device
from unilip.model import UniLIP as Model

try:
    from lmms_eval.api.model import lmms as Base
except ImportError:  # importable without the kit, so that its presence is only needed where it is used
    Base = object

log = logging.getLogger(__name__)

HEEDED = ("max_new_tokens", "temperature", "top_p", "do_sample", "until")
UNCHANGED = (("num_beams", 1), ("num_beams", None), ("use_cache", True))  # what is done anyway


def manifest() -> Any:
    """Return how the kit finds the class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="unilip", simple_class_path=f"{__name__}.UniLIP")


class UniLIP(Base):
    """The model class: `generate_until` answers; likelihoods and several rounds are not offered.

    In: pretrained: what `UniLIP.from_pretrained` takes (None: the embedded model). device, dtype: CUDA if there is one,
    as stored. batch_size: questions at once. max_tiles: squares that a picture is cut into at most.
    """

    is_simple = True

    def __init__(
        self, pretrained: str | None = None, device: str | None = None, dtype: str = "auto", batch_size: int | str = 1,
        max_tiles: int | str = 12, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        place = Place.of_environment()
        self._rank, self._world_size = place.rank, place.world  # which the kit reads as rank and world_size
        self.device = torch.device(choose_device(device or "auto"))
        self.model = Model.from_pretrained(pretrained, device=self.device, dtype=dtype, parts=("encoder", "mllm"))
        self.batch_size, self.max_tiles = int(batch_size), int(max_tiles)
        self._said: set[str] = set()  # settings of tasks that were ignored, and told

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return an answer to each request, in their order."""
        answers: list[str] = []
        with tqdm(total=len(requests), disable=self._rank != 0, desc="UniLIP answers") as bar:
            for start in range(0, len(requests), self.batch_size):
                batch = requests[start : start + self.batch_size]
                pictures, texts, settings, stops = [], [], [], []
                for request in batch:
                    text, options, to_visual, doc_id, task, split = request.args
                    visuals = to_visual(self.task_dict[task][split][doc_id])
                    pictures.append([visual for visual in visuals or () if visual is not None])
                    texts.append(text.replace("<image>", "").strip())
                    tiles = max(1, self.max_tiles // max(1, len(pictures[-1])))
                    settings.append({**self._settings(options), "max_tiles": tiles})
                    until = options.get("until") or ()
                    stops.append([until] if isinstance(until, str) else list(until))
                alike = all(one == settings[0] for one in settings)  # else one is asked after the other
                said: list[str] = []
                for n in range(0, len(batch), len(batch) if alike else 1):
                    part = slice(n, None if alike else n + 1)
                    said += self.model.ask(pictures[part], texts[part], **settings[n])
                answers += [cut(answer, stop) for answer, stop in zip(said, stops, strict=True)]
                bar.update(len(batch))
        return answers

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return a task's generation settings as `UniLIP.ask` takes them; what it cannot take is said once."""
        sampled = options.get("do_sample", True) and options.get("temperature")
        ignored = sorted(
            name for name, value in options.items() if name not in HEEDED and (name, value) not in UNCHANGED
        )
        if set(ignored) - self._said:
            log.warning("the task's %s cannot be followed and is left out", ", ".join(ignored))
            self._said.update(ignored)
        return {
            "max_new_tokens": int(options.get("max_new_tokens", 1024)),
            "temperature": float(options["temperature"]) if sampled else 0.0,
            "top_p": float(options.get("top_p") or 1.0) if sampled else 1.0,
        }

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("UniLIP answers in words; choose tasks of the kind generate_until.")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("UniLIP answers single rounds here; choose tasks of the kind generate_until.")


def cut(answer: str, stops: Sequence[str]) -> str:
    """Return an answer up to the first of the words that end it."""
    for stop in stops:
        if stop:
            answer = answer.split(stop)[0]
    return answer.strip()
