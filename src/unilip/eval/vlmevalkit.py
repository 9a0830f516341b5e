"""UniLIP as a model of VLMEvalKit.

In: the kit's messages, a list of {"type": "text" | "image", "value": ...}. Out: the answer. The kit has no entry
points, so `python -m unilip.eval.vlmevalkit` adds the model to its table and then runs its run.py, in its checkout:

    python -m unilip.eval.vlmevalkit --data MMBench_DEV_EN --model UniLIP --path kanashi6/UniLIP-1B

--plain asks the questions alone, for models that never learned to choose from options (as the embedded one): the kit
finds the option that an answer in words names. Such scores are not comparable with those of the kit's own prompt.
"""

import logging
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unilip.errors import UniLIPError

log = logging.getLogger(__name__)


def split_message(message: Sequence[Mapping[str, Any]]) -> tuple[list[str], str]:
    """Return pictures and text of a message of the kit. Raises UniLIPError: it holds something else, as a video."""
    if other := sorted({str(part["type"]) for part in message} - {"text", "image"}):
        raise UniLIPError(f"UniLIP understands texts and images, not {', '.join(other)}; choose another data set.")
    images = [str(part["value"]) for part in message if part["type"] == "image"]
    return images, "\n".join(str(part["value"]) for part in message if part["type"] == "text")


def make_class(base: type) -> type:
    """Return the model class on top of the kit's base class."""

    class UniLIPForVLMEvalKit(base):
        """Answers the kit's messages; `path` is what `UniLIP.from_pretrained` takes, None the embedded model."""

        INSTALL_REQ = False
        INTERLEAVE = True

        def __init__(
            self, path: str | None = None, device: str | None = None, dtype: str = "auto", max_tiles: int | None = None,
            max_new_tokens: int = 1024, temperature: float = 0.0, top_p: float = 1.0, plain: bool = False,
            **ignored: Any,
        ) -> None:  # fmt: skip
            super().__init__()
            from unilip.machine import choose_device
            from unilip.model import UniLIP

            if ignored:
                log.warning("%s cannot be followed and is left out", ", ".join(sorted(ignored)))
            device = choose_device(device or "auto")
            self.model: UniLIP = UniLIP.from_pretrained(path, device=device, dtype=dtype, parts=("encoder", "mllm"))
            self.max_tiles, self.plain = max_tiles or (12 if self.model.config.sampling.recall else 1), plain
            self.settings: dict[str, Any] = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p)

        def use_custom_prompt(self, dataset: str) -> bool:
            """Whether the kit's own prompt is left out."""
            return self.plain

        def build_prompt(self, line: Mapping[str, Any], dataset: str) -> list[dict[str, str]]:
            """Return the pictures of a row and its question alone."""
            files = self.dump_image(line, dataset)
            shown = [{"type": "image", "value": str(file)} for file in (files if isinstance(files, list) else [files])]
            return [*shown, {"type": "text", "value": str(line["question"])}]

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            images, text = split_message(message)
            tiles = max(1, self.max_tiles // max(1, len(images)))
            return str(self.model.ask(images or None, text, max_tiles=tiles, **self.settings))

    return UniLIPForVLMEvalKit


def register(**settings: Any) -> None:
    """Add the model to the kit's table of models. Raises UniLIPError: the kit is not installed."""
    try:
        from vlmeval.config import supported_VLM
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise UniLIPError(f"VLMEvalKit cannot be imported ({error}); run pip install -e . in its checkout.") from error
    supported_VLM["UniLIP"] = partial(make_class(BaseModel), **settings)


def main(words: Sequence[str]) -> None:
    """Register the model with --path, --max-tiles and --plain, and run the kit's run.py with the other words."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m unilip.eval.vlmevalkit", description=__doc__, allow_abbrev=False)
    parser.add_argument("--path", help="folder, file or hub id; the embedded model by default")
    parser.add_argument("--max-tiles", type=int, help="12 by default, or 1 for a model of plain questions")
    parser.add_argument("--plain", action="store_true", help="ask the questions alone")
    found, rest = parser.parse_known_args(list(words))
    script = Path("run.py")
    if not script.is_file():
        raise UniLIPError("There is no run.py here; start this in the checkout of VLMEvalKit.")
    register(**vars(found))
    sys.argv = ["run.py", *rest]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UniLIPError as problem:
        sys.exit(f"unilip: error: {problem}")
