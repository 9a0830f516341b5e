"""Reconstruction: how much of a picture survives the tokenizer.

Goes in: pictures and a model. Comes out, in a run folder: images.csv (a row a picture), scores/recon.json, and
worst-best.png. Protocols: the picture's shorter side becomes S, its centre is cut out, S x S goes through the model,
and the result, rounded to 8 bits, is compared with it.

    224, 448   S as it is
    256        S = 256, reflected to 280, encoded to 10 x 10, decoded to 320, shrunk to 280 (align_corners), cut to 256
    native     the model's own size

Measures: psnr (range 1.0), ssim (7 x 7 window, range 1.0), ssim_paper (the same with range 2.0, which reads higher),
lpips, and the Frechet distance of features: "rfid" with Inception, "fd" with any other.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import math
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm.auto import tqdm

from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import ConfigError, UniLIPError
from unilip.eval.pictures import Pictures
from unilip.eval.runs import RunFolder, batches, model_hash
from unilip.eval.scores import Rule, write_scores
from unilip.files import file_hash, png_bytes, write_bytes
from unilip.machine import Place
from unilip.model import UniLIP
from unilip.pictures import IMAGENET_MEAN, IMAGENET_STD, load_image, psnr, ssim

log = logging.getLogger(__name__)

PROTOCOLS = ("224", "256", "448", "native")
MEASURES = ("psnr", "ssim", "ssim_paper", "lpips", "rfid")
PLAIN = MEASURES[:3]  # need nothing but this package
TOKENIZER = ("encoder", "latent_head", "pixel_decoder")
PAD = 12  # pixels at each side that make 280 of 256
SHOWN = 8  # pictures at each end of worst-best.png
Extractor = Callable[[Tensor], Tensor]  # uint8 (B,3,H,W) -> features (B,F)
Distance = Callable[[Tensor, Tensor], Tensor]  # two of [0,1] (B,3,H,W) -> (B,)


# --- measures -------------------------------------------------------------------------------------------------------


def frechet_distance(real: np.ndarray, made: np.ndarray) -> float:
    """Return the Frechet distance of Gaussians fitted to features (N,F) and (M,F).

    Raises:
        UniLIPError: fewer than two pictures.
    """
    if min(len(real), len(made)) < 2:
        raise UniLIPError("A Frechet distance needs at least two pictures; give more.")
    real, made = real.astype(np.float64), made.astype(np.float64)
    shift = real.mean(0) - made.mean(0)
    cov_a, cov_b = np.atleast_2d(np.cov(real, rowvar=False)), np.atleast_2d(np.cov(made, rowvar=False))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # symmetric root, stable where the covariance is singular
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def open_extractor(source: str, model: UniLIP | None = None, device: str = "cpu") -> tuple[str, Extractor]:
    """Return the name and function of a feature extractor.

    Args:
        source: "torch-fidelity" (its Inception, weights fetched or cached by it); a TorchScript file such as
            inception-2015-12-05.pt, called with return_features=True; or "encoder", the model's own encoder.

    Raises:
        UniLIPError: the package or the file is missing.
    """
    if source == "encoder":
        if model is None:
            raise UniLIPError("--features encoder needs the model; it cannot be used without one.")
        return "fd[encoder]", _encoder_features(model)
    if source == "torch-fidelity":
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise UniLIPError(
                "rfid by torch-fidelity needs that package and torchvision (pip install torch-fidelity); or give a "
                "TorchScript Inception, such as inception-2015-12-05.pt, as --features FILE."
            ) from error
        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device).eval()
        return "rfid", lambda pictures: inception(pictures.to(device))[0].float().cpu()
    file = Path(source).expanduser()
    if not file.is_file():
        raise UniLIPError(f"--features {source} is no file; give a TorchScript file, torch-fidelity or encoder.")
    try:
        script = torch.jit.load(str(file), map_location=device).eval()
    except (RuntimeError, zipfile.BadZipFile) as error:
        first = str(error).splitlines()[0][:160]
        raise UniLIPError(
            f"{file} is no TorchScript file ({first}); give one, such as inception-2015-12-05.pt."
        ) from error
    title = "rfid" if "inception" in file.name.lower() else f"fd[{file.stem} {file_hash(file)[:8]}]"

    @torch.no_grad()
    def extract(pictures: Tensor) -> Tensor:
        try:
            features = script(pictures.to(device), return_features=True)
        except RuntimeError:  # a network with one argument
            features = script(pictures.to(device))
        return features.float().flatten(1).cpu()

    return title, extract


def _encoder_features(model: UniLIP) -> Extractor:
    @torch.no_grad()
    def extract(pictures: Tensor) -> Tensor:
        size = model.config.image_size
        values = F.interpolate(pictures.float() / 255, size=(size, size), mode="bilinear", antialias=True)
        return model.features(_normalise(values)).float().mean(1).cpu()

    return extract


def open_lpips(device: str = "cpu") -> Distance:
    """Return LPIPS with VGG16 of the `lpips` package.

    Raises:
        UniLIPError: it is missing, or its weights cannot be had.
    """
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval()
    except Exception as error:  # also: torchvision missing, no network for the weights
        raise UniLIPError(
            f"lpips cannot be measured here ({' '.join(str(error).split())[:160]}); install lpips and torchvision, or "
            "leave it out of --measures."
        ) from error

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return network(a.to(device) * 2 - 1, b.to(device) * 2 - 1).flatten().cpu()

    return distance


# --- through the model ----------------------------------------------------------------------------------------------


def side_of(protocol: str, native: int) -> int:
    """Return the side that pictures are compared at.

    Raises:
        UniLIPError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise UniLIPError(f"There is no protocol {protocol!r}; allowed: {', '.join(PROTOCOLS)}.")
    return native if protocol == "native" else int(protocol)


