"""GenEval's rules on what a detector finds: objects, counts, colors, positions.

Goes in: a picture's detections and an item's metadata. Comes out: right or not, and why. The detector and the reader of
colors are parameters; `TransformersDetector` and `ClipColors` wrap models of transformers. The rules and thresholds are
those of the GenEval paper (arXiv 2310.11513): with its own detector (Mask2Former, mmdet) and CLIP the official scorer
should be run; another detector is another protocol, and the score says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from unilip.errors import UniLIPError
from unilip.eval.benchmarks import Item

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # of confidence; the higher one for tasks that count
MOST = 16  # objects of one class in a picture
MARGIN = 0.1  # of the sizes, by which one object must be beside another
GREY = (153, 153, 153)  # what hides the rest of the picture when a color is read
# Names of GenEval that COCO's own labels write otherwise
COCO = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}


@dataclass(frozen=True)
class Detection:
    """An object: its class, confidence, box (left, top, right, bottom) in pixels, and mask (H,W) where there is one."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Finds objects; `name` stands beside every score, `labels` are the classes that it knows."""

    name: str
    labels: frozenset[str]

    def __call__(self, pictures: Sequence[Image.Image], threshold: float) -> list[list[Detection]]:
        """Return the objects of each picture above a confidence."""
        ...


class Colors(Protocol):
    """Names the colors of objects, each of COLORS."""

    name: str

    def __call__(self, picture: Image.Image, objects: Sequence[Detection], label: str) -> list[str]:
        """Return a color for each object."""
        ...


# --- the rules ------------------------------------------------------------------------------------------------------


def find_relations(a: Detection, b: Detection, margin: float = MARGIN) -> set[str]:
    """Return where A is, seen from B: of "left of", "right of", "above", "below"; empty if they overlap too much.

    The middles' distance is shortened by a share of both sizes; a direction counts if it is more than half of the way.
    """
    shift = []
    whole = []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        room = margin * (abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low]))
        whole.append(distance)
        shift.append(math.copysign(max(abs(distance) - room, 0.0), distance))
    length = math.hypot(*whole)
    if max(abs(shift[0]), abs(shift[1])) < 1e-3 or length == 0:
        return set()
    across, down = shift[0] / length, shift[1] / length
    found = set()
    if abs(across) > 0.5:
        found.add("left of" if across < 0 else "right of")
    if abs(down) > 0.5:
        found.add("above" if down < 0 else "below")
    return found


def check_item(
    picture: Image.Image, found: Sequence[Detection], metadata: Mapping[str, Any], colors: Colors
) -> tuple[bool, str]:
    """Return whether a picture shows what an item of GenEval asks for, and what is wrong.

    Every "include" must be met by the most confident objects of its class: their count, the color of each, and their
    place relative to the objects of an earlier one. No "exclude" may be met.
    """
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(found, key=lambda detection: -detection.score):
        by_class.setdefault(detection.label, []).append(detection)
    wrong: list[str] = []
    met: list[list[Detection] | None] = []
    for wish in metadata["include"]:
        label, count = wish["class"], int(wish["count"])
        objects = by_class.get(label, [])[:MOST][:count]
        fault = ""
        if len(objects) < count:
            fault = f"{len(objects)} of {count} {label}"
        elif "color" in wish:
            seen = colors(picture, objects, label)
            if seen.count(wish["color"]) < count:
                fault = f"{label} is {', '.join(seen)}, not {wish['color']}"
        if not fault and "position" in wish:
            side, target = wish["position"]
            others = met[target]
            if others is None:
                fault = f"nothing for {label} to be {side}"
            elif not all(side in find_relations(one, other) for one in objects for other in others):
                fault = f"{label} is not {side} the {metadata['include'][target]['class']}"
        met.append(None if fault else objects)
        wrong += [fault] if fault else []
    for wish in metadata.get("exclude", ()):
        there = len(by_class.get(wish["class"], [])[:MOST])
        if there >= int(wish["count"]):
            wrong.append(f"{there} {wish['class']}, fewer than {wish['count']} wanted")
    return not wrong, "; ".join(wrong)


