"""Emoji artwork: fetched once, rasterised once, handed out as sprites of any size, colour and skin tone.

In: three npm packages of SVG icons (`prepare`). Out: one atlas file, and `Atlas.sprite`, an RGBA picture whose longer
visible side fills the size asked for. Four shapes (heart, circle, square, triangle) are drawn here, without any art.
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from unilip.emoji.concepts import SHAPES, TONES, concept, concepts
from unilip.errors import DataError, check_choice, install
from unilip.files import png_bytes, read_json, read_table, stable_hash, write_bytes
from unilip.pictures import open_picture

if TYPE_CHECKING:
    from unilip.emoji.world import World

log = logging.getLogger(__name__)

MASTER = 160  # pixels a side of the rasterised sprites
MASTERS = 512  # of them kept decoded, at the art's own size and painted
ATLAS_FILE = "atlas-160.npz"
HORIZON = 0.6  # share of a background's height above the ground line
NEAR_HUE = 40.0  # degrees around a drawing's main hue that are painted with it
VARIANTS = {*TONES.values(), "2640", "2642"}  # skin tones and sexes: the same drawing again
LETTERS = ("1f1e", "1f1f")  # that flags are made of
RGB = tuple[int, int, int]
Drawing = tuple[str, str, str | None]  # style, name, skin tone


@dataclass(frozen=True)
class Style:
    """One artist's drawings: the npm package that holds them and whom to credit."""

    package: str
    version: str
    licence: str
    credit: str

    @property
    def tarball(self) -> str:
        return f"{self.package.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


TABLES: dict[str, Any] = read_table("unilip.emoji", "art.json")
STYLES = {name: Style(**fields) for name, fields in TABLES["styles"].items()}
PALETTE: dict[str, RGB] = {name: tuple(colour) for name, colour in TABLES["palette"].items()}
# Between those of the palette: for a model to learn that colours are a range. Nothing is measured on them.
HUES: dict[str, RGB] = {name: tuple(colour) for name, colour in TABLES["hues"].items()}
PAINTS = PALETTE | HUES


@dataclass(frozen=True)
class Background:
    """What is behind the objects: a plain colour, a gradient from top to bottom, or a horizon (sky, then ground)."""

    name: str
    kind: str  # plain, gradient, horizon
    top: RGB
    bottom: RGB
    phrases: tuple[str, ...]  # as in "a cat PHRASE"; the first is the canonical one
    answer: str
    target: str  # as in "change the background to TARGET"


BACKGROUNDS: dict[str, Background] = {
    name: Background(name, kind, tuple(top), tuple(bottom), tuple(phrases), *named)
    for name, (kind, top, bottom, phrases, *named) in TABLES["backgrounds"].items()
}


def data_dir() -> Path:
    """Return the folder that holds the art: $UNILIP_DATA, or ~/.cache/unilip/emoji."""
    return Path(os.environ.get("UNILIP_DATA") or "~/.cache/unilip/emoji").expanduser()


