"""Reads a picture of the emoji world without any trained network: background, and each object with place and colour.

In: a picture (H, W, 3) uint8, a World and its Atlas. Out: a `Reading`. Every sprite is laid over the background at all
places and sizes, on a coarse grid and, for the likeliest, in full resolution: it explains as much of the picture's
difference from its background as the squared error falls. The greatest wins, hides what it covers, and so on.
Background and colours are named in CIELAB. The verdicts compare a Reading with the scene asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unilip.emoji.art import PAINTS, Atlas, recolour
from unilip.emoji.concepts import SHAPES, concept
from unilip.emoji.edits import Edit
from unilip.emoji.render import background_rows, change_mask, render
from unilip.emoji.world import Obj, Scene, World, found_relation, relation
from unilip.errors import UniLIPError
from unilip.pictures import picture_psnr

Scan = tuple[Tensor, Tensor]  # merit of every look where an object may be (L, P); x, y, size there (P, 3)
Place = tuple[int, int, int, int]  # number of a look, x, y, size
VERSION = 2  # raise it when a change here may change a verdict: old results are not mixed with new ones
UNKNOWN = "unknown"  # something is there that looks like no drawing of the world
MIN_EXPLAINED = 0.85  # share of the picture's energy in a window that a sprite has to explain to be recognised
MIN_EXPLAINED_SHAPE = 0.92  # the same for drawn shapes: an outline in one colour is near to any blob of that colour
MIN_DETAIL = 0.25  # share of the sprite's detail that has to be there: a blob of the right colours is no thing
MIN_AREA = 0.10  # share of the smallest object's box that something has to cover to be seen at all
MIN_UNKNOWN = 0.20  # the same for what is recognised as nothing
CELLS = 16  # of the coarse grid, along a side of any window
BLUR = 1.0  # pixels of Gaussian blur of pictures and sprites: edges need not agree to the pixel
SOFTNESS = (0.0, 1.5, 2.5)  # further blur of a sprite, in pixels, that is tried before it is refused
MAX_SHARED = 0.3  # share of the smaller of two boxes that may overlap
CANDIDATES = 10  # kinds of sprites that are tried in full resolution
SCALES = (0.94, 0.97, 1.03, 1.06)  # of the likeliest sprites, tried in full resolution
FINALISTS = 3
KEPT = 768  # sprites at a size, kept ready: about 100 MB
BACKGROUND_NEAR = 20.0  # CIELAB distance up to which a pixel may belong to a background
BACKGROUND_SHARE = 0.20  # share of pixels that have to be near the background
BLOB_NEAR = 35.0  # CIELAB distance up to which a thing without a name has one of the palette's colours
PLACE_TOLERANCE = 0.15  # of the picture, between the middles of an object and of its place
LIGHTNESS_WEIGHT = 0.5  # of L against a and b when a colour is named: shading is not colour


@dataclass(frozen=True)
class Found:
    """One object read off a picture; box: left, top, right, bottom in pixels; score up to 1; colour None: no paint."""

    concept: str
    style: str
    colour: str | None
    box: tuple[float, float, float, float]
    score: float
    tone: str | None = None

    @property
    def centre(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def size(self) -> float:
        return self.box[2] - self.box[0]

    def __str__(self) -> str:
        return f"{self.colour} {self.concept}" if self.colour else self.concept


@dataclass(frozen=True)
class Reading:
    """What a picture shows; ``background`` is None where no background of the world is near."""

    background: str | None
    objects: tuple[Found, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Reading:
        objects = (Found(**{**entry, "box": tuple(entry["box"])}) for entry in record["objects"])
        return cls(record["background"], tuple(objects))

    def __str__(self) -> str:
        things = ", ".join(str(found) for found in self.objects) or "nothing"
        return f"{things} on {self.background or 'an unclear background'}"


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows what was asked: each part by name, all of them together, and why not."""

    ok: bool
    parts: dict[str, bool] = field(default_factory=dict)
    reason: str = ""


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB in 0..255 -> CIELAB (D65), shape (..., 3)."""
    c = np.asarray(rgb, dtype=np.float32) / 255
    linear = np.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=np.float32)
    xyz = linear @ matrix.T / np.array([0.9505, 1.0, 1.089], dtype=np.float32)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def read_background(picture: np.ndarray, world: World) -> tuple[str | None, np.ndarray]:
    """Return the background's name, None where none is near, and its rows as they are in the picture (H, 3).

    Every pixel votes for the backgrounds that it is near to in CIELAB, those at the border with three times the weight.
    """
    size, width = picture.shape[:2]
    lab = to_lab(smooth(picture.astype(np.float32), 1.0))  # S S 3
    weight = np.ones((size, width), dtype=np.float32)
    rim = max(2, min(size, width) // 14)
    weight[rim:-rim, rim:-rim] = 1 / 3
    shades = {name: background_rows(name, size).astype(np.float32) for name in world.backgrounds}
    distances = {name: np.linalg.norm(lab - to_lab(rows)[:, None], axis=-1) for name, rows in shades.items()}
    costs = {name: (np.minimum(far, BACKGROUND_NEAR) * weight).sum() / weight.sum() for name, far in distances.items()}
    name = min(costs, key=lambda name: costs[name])
    rows, near = shades[name], distances[name] < BACKGROUND_NEAR
    if not near.any():
        return None, rows
    # what the model drew may be off by a little: follow it, so that the difference is the objects alone
    offset = np.median((picture - rows[:, None])[near], axis=0)
    return (name if near.mean() >= BACKGROUND_SHARE else None), (rows + offset).astype(np.float32)


def smooth(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Blur (H, W, C) with a Gaussian of SIGMA pixels; edges are repeated."""
    moved = torch.from_numpy(np.ascontiguousarray(picture, dtype=np.float32)).permute(2, 0, 1)[None]
    return _blur(moved, sigma, "replicate")[0].permute(1, 2, 0).numpy()