def score_geneval(
    items: Sequence[Item],
    load: Callable[[Item], Image.Image],
    detector: Detector,
    colors: Colors,
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """Return a row for each item of GenEval.

    Raises:
        UniLIPError: the detector does not know a class that an item names.
    """
    wanted = {wish["class"] for item in items for key in ("include", "exclude") for wish in item.data.get(key, ())}
    unknown = sorted(wanted - detector.labels)
    if unknown:
        raise UniLIPError(
            f"The detector {detector.name} does not know {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}; "
            "give one that knows the 80 classes of COCO."
        )
    rows = []
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        pictures = [load(item) for item in batch]
        for item, picture, found in zip(batch, pictures, detector(pictures, THRESHOLD), strict=True):
            least = COUNTING_THRESHOLD if item.data["tag"] == "counting" else THRESHOLD
            kept = [detection for detection in found if detection.score > least]
            right, reason = check_item(picture, kept, item.data, colors)
            rows.append({
                "key": item.key, "cluster": item.cluster, "group": item.group, "split": item.split,
                "prompt": item.prompt,
                "picture": item.path, "status": "ok", "reason": reason, "scores": {"correct": float(right)},
                "found": [[d.label, round(d.score, 4), [round(v, 1) for v in d.box]] for d in kept],
            })  # fmt: skip
        progress(len(batch))
    return rows


# --- models of transformers -----------------------------------------------------------------------------------------


class TransformersDetector:
    """An object detector (DETR and its kind) or instance segmenter (Mask2Former) of transformers.

    Args:
        source: a folder or hub id with weights, configuration and image processor.
        device: where it runs.

    Raises:
        UniLIPError: it cannot be loaded, or is of another kind.
    """

    def __init__(self, source: str, device: str = "cpu") -> None:
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(source)
            self.processor = transformers.AutoImageProcessor.from_pretrained(source)
            self.segments = any("UniversalSegmentation" in name for name in config.architectures or ())
            kind = "AutoModelForUniversalSegmentation" if self.segments else "AutoModelForObjectDetection"
            model = getattr(transformers, kind).from_pretrained(source)
        except Exception as error:
            raise UniLIPError(
                f"--detector {source} cannot be loaded ({_line(error)}); give a folder or hub id of an object "
                f"detector or "
                "a Mask2Former instance segmenter of transformers."
            ) from error
        self.model = model.to(device).eval()
        self.device = device
        self.name = f"detector {source.rstrip('/').split('/')[-1]}"
        theirs = {label: name for name, label in COCO.items()}
        self._names = {index: theirs.get(label, label) for index, label in config.id2label.items()}
        self.labels = frozenset(self._names.values())

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image], threshold: float) -> list[list[Detection]]:
        """Return the objects of each picture above a confidence."""
        inputs = self.processor(images=list(pictures), return_tensors="pt").to(self.device)
        outputs = self.model(**inputs)
        sizes = [picture.size[::-1] for picture in pictures]
        if self.segments:
            found = self.processor.post_process_instance_segmentation(
                outputs, threshold=threshold, target_sizes=sizes, return_binary_maps=True
            )
            return [self._of_masks(result) for result in found]
        found = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        return [
            [
                Detection(self._names[int(label)], float(score), tuple(float(v) for v in box))  # type: ignore[arg-type]
                for score, label, box in zip(result["scores"], result["labels"], result["boxes"], strict=True)
            ]
            for result in found
        ]

    def _of_masks(self, result: Mapping[str, Any]) -> list[Detection]:
        maps = result["segmentation"]
        found = []
        for number, info in enumerate(result["segments_info"]):
            mask = (maps[number] > 0.5).cpu().numpy()
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            if len(rows):
                box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
                found.append(Detection(self._names[int(info["label_id"])], float(info["score"]), box, mask))
        return found