def prepare(
    output: Path | None = None, source: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Path:
    """Rasterise every concept in three styles and all skin tones, and all else that the packages hold, to one file.

    SOURCE may hold the three npm tarballs or the unpacked packages; else ``npm pack`` fetches them. OUTPUT is a folder
    (default ``data_dir()``); PROGRESS is told (done, total). Returns the file's path. Raises DataError: npm, a package
    or a drawing is missing.
    """
    folder = Path(output) if output is not None else data_dir()
    path, credits = folder / ATLAS_FILE, folder / "CREDITS.txt"
    work = _drawings(concepts(), STYLES)
    made = path.is_file() and credits.is_file() and credits.read_bytes() == _credits()
    if source is None and made and Atlas.load(path)._sprites.keys() > {_key(*item) for item in work}:
        log.info("the art of these versions is in %s already; remove the folder to draw it again", folder)
        return path
    with tempfile.TemporaryDirectory(prefix="unilip-art-") as scratch:
        if source is None:
            source = _npm_pack(Path(scratch))
        packages = {name: _open_package(style, Path(source), Path(scratch)) for name, style in STYLES.items()}
    codes = [concept(name).tone_codepoint(tone) if tone else concept(name).codepoint for _, name, tone in work]
    work += [(style, code, None) for style, package in packages.items() for code in package.others()]
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # before minutes of drawing
        raise DataError(f"the folder {folder} cannot be written to; give another (--output DIR)")
    sprites: dict[str, bytes] = {}
    for done, ((style, name, tone), code) in enumerate(zip_longest(work, codes)):
        sprites[_key(style, name, tone)] = _rasterise(*packages[style].svg(code or name, name))
        if progress is not None:
            progress(done + 1, len(work))
    Atlas(sprites).save(path)
    write_bytes(credits, _credits())
    log.info("wrote %d sprites to %s", len(sprites), path)
    return path


def _drawings(names: Iterable[str], styles: Iterable[str], tones: Iterable[str] = tuple(TONES)) -> list[Drawing]:
    """Return style, name and skin tone of each drawing that there is of concepts; our own shapes have none."""
    drawn = [(style, concept(name)) for style in styles for name in names if concept(name).codepoint]
    return [(style, c.name, tone) for style, c in drawn for tone in (None, *(tones if c.toned else ()))]


def _npm_pack(folder: Path) -> Path:
    npm, wanted = shutil.which("npm"), [f"{style.package}@{style.version}" for style in STYLES.values()]
    if npm is None:
        raise DataError(
            f"npm was not found, and the art is fetched with it; install Node.js, or run `npm pack {' '.join(wanted)}` "
            "on another machine and give the folder as source (--source DIR)"
        )
    command = [npm, "pack", *wanted, "--silent", "--pack-destination", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise DataError(
            f"`npm pack {' '.join(wanted)}` failed with exit status {result.returncode}: "
            f"{result.stderr.strip()[-500:]}; check the network, or give a folder that holds the packages as source "
            "(--source DIR)"
        )
    return folder


@dataclass(frozen=True)
class _Package:
    """An opened Iconify package: icon bodies by name, and icon names by codepoint."""

    label: str
    icons: dict[str, Any]  # what icons.json holds
    chars: dict[str, str]

    def svg(self, codepoint: str, name: str) -> tuple[str, float, float]:
        """Return (body, width, height) of the icon of CODEPOINT; raises DataError if the package lacks it."""
        for variant in (codepoint, f"{codepoint}-fe0f", codepoint.replace("-fe0f", "")):
            if icon_name := self.chars.get(variant):
                icon_name = self.icons.get("aliases", {}).get(icon_name, {}).get("parent", icon_name)
                found = {"width": 16, "height": 16, **self.icons, **self.icons["icons"][icon_name]}
                return found["body"], found["width"], found["height"]
        raise DataError(f"{self.label} has no drawing for {name!r} ({codepoint}); use the version named in art.STYLES")

    def others(self) -> list[str]:
        """Return the codepoints, without variants of each other, of what is no concept and not like a held-out one."""
        aliases, found = self.icons.get("aliases", {}), dict[str, str]()
        named = {each.codepoint.replace("-fe0f", "") for each in concepts().values()} | set(TABLES["kept out"])
        for code, icon in self.chars.items():
            parts = code.replace("-fe0f", "").split("-")
            if "-".join(parts) not in named and not VARIANTS & set(parts) and not code.startswith(LETTERS):
                found.setdefault(aliases.get(icon, {}).get("parent", icon), "-".join(parts))
        return list(dict.fromkeys(found.values()))


def _open_package(style: Style, source: Path, scratch: Path) -> _Package:
    short, root = style.package.rsplit("/", 1)[-1], source
    if (source / style.tarball).is_file():
        root = scratch / f"unpacked-{short}"
        with tarfile.open(source / style.tarball) as archive:
            archive.extractall(root / short, filter="data")
    for file in sorted(root.rglob("icons.json")):
        if short in file.relative_to(root).parts and file.with_name("chars.json").is_file():
            label = f"{style.package}@{style.version}"
            return _Package(label, read_json(file), read_json(file.with_name("chars.json")))
    raise DataError(
        f"{source} holds no {style.package}@{style.version}; expected {style.tarball}, or a folder {short} with "
        "icons.json and chars.json; run `npm pack` there, or leave source away to fetch it"
    )


def _rasterise(body: str, width: float, height: float) -> bytes:
    """Draw an SVG body twice: once to find what is visible, once with that filling MASTER pixels."""
    image = _resvg(body, (0.0, 0.0, width, height))
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    if box is None:
        raise DataError("a drawing came out empty; the package may be damaged, fetch it again")
    scale = max(width, height) / MASTER
    left = box[0] * scale - (max(width, height) - width) / 2
    top = box[1] * scale - (max(width, height) - height) / 2
    return png_bytes(_resvg(body, (left, top, (box[2] - box[0]) * scale, (box[3] - box[1]) * scale)))


def _resvg(body: str, box: tuple[float, float, float, float]) -> Image.Image:
    try:
        import resvg_py
    except ImportError:
        raise DataError(f"the package resvg_py is missing; {install('train')}") from None
    view = " ".join(f"{number:g}" for number in box)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}" '
        f'width="{MASTER}" height="{MASTER}">{body}</svg>'
    )
    data = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return open_picture(bytes(data)).convert("RGBA")