def _blur(images: Tensor, sigma: float, mode: str) -> Tensor:
    reach = max(1, math.ceil(2.5 * sigma))
    steps = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode=mode)
    across = F.conv2d(padded, kernel[:, :, None, :], groups=images.shape[1])
    return F.conv2d(across, kernel[:, :, :, None], groups=images.shape[1])


def _premultiply(sprite: Image.Image) -> Tensor:
    """RGBA picture -> (4, S, S): colour times alpha, and alpha; colours in 0..1."""
    pixels = torch.from_numpy(np.asarray(sprite, dtype=np.float32) / 255).permute(2, 0, 1)
    return torch.cat([pixels[:3] * pixels[3:], pixels[3:]])


def _template(layers: Tensor) -> tuple[Tensor, Tensor]:
    """Layers (L, 4, s, s) of colour x alpha and alpha -> what is multiplied with _scene (L, 8, s, s), constant (L)."""
    painted, alpha = layers[:, :3], layers[:, 3:]
    return torch.cat([painted, alpha, painted * alpha, alpha * alpha], 1), (painted**2).sum((1, 2, 3))


def _scene(difference: Tensor, background: Tensor) -> Tensor:
    """Difference J and background B (3, h, w) -> (8, h, w); times a template: |J|^2 - |J - a (S - B)|^2, summed."""
    dot = (difference * background).sum(0, keepdim=True)
    square = (background**2).sum(0, keepdim=True)
    return torch.cat([2 * difference, -2 * dot, 2 * background, -square])


def _merit(gain: Tensor, energy: Tensor) -> Tensor:
    """What a sprite explains less half of what it leaves unexplained of the energy in its window."""
    return gain - 0.5 * (energy - gain)


def _detail(seen: Tensor, drawn: Tensor, size: int) -> float:
    """How much of the detail of DRAWN, at 1/25 to 1/8 of SIZE, is in SEEN: 1 for all, near 0 for a blurred blob."""
    both = torch.stack([seen, drawn])  # 2 3 h w
    fine, coarse = (_blur(both, share * size, "replicate") for share in (0.04, 0.12))
    a, b = fine - coarse
    return float((a * b).sum() / (b * b).sum().clamp_min(1e-6))