def prepare(image: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to SIDE (bicubic) and cut the centre out."""
    scale = side / min(image.size)
    width, height = (max(side, int(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def to_bytes(images: Sequence[Image.Image]) -> Tensor:
    """Return pictures as uint8 (B,3,H,W)."""
    return torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images])


def _normalise(values: Tensor) -> Tensor:
    mean, std = (torch.tensor(v, device=values.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std


@torch.no_grad()
def put_through(model: UniLIP, pictures: Tensor, protocol: str) -> Tensor:
    """Return the reconstructions, uint8 (B,3,S,S), of uint8 pictures (B,3,S,S)."""
    values = pictures.to(model.device).float() / 255
    if protocol != "256":
        features = model.features(_normalise(values))
        made = model.from_latent(model.to_latent(features))
    else:
        padded = F.pad(values, (PAD, PAD, PAD, PAD), mode="reflect")  # B 3 280 280
        features = model.features(_normalise(padded))
        with model.using("latent_head", "pixel_decoder"):
            decoded = model.pixel_decoder.decode(model.latent_head(features)).float()  # B 3 320 320
        size = padded.shape[-2:]
        shrunk = F.interpolate(decoded, size=size, mode="bilinear", align_corners=True)  # B 3 280 280
        made = (shrunk[..., PAD:-PAD, PAD:-PAD] + 1) / 2
    return (made.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def evaluate(
    pictures: Pictures,
    output: Path,
    source: Source = None,
    *,
    protocol: str = "256",
    measures: Sequence[str] = PLAIN,
    features: str = "torch-fidelity",
    extractor: tuple[str, Extractor] | None = None,
    distance: Distance | None = None,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: str | None = None,
    place: Place | None = None,
    progress: bool = False,
) -> dict[str, Any] | None:
    """Measure a model's reconstructions; returns the summary, or None in a process whose rank is not 0.

    Args:
        measures: of MEASURES.
        features, extractor: for "rfid", see `open_extractor`; `extractor` is (name, function) and wins.
        distance: for "lpips"; `open_lpips` by default.
        batch_size: speed and memory; the last bit may depend on it.
        place: which process this is; from RANK and WORLD_SIZE by default.

    Raises:
        UniLIPError: an unknown measure or protocol, a missing package, or another run's folder.
    """
    place = place or Place.of_environment()
    unknown = [name for name in measures if name not in MEASURES]
    if unknown or not measures:
        raise UniLIPError(
            f"There is no measure {', '.join(unknown) or '(none given)'}; allowed: {', '.join(MEASURES)}."
        )
    config = open_checkpoint(source).config
    side = side_of(protocol, config.image_size)
    try:
        config.replace(image_size=280 if protocol == "256" else side)
    except ConfigError as error:
        raise UniLIPError(f"The model cannot take --protocol {protocol} ({error}); try --protocol native.") from error
    model = UniLIP.from_pretrained(source, device=device, dtype=dtype or "float32", parts=TOKENIZER)
    wants_features = "rfid" in measures
    if wants_features and extractor is None:
        extractor = open_extractor(features, model, device)
    if "lpips" in measures and distance is None:
        distance = open_lpips(device)
    names_hash = hashlib.sha256("\n".join(pictures.names).encode()).hexdigest()
    identity = {
        "task": "recon",
        "protocol": protocol,
        "model": model_hash(source),
        "measures": sorted(measures),
        "features": extractor[0] if wants_features and extractor else None,
        "settings": {"image_size": side, "dtype": dtype or "float32"},
    }
    named = "embedded" if source is None else str(source)
    with RunFolder(output, identity, place, named) as folder:
        parts = output / "parts"
        indices = list(range(len(pictures)))
        have = _stored(parts, pictures.names)
        work = [
            left for _, batch in batches(indices, batch_size, place) if (left := [i for i in batch if i not in have])
        ]
        total = len(have) + sum(map(len, work))
        with tqdm(total=total, initial=len(have), desc="recon", unit="picture", disable=not progress) as bar:
            for left in work:
                truth = to_bytes([prepare(pictures.load(i), side) for i in left])
                made = put_through(model, truth, protocol)
                rows = _measure(truth, made, measures, distance)
                for i, row in zip(left, rows, strict=True):
                    row["name"] = pictures.names[i]
                stored: dict[str, Any] = {"rows": np.array([json.dumps(row) for row in rows])}
                if wants_features and extractor:
                    stored["real"], stored["made"] = (extractor[1](v).numpy() for v in (truth, made))
                folder.commit(f"part-{left[0]:08d}", {f"parts/{left[0]:08d}-{len(left)}.npz": _npz(stored)})
                bar.update(len(left))
        if place.rank:
            return None
        while len(have := _stored(parts, pictures.names)) < len(pictures):  # what other processes still measure
            time.sleep(1)
        return _finish(pictures, output, model, protocol, identity, named, names_hash, have)


def _measure(truth: Tensor, made: Tensor, measures: Sequence[str], distance: Distance | None) -> list[dict[str, Any]]:
    a, b = truth.float() / 255, made.float() / 255
    columns: dict[str, Tensor] = {}
    if "psnr" in measures:
        columns["psnr"] = psnr(a, b)
    if "ssim" in measures:
        columns["ssim"] = ssim(a, b, 1.0)
    if "ssim_paper" in measures:
        columns["ssim_paper"] = ssim(a, b, 2.0)
    if "lpips" in measures and distance is not None:
        columns["lpips"] = distance(a, b)
    return [{name: float(values[n]) for name, values in columns.items()} for n in range(len(truth))]


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    return stream.getvalue()


def _stored(parts: Path, names: Sequence[str]) -> dict[int, tuple[Path, int]]:
    """Return where each picture's results are: index -> (file, place in it)."""
    known = {name: i for i, name in enumerate(names)}
    found: dict[int, tuple[Path, int]] = {}
    for file in sorted(parts.glob("*.npz")):
        try:
            with np.load(file, allow_pickle=False) as stored:
                rows = [json.loads(str(row)) for row in stored["rows"]]
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UniLIPError(
                f"{file} is damaged ({error}); remove it, and a rerun measures its pictures again."
            ) from error
        for n, row in enumerate(rows):
            if row["name"] in known:
                found[known[row["name"]]] = (file, n)
    return found


def _finish(
    pictures: Pictures, output: Path, model: UniLIP, protocol: str, identity: Mapping[str, Any], named: str,
    names_hash: str, have: Mapping[int, tuple[Path, int]],
) -> dict[str, Any]:  # fmt: skip
    opened: dict[Path, dict[str, np.ndarray]] = {}
    for file in dict.fromkeys(file for file, _ in have.values()):
        with np.load(file, allow_pickle=False) as stored:
            opened[file] = dict(stored)
    order = [have[i] for i in range(len(pictures))]
    table = [json.loads(str(opened[file]["rows"][n])) for file, n in order]
    columns = [name for name in table[0] if name != "name"]
    text = io.StringIO()
    writer = csv.DictWriter(text, ["name", *columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, **{name: f"{row[name]:.6f}" for name in columns}} for row in table)
    write_bytes(output / "images.csv", text.getvalue().encode())
    rows = [
        {
            "key": row["name"], "cluster": row["name"], "group": "all", "split": "", "picture": None, "status": "ok",
            "scores": {name: row[name] for name in columns},
        }
        for row in table
    ]  # fmt: skip
    about: dict[str, Any] = {
        "task": "recon", "protocol": protocol, "scorer": f"compared at {identity['settings']['image_size']} px",
        "model": named, "model_hash": identity["model"], "settings": identity["settings"],
        "prompts": {"sha256": names_hash, "published": None, "count": len(pictures)}, "prompts_scored": len(pictures),
    }  # fmt: skip
    if identity["features"]:
        real, made = (np.stack([opened[file][key][n] for file, n in order]) for key in ("real", "made"))
        about["whole"] = {identity["features"]: frechet_distance(real, made)}
        if len(real) <= real.shape[1]:
            log.warning(
                "%s of %d pictures has fewer pictures than features; it is biased", identity["features"], len(real)
            )
    summary = write_scores(output, "recon", rows, Rule(), about)
    by = "psnr" if "psnr" in columns else columns[0] if columns else None
    if by:
        ranked = sorted(range(len(table)), key=lambda i: table[i][by] * (-1 if by == "lpips" else 1))
        _write_grid(pictures, output, model, protocol, identity["settings"]["image_size"], ranked, table, by)
    return summary


def _write_grid(
    pictures: Pictures, output: Path, model: UniLIP, protocol: str, side: int, ranked: Sequence[int],
    table: Sequence[Mapping[str, Any]], by: str,
) -> None:  # fmt: skip
    """Write worst-best.png: the worst on the left, the best on the right; each a source and its reconstruction."""
    shown = min(SHOWN, math.ceil(len(ranked) / 2))
    ends = (list(ranked[:shown]), list(reversed(ranked[-shown:])))
    cell, band, gap = min(side, 224), 14, 6
    page = Image.new("RGB", (4 * (cell + gap) + 5 * gap, band + shown * (cell + band + gap)), "white")
    pen = ImageDraw.Draw(page)
    for column, (title, chosen) in enumerate(zip(("worst", "best"), ends, strict=True)):
        x = gap + column * (2 * cell + 5 * gap)
        pen.text((x, 1), f"{title} by {by}: source, reconstruction", fill="black")
        for row, index in enumerate(chosen):
            truth = to_bytes([prepare(load_image(pictures.load(index)), side)])
            pair = torch.cat([truth, put_through(model, truth, protocol)])
            y = band + row * (cell + band + gap)
            for n, values in enumerate(pair):
                picture = Image.fromarray(values.movedim(0, -1).numpy()).resize((cell, cell), Image.Resampling.BICUBIC)
                page.paste(picture, (x + n * (cell + gap), y))
            pen.text((x, y + cell + 1), f"{table[index][by]:.3f}  {table[index]['name'][-40:]}", fill="black")
    write_bytes(output / "worst-best.png", png_bytes(page))