def _credits() -> bytes:
    lines = [f"{name}: {s.package}@{s.version}, licence {s.licence}. {s.credit}\n" for name, s in STYLES.items()]
    return f"The sprites in this folder were rasterised from these drawings:\n\n{''.join(lines)}".encode()


def _key(style: str, name: str, tone: str | None) -> str:
    return f"{style}/{name}/{tone}" if tone else f"{style}/{name}"


class Atlas:
    """All sprites, compressed in memory (about 12 MB) and decoded on demand; picklable, caches stay behind."""

    def __init__(self, sprites: dict[str, bytes]) -> None:
        self._sprites = sprites
        self._master = lru_cache(MASTERS)(self._decode)
        self._sized = lru_cache(8 * MASTERS)(self._scale)

    @classmethod
    def load(cls, path: Path | None = None) -> Atlas:
        """Read an atlas file, or the one in folder PATH (default ``data_dir()``); raises DataError if it is missing."""
        file = Path(path) if path is not None else data_dir()
        if file.is_dir():
            file = file / ATLAS_FILE
        if not file.is_file():
            raise DataError(
                f"no atlas at {file}; run `unilip data prepare emoji` once, or point the environment variable "
                "UNILIP_DATA at the folder that holds it. Pictures of your own are read with data.source=files"
            )
        with np.load(file, allow_pickle=False) as stored:
            keys, ends, data = stored["keys"], stored["ends"].tolist(), stored["data"].tobytes()
        return cls({str(k): data[a:b] for k, a, b in zip(keys, [0, *ends[:-1]], ends, strict=True)})

    @classmethod
    def synthetic(cls, world: World, size: int = 48) -> Atlas:
        """Return fake sprites for WORLD: a coloured polygon per concept and style, by hash. For tests without art."""
        keys = [_key(*drawing) for drawing in _drawings(world.names, world.styles)]
        keys += [_key(style, code, None) for style in STYLES for code in ("1f600", "1f4a9") if world.strangers]
        return cls({key: _fake(key, size) for key in keys})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._sprites,)

    def of(self, world: World) -> Atlas:
        """Return the few sprites that a judge of WORLD looks for."""
        keys = {_key(*one) for one in _drawings((*world.concepts, *world.extra), world.styles, world.tones)}
        return Atlas({key: data for key, data in self._sprites.items() if key in keys})

    def save(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(
            buffer,
            keys=np.array(list(self._sprites)),
            ends=np.cumsum([len(data) for data in self._sprites.values()]),
            data=np.frombuffer(b"".join(self._sprites.values()), dtype=np.uint8),
        )
        write_bytes(path, buffer.getvalue())

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when any sprite changes: pictures made with another atlas differ."""
        digest = hashlib.blake2b(digest_size=8)
        for key in sorted(self._sprites):
            digest.update(key.encode() + b"\0" + self._sprites[key])
        return digest.hexdigest()

    @cached_property
    def strange(self) -> list[tuple[str, str]]:
        """Style and name of all drawings that are no concept, and have no words."""
        keys = (key.split("/") for key in self._sprites)
        return [(style, name) for style, name, *_ in keys if name not in concepts()]

    def warm(self, world: World) -> Atlas:
        """Decode and paint all that WORLD can show (100 kB a sprite), for loader workers to share; returns itself."""
        work = [
            (name, style, colour, tone)
            for style, name, tone in _drawings(world.names, world.styles, world.tones)
            for colour in (None, *world.colours_of(name, style))
        ]
        self._master = lru_cache(max(MASTERS, len(work)))(self._decode)
        for entry in work:
            self._master(*entry)
        return self

    def sprite(
        self, name: str, style: str, size: int, colour: str | None = None, tone: str | None = None
    ) -> Image.Image:
        """Return the cached RGBA sprite of SIZE x SIZE pixels; do not write into it. A drawn shape needs a colour.

        Raises DataError: a name, style, colour (of PAINTS) or tone (of TONES) that does not exist.
        """
        return self._sized(name, style, size, colour, tone)

    def _scale(self, name: str, style: str, size: int, colour: str | None, tone: str | None) -> Image.Image:
        if size < 1:
            raise DataError(f"sprite size {size} is not allowed; give at least 1 pixel")
        if name in SHAPES:
            return draw_shape(name, self._paint(name, colour), size)
        master = self._master(name, style, colour, tone)
        return master if master.width == size else master.resize((size, size), Image.Resampling.LANCZOS)

    def _decode(self, name: str, style: str, colour: str | None, tone: str | None) -> Image.Image:
        data = self._sprites.get(_key(style, name, tone))
        if data is None:
            known = sorted({k.split("/")[0] for k in self._sprites})
            raise DataError(
                f"the atlas has no {name!r} in style {style!r}, tone {tone!r}; styles here are {', '.join(known)}; "
                "run `unilip data prepare emoji` again if the art is older than the package"
            )
        image = open_picture(data).convert("RGBA")
        return image if colour is None else recolour(image, self._paint(name, colour))

    @staticmethod
    def _paint(name: str, colour: str | None) -> RGB:
        if colour is None:
            raise DataError(f"the drawn shape {name!r} needs a colour; allowed are {', '.join(PAINTS)}")
        check_choice("colour", colour, PAINTS, DataError)
        return PAINTS[colour]


def _dominant(hsv: Sequence[np.ndarray], alpha: np.ndarray) -> tuple[float, float, float] | None:
    """The tone that most of a picture has within NEAR_HUE: hue, saturation, value; None if it is all grey."""
    hue, saturation, value = hsv
    weight = alpha * saturation * np.sqrt(value) * (saturation > 0.25) * (value > 0.15)
    if weight.sum() < 1e-3:
        return None
    histogram = np.bincount((hue / 5.0).astype(int).ravel() % 72, weights=weight.ravel(), minlength=72)
    smooth = sum((np.roll(histogram, k) * (4 - abs(k)) for k in range(-3, 4)), start=np.zeros(72))
    centre = float(np.argmax(smooth)) * 5.0 + 2.5
    near = (_hue_distance(hue, centre) < NEAR_HUE) & (weight > 0)
    return centre, *(_weighted_median(values[near], weight[near]) for values in (saturation, value))  # type: ignore[return-value]


def _hue_distance(hue: np.ndarray, centre: float) -> np.ndarray:
    return np.abs((hue - centre + 180.0) % 360.0 - 180.0)


def recolour(image: Image.Image, colour: RGB) -> Image.Image:
    """Shift the dominant hue of an RGBA picture and those within NEAR_HUE, so that its main tone is COLOUR."""
    pixels = np.asarray(image, dtype=np.float32)
    hue, saturation, value = hsv = _to_hsv(pixels[..., :3] / 255.0)
    tone = _dominant(hsv, pixels[..., 3] / 255.0)
    if tone is None:
        return image
    own_hue, own_s, own_v = tone
    to_hue, to_s, to_v = colorsys.rgb_to_hsv(*(c / 255.0 for c in colour))
    # a soft edge in hue and saturation, so that outlines do not flicker between two colours
    near = np.clip((NEAR_HUE + 12.0 - _hue_distance(hue, own_hue)) / 12.0, 0, 1)
    mix = (near * np.clip((saturation - 0.10) / 0.15, 0, 1))[..., None]
    new_s = np.clip(saturation * (to_s / max(own_s, 0.05)), 0, 1)
    ratio = value / max(own_v, 0.05)
    # lighter shades move towards white in what room there is, darker ones scale
    lighter = 1 - (1 - to_v) * (1 - value) / max(1 - own_v, 0.02)
    new_v = np.clip(np.where(ratio > 1, lighter, to_v * ratio), 0, to_v * 1.9 if to_v < 0.4 else 1.0)
    painted = _to_rgb(np.full_like(hue, to_hue * 360.0), new_s, new_v) * 255.0
    mixed = pixels[..., :3] * (1 - mix) + painted * mix
    out = np.concatenate([np.clip(mixed + 0.5, 0, 255), pixels[..., 3:]], axis=-1)
    return Image.fromarray(out.astype(np.uint8))


def _weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    order = np.argsort(values)
    cumulative = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])


def _to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    top, low = rgb.max(-1), rgb.min(-1)
    spread = top - low
    safe = np.where(spread == 0, 1, spread)
    hue = np.where(top == r, (g - b) / safe % 6, np.where(top == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60.0
    return np.where(spread == 0, 0, hue) % 360.0, spread / np.where(top == 0, 1, top), top


def _to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    def channel(n: int) -> np.ndarray:
        k = (n + hue / 60.0) % 6
        return value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1)

    return np.stack([channel(5), channel(3), channel(1)], axis=-1)


def draw_shape(name: str, colour: RGB, size: int) -> Image.Image:
    """Draw one of SHAPES, filling SIZE x SIZE pixels, smoothed by drawing four times larger."""
    n = size * 4
    edge = n - 1
    mask = Image.new("L", (n, n), 0)
    pen = ImageDraw.Draw(mask)
    if name == "circle":
        pen.ellipse((0, 0, edge, edge), fill=255)
    elif name == "square":
        margin = n // 20
        pen.rounded_rectangle((margin, margin, edge - margin, edge - margin), radius=n // 16, fill=255)
    elif name == "triangle":
        pen.polygon([(n / 2, n * 0.04), (edge, n * 0.94), (0, n * 0.94)], fill=255)
    else:  # a heart
        t = np.linspace(0, 2 * np.pi, 400)
        x = 16 * np.sin(t) ** 3
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        points = np.stack([(x / 32 + 0.5) * edge, (0.5 - (y + 2.5) / 32) * edge], axis=-1)
        pen.polygon(points.ravel().tolist(), fill=255)
    image = Image.new("RGBA", (size, size), (*colour, 0))
    image.putalpha(mask.resize((size, size), Image.Resampling.BOX))
    return image


def _fake(key: str, size: int) -> bytes:
    """Draw a polygon whose corners and two colours come from the hash of KEY."""
    code = stable_hash("fake", key)
    hue = (code % 360) / 360.0
    outer = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.8, 0.85))
    inner = tuple(int(255 * c) for c in colorsys.hsv_to_rgb((hue + 0.45) % 1, 0.7, 0.5))
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    corners = 3 + code // 360 % 6
    turn = code // 2160 % 360
    for radius, colour in ((size / 2 - 1, outer), (size / 5, inner)):
        pen.regular_polygon((size / 2, size / 2, radius), n_sides=corners, rotation=turn, fill=(*colour, 255))
    return png_bytes(image)