class ClipColors:
    """Names colors with a CLIP model of transformers: the object alone, against three sentences for each color."""

    SENTENCES = ("a photo of a {color} {label}", "a photo of a {color}-colored {label}", "a photo of a {color} object")

    def __init__(self, source: str, device: str = "cpu") -> None:
        import transformers

        try:
            self.model = transformers.CLIPModel.from_pretrained(source).to(device).eval()
            self.processor = transformers.AutoImageProcessor.from_pretrained(source)
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        except Exception as error:
            raise UniLIPError(
                f"--color-model {source} cannot be loaded ({_line(error)}); give a folder or hub id of a CLIP model."
            ) from error
        self.device = device
        self.name = f"colors by {source.rstrip('/').split('/')[-1]}"
        self._texts: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, picture: Image.Image, objects: Sequence[Detection], label: str) -> list[str]:
        """Return a color for each object."""
        crops = [cut_out(picture, one) for one in objects]
        inputs = self.processor(images=crops, return_tensors="pt").to(self.device)
        seen = _features(self.model.get_image_features(**inputs))
        chosen = (seen @ self._of(label).T).argmax(1).tolist()
        return [COLORS[index] for index in chosen]

    def _of(self, label: str) -> torch.Tensor:
        if label not in self._texts:
            sentences = [s.format(color=color, label=label) for color in COLORS for s in self.SENTENCES]
            inputs = self.tokenizer(sentences, padding=True, return_tensors="pt").to(self.device)
            texts = _features(self.model.get_text_features(**inputs)).reshape(len(COLORS), len(self.SENTENCES), -1)
            self._texts[label] = torch.nn.functional.normalize(texts.mean(1), dim=-1)
        return self._texts[label]


def _features(value: Any) -> torch.Tensor:
    tensor = value if isinstance(value, torch.Tensor) else value.pooler_output
    return torch.nn.functional.normalize(tensor.float(), dim=-1)


class PlainColors:
    """Names colors without a network: the commonest color name among the object's pixels, in CIELAB."""

    name = "plain colors"
    # sRGB of the names, and of greys that belong to none but are nearer to black or white
    REFERENCES: Mapping[str, Sequence[tuple[int, int, int]]] = {
        "red": [(220, 30, 35), (150, 15, 25)], "orange": [(245, 135, 30)], "yellow": [(250, 220, 50)],
        "green": [(50, 160, 70), (20, 90, 40), (130, 200, 90)], "blue": [(40, 90, 210), (90, 160, 235), (20, 40, 110)],
        "purple": [(125, 55, 170), (80, 30, 110)], "pink": [(245, 150, 190), (235, 90, 150)],
        "brown": [(120, 75, 45), (85, 50, 30), (165, 115, 75)], "black": [(15, 15, 15), (60, 60, 60)],
        "white": [(250, 250, 250), (215, 215, 215)],
    }  # fmt: skip

    def __init__(self) -> None:
        pairs = [(name, colour) for name, colours in self.REFERENCES.items() for colour in colours]
        self._names = np.array([COLORS.index(name) for name, _ in pairs])
        self._lab = _to_lab(np.array([colour for _, colour in pairs], dtype=float))

    def __call__(self, picture: Image.Image, objects: Sequence[Detection], label: str) -> list[str]:
        """Return a color for each object."""
        pixels = np.asarray(picture.convert("RGB"), dtype=float)
        found = []
        for one in objects:
            left, top, right, bottom = (round(value) for value in one.box)
            inside = np.zeros(pixels.shape[:2], dtype=bool)
            if one.mask is not None:
                inside = one.mask.astype(bool)
            else:  # the middle of the box, where the background shows least
                dx, dy = (right - left) // 5, (bottom - top) // 5
                inside[max(0, top + dy) : max(1, bottom - dy), max(0, left + dx) : max(1, right - dx)] = True
            lab = _to_lab(pixels[inside])
            nearest = ((lab[:, None] - self._lab[None]) ** 2).sum(-1).argmin(1)
            votes = np.bincount(self._names[nearest], minlength=len(COLORS))
            found.append(COLORS[int(votes.argmax())])
        return found


def cut_out(picture: Image.Image, one: Detection) -> Image.Image:
    """Return an object alone: what its mask leaves out is grey, and its box is cut out."""
    picture = picture.convert("RGB")
    if one.mask is not None:
        hidden = Image.new("RGB", picture.size, GREY)
        picture = Image.composite(picture, hidden, Image.fromarray(one.mask.astype(np.uint8) * 255))
    left, top, right, bottom = (round(value) for value in one.box)
    return picture.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    """Turn sRGB (N,3) of 0..255 into CIELAB (N,3), D65."""
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = linear @ to_xyz.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