class Judge:
    """All sprites of a world, ready to be looked for; build it once (pico: 2 s) and read many pictures."""

    def __init__(self, world: World, atlas: Atlas) -> None:
        self.world, self.atlas = world, atlas
        self.looks = [
            Obj(name, style, colour, tone)  # without place and size
            for name in (*world.concepts, *world.extra)
            for style in (world.styles if name not in SHAPES else (world.default_style,))
            for colour in (*(() if name in SHAPES else (None,)), *world.colours_of(name, style))
            for tone in (None, *(world.tones if concept(name).toned and colour is None else ()))
        ]
        layers = torch.stack([self._coarse(look) for look in self.looks])  # L 4 CELLS CELLS
        weights, self._constant = _template(layers)
        self._weights = weights.flatten(1)  # L 8 x CELLS^2
        sizes = sorted({*world.single_sizes, *world.multi_sizes})
        near = {s for size in sizes for s in (round(size * 0.92), size, round(size * 1.08))}
        tried = {round(sizes[0] * 0.92), *sizes} if len(sizes) > 4 else near  # steps between many are fine already
        self.sizes = sorted(s for s in tried if s <= world.image_size)

    def _coarse(self, look: Obj) -> Tensor:
        """Colour x alpha and alpha of a look on the coarse grid: (4, CELLS, CELLS)."""
        if look.colour is None or look.concept in SHAPES:
            sprite = self.atlas.sprite(look.concept, look.style, CELLS * 3, look.colour, look.tone)
        else:  # painting the small drawing is ten times faster, and as good for the coarse grid
            sprite = recolour(self.atlas.sprite(look.concept, look.style, CELLS * 3), PAINTS[look.colour])
        return F.avg_pool2d(_premultiply(sprite), 3)

    def read(self, picture: np.ndarray | Image.Image) -> Reading:
        """Return what PICTURE, of the world's size, shows; a picture that is no square is looked at on a larger one."""
        pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
        width, height = self.world.size
        if pixels.shape != (height, width, 3) or pixels.dtype != np.uint8:
            raise UniLIPError(
                f"the judge of world {self.world.name!r} reads uint8 pictures of shape {(height, width, 3)}; "
                f"got {pixels.dtype} of shape {pixels.shape}; resize the picture, or take another world's judge"
            )
        background, rows = read_background(pixels, self.world)
        side = max(width, height)
        if width != height:
            rows = np.pad(rows, ((0, side - height), (0, 0)), mode="edge")
            whole = np.repeat(rows[:, None], side, axis=1)
            whole[:height, :width] = pixels
            pixels = whole.round().clip(0, 255).astype(np.uint8)
        image = torch.from_numpy(smooth(pixels.astype(np.float32) / 255, BLUR)).permute(2, 0, 1)  # 3 S S
        behind = torch.from_numpy(rows / 255).T[:, :, None].expand(-1, -1, side).contiguous()
        difference = image - behind
        # the energy above which a pixel is no background: ten times that of the quieter quarter, 0.06 RGB at least
        floor = max(0.004, 10 * float(torch.quantile((difference**2).sum(0).flatten(), 0.25)))
        scan = self._scan(difference, behind, floor)
        objects: list[Found] = []
        for _ in range(self.world.max_count + 3):
            found, cover = self._next(difference, behind, floor, scan, objects)
            if found is None:
                break
            objects.append(self._name_colour(found, image, behind))
            difference = difference * (1 - cover)
        return Reading(background, tuple(objects))

    def _next(
        self, left: Tensor, behind: Tensor, floor: float, scan: Scan, before: Sequence[Found]
    ) -> tuple[Found | None, Tensor]:
        """Find the sprite that explains most of what is LEFT (3, S, S); returns it and what it hides (S, S)."""
        remaining = (left**2).sum(0)
        busy = (remaining > floor).float()
        smallest = min(self.world.multi_sizes) ** 2
        if float(busy.sum()) < MIN_AREA * smallest:
            return None, busy
        fit = self._refine(left, behind, self._candidates(scan, before))
        if fit is None:
            return self._unknown(busy)
        look, x, y, size = fit
        layers = self._fine(look, size)[0]
        window = (..., slice(y, y + size), slice(x, x + size))
        wide = (..., slice(max(0, y - 2), y + size + 2), slice(max(0, x - 2), x + size + 2))
        drawn = torch.zeros_like(left)
        drawn[window] = layers[:3] - layers[3] * behind[window]
        score, softness = -1.0, 0.0
        for softer in SOFTNESS:  # a decoder's pictures are softer than the art
            soft = _blur(layers[None], softer, "constant")[0] if softer else layers
            rest = left.clone()
            rest[window] -= soft[:3] - soft[3] * behind[window]
            explained = 1 - float((rest**2).sum(0)[wide].sum() / remaining[wide].sum().clamp_min(1e-6))
            if explained > score:
                score, softness = explained, softer
        seen = float(busy[wide].sum()) >= MIN_AREA * smallest
        enough = MIN_EXPLAINED_SHAPE if look.concept in SHAPES else MIN_EXPLAINED
        if not seen or score < enough or _detail(left[wide], drawn[wide], size) < MIN_DETAIL:
            return self._unknown(busy, fit[1:])
        reach = round(3 + 2 * softness)  # the soft outline belongs to the object
        cover = torch.zeros_like(busy)
        cover[window] = layers[3]
        cover = (F.max_pool2d(cover[None], 2 * reach + 1, 1, reach)[0] > 0.15).float()
        if float((busy * (1 - cover))[wide].sum()) < 0.12 * size * size:
            cover[wide] = 1  # what little its window holds beside it is no object of its own
        box = (float(x), float(y), float(x + size), float(y + size))
        return Found(look.concept, look.style, look.colour, box, round(score, 4), look.tone), cover

    def _unknown(self, busy: Tensor, place: tuple[int, int, int] | None = None) -> tuple[Found | None, Tensor]:
        """Return PLACE (x, y, size) as a thing without a name, or the window of the smallest size that holds most."""
        cover = torch.zeros_like(busy)
        size = min(self.world.multi_sizes)
        x, y, wide = place or (0, 0, 0)
        if float(busy[y : y + wide, x : x + wide].sum()) >= MIN_UNKNOWN * size * size:
            size = wide
        else:
            share = F.avg_pool2d(busy[None], size, 1)[0]
            if float(share.max()) < MIN_UNKNOWN:
                return None, cover
            y, x = divmod(int(share.argmax()), share.shape[-1])
        cover[y : y + size, x : x + size] = 1
        # what hangs together is one thing, however blurred, as far as the largest thing would reach
        reach = max(size, max(self.world.single_sizes)) // 2 + round(0.15 * size)
        limit = torch.zeros_like(busy)
        cx, cy = x + size // 2, y + size // 2
        limit[max(0, cy - reach) : cy + reach, max(0, cx - reach) : cx + reach] = 1
        for _ in range(reach // 3):
            cover = torch.maximum(cover, F.max_pool2d(cover[None], 7, 1, 3)[0] * busy * limit)
        return Found(UNKNOWN, self.world.default_style, None, (x, y, x + size, y + size), 0.0), cover

    def _scan(self, difference: Tensor, behind: Tensor, floor: float) -> Scan:
        """Slide all looks over the coarse picture at all sizes."""
        side = difference.shape[-1]
        busy = ((difference**2).sum(0, keepdim=True) > floor).float()
        merits, places = [], []
        for size in self.sizes:
            steps = round(side * CELLS / size)
            small = F.interpolate(torch.cat([difference, behind, busy])[None], size=(steps, steps), mode="area")[0]
            energy = (small[:3] ** 2).sum(0, keepdim=True)
            full = F.avg_pool2d(energy, CELLS, 1).flatten() * CELLS**2
            around = F.avg_pool2d(F.pad(energy, (1, 1, 1, 1)), CELLS + 2, 1).flatten() * (CELLS + 2) ** 2
            share = F.avg_pool2d(small[6:], CELLS, 1).flatten()
            # an object ends where its window does: no window that is near empty, or cuts through things
            index = ((share > 0.06) & (around - full < 0.3 * full)).nonzero()[:, 0]
            windows = F.unfold(_scene(small[:3], small[3:6])[None], CELLS)[0, :, index]  # 8 x CELLS^2, P
            gain = self._weights @ windows - self._constant[:, None]  # L P
            merits.append(_merit(gain, full[index]) * (size / CELLS) ** 2)
            scale, columns = side / steps, steps - CELLS + 1
            x, y = (index % columns * scale).round(), (index // columns * scale).round()
            places.append(torch.stack([x, y, torch.full_like(x, size)], 1))
        return torch.cat(merits, 1), torch.cat(places)

    def _candidates(self, scan: Scan, before: Sequence[Found]) -> list[Place]:
        """Return the likeliest kinds around the place where a sprite explains most."""
        merits, places = scan
        size = places[:, 2]
        middle = places[:, :2] + size[:, None] / 2  # P 2
        free = torch.ones(len(size), dtype=torch.bool)
        for found in before:
            smaller = size.clamp_max(found.size)
            apart = (middle - torch.tensor(found.centre)).abs()
            shared = ((size + found.size)[:, None] / 2 - apart).clamp_min(0).clamp_max(smaller[:, None]).prod(1)
            free &= shared < MAX_SHARED * smaller**2
        if not free.any():
            return []
        peak = int(torch.where(free, merits.amax(0), -math.inf).argmax())
        near = (free & ((middle - middle[peak]).abs().amax(1) < 0.25 * size[peak])).nonzero()[:, 0]
        best, at = merits[:, near].max(1)  # L
        where = places[near[at]].int().tolist()
        # one candidate a kind: colours of one drawing would crowd out the others
        chosen: dict[tuple[str, str], Place] = {}
        for number in best.argsort(descending=True, stable=True).tolist():
            look = self.looks[number]
            chosen.setdefault((look.concept, look.style), (number, *where[number]))
        return list(chosen.values())[:CANDIDATES]

    def _refine(self, left: Tensor, behind: Tensor, candidates: Sequence[Place]) -> tuple[Obj, int, int, int] | None:
        """Try each candidate in full resolution at sizes and places nearby; returns the best (look, x, y, size)."""
        scene = _scene(left, behind)
        energy = (left**2).sum(0, keepdim=True)
        tried = [self._fit(scene, energy, place, 1.0) for place in candidates]
        tried.sort(key=lambda fit: -fit[0])
        for value, index, x, y, size in tried[:FINALISTS]:
            tried += [self._fit(scene, energy, (index, x, y, size), scale) for scale in SCALES if value > 0]
        if not tried:
            return None
        value, index, x, y, size = max(tried, key=lambda fit: fit[0])
        return None if value <= 0 else (self.looks[index], x, y, size)

    def _fit(self, scene: Tensor, energy: Tensor, place: Place, scale: float) -> tuple[float, int, int, int, int]:
        """Slide one look, SCALE times as large, around a place; returns merit, look, x, y, size."""
        index, x, y, size = place
        side = scene.shape[-1]
        look, s = self.looks[index], min(round(size * scale), side)
        reach = max(3, math.ceil(size / CELLS)) if scale == 1 else 2
        weights, constant = self._fine(look, s)[1:]
        cx, cy = x + (size - s) // 2, y + (size - s) // 2
        x0, y0 = max(0, min(cx - reach, side - s)), max(0, min(cy - reach, side - s))
        x1, y1 = max(x0, min(cx + reach, side - s)), max(y0, min(cy + reach, side - s))
        gain = F.conv2d(scene[None, :, y0 : y1 + s, x0 : x1 + s], weights)[0, 0] - constant
        full = F.avg_pool2d(energy[:, y0 : y1 + s, x0 : x1 + s], s, 1)[0] * s * s
        merit = _merit(gain, full)
        dy, dx = divmod(int(merit.argmax()), merit.shape[-1])
        return float(merit.max()), index, x0 + dx, y0 + dy, s

    @lru_cache(maxsize=KEPT)  # noqa: B019 - a judge lives as long as its run
    def _fine(self, look: Obj, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Colour x alpha and alpha of a sprite, blurred as the picture is (4, size, size), and its template."""
        sprite = self.atlas.sprite(look.concept, look.style, size, look.colour, look.tone)
        layers = _blur(_premultiply(sprite)[None], BLUR, "constant")
        return (layers[0], *_template(layers))

    def _name_colour(self, found: Found, image: Tensor, behind: Tensor) -> Found:
        """Name colour or skin tone by the pixels that they change: the nearest variant in mean CIELAB."""
        if found.concept == UNKNOWN:
            return replace(found, colour=self._name_blob(found, image, behind))
        colours = self.world.colours_of(found.concept, found.style)
        tones = (None, *self.world.tones) if concept(found.concept).toned and not colours else (None,)
        looks = [Obj(found.concept, found.style, colour, tone) for colour in colours or (None,) for tone in tones]
        place = (int(found.box[0]), int(found.box[1]), int(found.size))
        nearest = self._nearest(looks, place, image, behind) if len(looks) > 1 else looks[0]
        return replace(found, colour=nearest.colour, tone=nearest.tone)

    def _nearest(self, looks: Sequence[Obj], place: tuple[int, int, int], image: Tensor, behind: Tensor) -> Obj:
        x, y, size = place
        window = (slice(None), slice(y, y + size), slice(x, x + size))
        layers = [self._fine(look, size)[0] for look in looks]
        labs = [_lab_of(each[:3] + (1 - each[3]) * behind[window]) for each in layers]
        spread = np.stack(labs).std(0).sum(-1) * (layers[0][3].numpy() > 0.8)
        weight = (spread > 0.5 * spread.max()).astype(np.float32)
        seen = _mean(_lab_of(image[window]), weight)
        scale = np.array([1 if concept(looks[0].concept).toned else LIGHTNESS_WEIGHT, 1, 1])  # skin: light or dark
        return looks[int(np.argmin([np.linalg.norm((_mean(lab, weight) - seen) * scale) for lab in labs]))]

    def _name_blob(self, found: Found, image: Tensor, behind: Tensor) -> str | None:
        """Name the colour of a thing without a name: the palette's nearest to its median, None if none is near."""
        left, top, right, bottom = (int(value) for value in found.box)
        window = (slice(None), slice(top, bottom), slice(left, right))
        seen = ((image - behind)[window] ** 2).sum(0) > 0.02
        if not bool(seen.any()):
            return None
        median = to_lab(image[window][:, seen].median(1).values.numpy() * 255)
        scale = np.array([LIGHTNESS_WEIGHT, 1, 1])
        colours = self.world.colours
        distances = [np.linalg.norm((to_lab(np.array(PAINTS[name])) - median) * scale) for name in colours]
        nearest = int(np.argmin(distances))
        return colours[nearest] if distances[nearest] < BLOB_NEAR else None

    @lru_cache(maxsize=4096)  # noqa: B019 - as long as that
    def colours_as(self, obj: Obj) -> tuple[str | None, ...]:
        """Return the colour names that a reading may give OBJ: its own, or those nearest to the artist's drawing."""
        colours = self.world.colours_of(obj.concept, obj.style)
        if not colours:
            return (None,)
        if obj.colour is not None:
            return (obj.colour,)
        layers = self._fine(Obj(obj.concept, obj.style, None, obj.tone), obj.size)[0]
        behind = torch.full_like(layers[:3], 0.6)
        looks = [Obj(obj.concept, obj.style, name, None) for name in colours]
        near = self._nearest(looks, (0, 0, obj.size), layers[:3] + (1 - layers[3]) * behind, behind).colour
        return (near, *(name for name in colours if name != near and self.world.looks(obj, name)))


def _lab_of(image: Tensor) -> np.ndarray:
    return to_lab((image.clamp(0, 1) * 255).permute(1, 2, 0).numpy())


def _mean(lab: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return (lab * weight[..., None]).sum((0, 1)) / max(float(weight.sum()), 1e-6)


def assign(found: Sequence[Found], asked: Sequence[Obj]) -> tuple[int, ...] | None:
    """Return for each asked object the index of a found one of the same concept, colours matched first, or None."""
    if len(found) != len(asked) or sorted(f.concept for f in found) != sorted(o.concept for o in asked):
        return None
    orders = [
        order
        for order in permutations(range(len(found)))
        if all(found[i].concept == obj.concept for i, obj in zip(order, asked, strict=True))
    ]

    def fit(order: tuple[int, ...]) -> tuple[int, float]:
        pairs = [(found[i], obj) for i, obj in zip(order, asked, strict=True)]
        colours = sum(obj.colour is None or f.colour == obj.colour for f, obj in pairs)
        return colours, -sum(math.dist(f.centre, obj.centre) for f, obj in pairs)

    return max(orders, key=fit)


def judge_prompt(reading: Reading, asked: Scene, task: str, world: World) -> Verdict:
    """Compare a reading with the scene that a prompt asked for, in the parts that the prompt says.

    Parts: background; objects (the right things, no others); count; colour and tone (where named); style (where the
    world has several); relation (task "position"). With other objects "colour" only says whether the colours are there.
    """
    parts, pairs = _compare(reading, asked, world)
    painted = [obj.colour for obj in asked.objects if obj.colour]
    if painted and pairs:
        parts["colour"] = all(obj.colour in (None, found.colour) for found, obj in pairs)
    elif painted:  # the verdict is no already; the part still says whether the colours are there
        parts["colour"] = not Counter(painted) - Counter(f.colour for f in reading.objects if f.colour)
    if any(obj.tone for obj in asked.objects):
        parts["tone"] = bool(pairs) and all(obj.tone in (None, found.tone) for found, obj in pairs)
    if task == "position":
        wanted = relation(asked.objects[0], asked.objects[1])
        parts["relation"] = bool(pairs) and found_relation(pairs[0][0], pairs[1][0]) == wanted
    wrong = [name for name, right in parts.items() if not right]
    return Verdict(not wrong, parts, f"{', '.join(wrong)} wrong: saw {reading}" if wrong else "")


def _compare(reading: Reading, asked: Scene, world: World) -> tuple[dict[str, bool], list[tuple[Found, Obj]]]:
    """Return the parts that every prompt has, and which found object is which asked one (none if they do not fit)."""
    names = [obj.concept for obj in asked.objects]
    seen = [found.concept for found in reading.objects]
    parts = {
        "background": reading.background == asked.background,
        "objects": set(seen) == set(names),
        "count": len(seen) == len(names),
    }
    order = assign(reading.objects, asked.objects)
    if order is None and parts["objects"] and parts["count"]:
        parts["objects"] = False  # two cats and a dog are not a cat and two dogs
    pairs = [] if order is None else [(reading.objects[i], obj) for i, obj in zip(order, asked.objects, strict=True)]
    if len(world.styles) > 1 and any(obj.concept not in SHAPES for obj in asked.objects):
        parts["style"] = bool(pairs) and all(o.concept in SHAPES or f.style == o.style for f, o in pairs)
    return parts, pairs


def judge_edit(judge: Judge, result: np.ndarray | Image.Image, edit: Edit) -> Verdict:
    """Compare the RESULT of an edit with its target scene, object by object.

    Parts: done (the instruction was followed); rest kept (what it does not name is still there). Objects have to be
    within PLACE_TOLERANCE of their place, a new one on the side named.
    """
    world, target = judge.world, edit.target
    reading = judge.read(result)
    seen, pairs = _compare(reading, target, world)
    before = set(edit.source.objects)
    tolerance = PLACE_TOLERANCE * world.image_size

    def there(found: Found, obj: Obj) -> bool:
        return math.dist(found.centre, obj.centre) <= tolerance

    def alike(found: Found, obj: Obj) -> bool:
        tone = obj.tone == found.tone or not concept(obj.concept).toned or not world.tones
        return found.colour in judge.colours_as(obj) and tone and (obj.concept in SHAPES or found.style == obj.style)

    fits = seen["objects"] and seen["count"]
    changed = [(found, obj) for found, obj in pairs if obj not in before]
    same = [(found, obj) for found, obj in pairs if obj in before]
    if edit.kind == "background":
        done = seen["background"]
    elif edit.kind == "add":
        beside = all(found_relation(f, g) == relation(o, p) for f, o in changed for g, p in same[:1])
        done = fits and bool(changed) and beside and all(alike(f, o) for f, o in changed)
    elif edit.kind == "remove":
        done = fits
    elif edit.kind == "style":
        done = bool(pairs) and seen.get("style", True)
    else:  # replace, move, recolour, skin_tone: the object is where and as the target says
        done = fits and bool(changed) and all(there(f, o) and alike(f, o) for f, o in changed)
    kept = bool(pairs) and all(there(f, o) and alike(f, o) for f, o in same)
    kept = kept and (fits if edit.kind == "background" else seen["background"])
    wrong = [*([] if done else [f"{edit.kind} not done"]), *([] if kept else ["rest not kept"])]
    reason = f"{', '.join(wrong)}: saw {reading}" if wrong else ""
    return Verdict(not wrong, {"done": done, "rest kept": kept}, reason)


def psnr_outside(judge: Judge, result: np.ndarray, edit: Edit) -> float | None:
    """Return the PSNR of RESULT against the target's render where EDIT may change nothing, in dB."""
    outside = ~change_mask(edit.source, edit.target, judge.atlas, judge.world)
    if not outside.any():
        return None
    return round(picture_psnr(result, np.asarray(render(edit.target, judge.atlas, judge.world)), outside), 3)
