"""Reconstruction: how much of a picture survives the tokenizer, `unilip eval recon`.

Out, in a run folder: images.csv (a row a picture), scores/recon.json, worst-best.png. Protocols: the shorter side
becomes S (bicubic), the centre is cut out, S x S goes through the model, and the result, in 8 bits, is compared with
it.

    224, 448   S as it is
    256        S = 256, reflected to 280, encoded to 10 x 10, decoded to 320, shrunk to 280 (align_corners), cut to 256
    native     the model's own size

Measures: psnr (range 1.0), ssim (7 x 7 window, range 1.0), ssim_paper (range 2.0, which reads higher), lpips, and the
Frechet distance of features: "rfid" with Inception, "fd" with any other; of a file with its name and hash. B pictures,
F features.
"""

import logging
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from unilip.checkpoints.hub import Source
from unilip.checkpoints.read import open_checkpoint
from unilip.errors import ConfigError, UniLIPError, check_choice, reason
from unilip.eval.pictures import Pictures
from unilip.eval.runs import RunFolder, model_hash
from unilip.eval.scores import Rule, csv_text, make_row, write_scores
from unilip.files import content_hash, file_hash, png_bytes, write_bytes, write_text
from unilip.machine import Place
from unilip.model import UniLIP
from unilip.pictures import PSNR_LIMIT, contact_sheet, normalise, psnr, ssim

log = logging.getLogger(__name__)

PROTOCOLS = ("224", "256", "448", "native")
MEASURES = ("psnr", "ssim", "ssim_paper", "lpips", "rfid")
PLAIN = MEASURES[:3]  # need nothing but this package
TOKENIZER = ("encoder", "latent_head", "pixel_decoder")
PAD = 12  # pixels at each side that make 280 of 256
STRIP = 16  # sides: of what is longer when scaled, only the middle is made
SHOWN = 8  # pictures at each end of worst-best.png
Extractor = Callable[[Tensor], Tensor]  # uint8 (B,3,H,W) -> features (B,F)
Distance = Callable[[Tensor, Tensor], Tensor]  # two of [0,1] (B,3,H,W) -> (B,)


def frechet_distance(real: np.ndarray, made: np.ndarray) -> float:
    """Return the Frechet distance of Gaussians fitted to features (N,F) and (M,F). Raises UniLIPError: under two."""
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
    """Return name and function of a feature extractor. Raises UniLIPError: its package or file is missing.

    In: source: "torch-fidelity" (its Inception, fetched or cached by it); a TorchScript file such as
    inception-2015-12-05.pt, called with return_features=True; or "encoder", the model's own.
    """
    if source == "encoder":
        if model is None:
            raise UniLIPError("--features encoder needs the model; it cannot be used without one.")
        size = model.config.image_size

        @torch.no_grad()
        def encode(pictures: Tensor) -> Tensor:
            values = F.interpolate(pictures.float() / 255, size=(size, size), mode="bilinear", antialias=True)
            return model.features(normalise(values)).float().mean(1).cpu()

        return "fd[encoder]", encode
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
        first = reason(error, 160)
        raise UniLIPError(f"{file} is no TorchScript file ({first}), such as inception-2015-12-05.pt.") from error
    title = f"{'rfid' if 'inception' in file.name.lower() else 'fd'}[{file.stem} {file_hash(file)[:8]}]"

    @torch.no_grad()
    def extract(pictures: Tensor) -> Tensor:
        try:
            features = script(pictures.to(device), return_features=True)
        except RuntimeError:  # a network with one argument
            features = script(pictures.to(device))
        return features.float().flatten(1).cpu()

    return title, extract


def open_lpips(device: str = "cpu") -> Distance:
    """Return LPIPS (VGG16) of the `lpips` package. Raises UniLIPError: it is missing, or its weights cannot be had."""
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False).to(device).eval()
    except Exception as error:  # also: torchvision missing, no network for the weights
        raise UniLIPError(
            f"lpips cannot be measured here ({reason(error, 160)}); install lpips and torchvision, or "
            "leave it out of --measures."
        ) from error

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return network(a.to(device) * 2 - 1, b.to(device) * 2 - 1).flatten().cpu()

    return distance


def prepare(image: Image.Image, side: int) -> Image.Image:
    """Scale the shorter side to SIDE (bicubic) and cut the centre out, SIDE x SIDE."""
    scale = side / min(image.size)
    width, height = (max(side, int(length * scale)) for length in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    if max(width, height) > STRIP * side:  # a strip: the scaled picture may not fit into memory
        x, y = image.width / width, image.height / height
        box = (left * x, top * y, (left + side) * x, (top + side) * y)
        return image.resize((side, side), Image.Resampling.BICUBIC, box)
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


def to_bytes(images: Sequence[Image.Image]) -> Tensor:
    """Return pictures as uint8 (B,3,H,W)."""
    return torch.stack([torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images])


@torch.no_grad()
def put_through(model: UniLIP, pictures: Tensor, protocol: str) -> Tensor:
    """Return the reconstructions, uint8 (B,3,S,S), of uint8 pictures (B,3,S,S)."""
    values = pictures.to(model.device).float() / 255
    if protocol != "256":
        made = model.from_latent(model.to_latent(model.features(normalise(values))))
    else:
        padded = F.pad(values, (PAD, PAD, PAD, PAD), mode="reflect")  # B 3 280 280
        features = model.features(normalise(padded))
        with model.using("latent_head", "pixel_decoder"):
            decoded = model.pixel_decoder.decode(model.latent_head(features)).float()  # B 3 320 320
        shrunk = F.interpolate(decoded, padded.shape[-2:], mode="bilinear", align_corners=True)  # B 3 280 280
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

    A picture that the folder knows, by its bytes, is not measured again.
    In: measures: of MEASURES. features, extractor: for "rfid", see `open_extractor`; (name, function) wins. distance:
    for "lpips"; `open_lpips` by default. batch_size: speed and memory; the last bit may depend on it. place: which
    process this is.
    Raises UniLIPError: an unknown measure or protocol, a missing package, or another run's folder.
    """
    place = place or Place.of_environment()
    for name in measures or ("",):  # none is no choice
        check_choice("measure", name, MEASURES)
    config = open_checkpoint(source).config
    check_choice("protocol", protocol, PROTOCOLS)
    side = config.image_size if protocol == "native" else int(protocol)
    try:
        config.replace(image_size=280 if protocol == "256" else side)
    except ConfigError as error:
        raise UniLIPError(f"The model cannot take --protocol {protocol} ({error}); try --protocol native.") from error
    model = UniLIP.from_pretrained(source, device=device, dtype=dtype or "float32", parts=TOKENIZER)
    if "rfid" not in measures:
        extractor = None
    elif extractor is None:
        extractor = open_extractor(features, model, device)
    ready: dict[str, Distance] = {"psnr": psnr, "ssim": ssim, "ssim_paper": partial(ssim, data_range=2.0)}
    if "lpips" in measures:
        ready["lpips"] = distance or open_lpips(device)
    identity = {
        "task": "recon", "protocol": protocol, "model": model_hash(source), "measures": sorted(measures),
        "features": extractor[0] if extractor else None, "settings": {"image_size": side, "dtype": dtype or "float32"},
    }  # fmt: skip
    if extractor and Path(features).expanduser().is_file():
        identity["features_sha256"] = file_hash(Path(features).expanduser())
    with RunFolder(output, identity, place, source) as folder:
        names, marks = zip(*map(pictures.mark, range(len(pictures))), strict=True)
        index = {mark: i for i, mark in enumerate(marks)}

        def measure(batch: Sequence[str]) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
            truth = to_bytes([prepare(pictures.load(index[mark]), side) for mark in batch])
            made = put_through(model, truth, protocol)
            a, b = truth.float() / 255, made.float() / 255
            columns = {name: compared(a, b) for name, compared in ready.items() if name in measures}
            rows = [{name: float(values[n]) for name, values in columns.items()} for n in range(len(batch))]
            arrays = {k: extractor[1](v).numpy() for k, v in (("real", truth), ("made", made))} if extractor else {}
            return rows, arrays

        table = folder.measured(marks, batch_size, measure, "picture", progress)
        return None if table is None else _finish(pictures, names, folder, model, table)


def _finish(
    pictures: Pictures, names: Sequence[str], folder: RunFolder, model: UniLIP, table: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    output, identity = folder.path, folder.identity
    side = identity["settings"]["image_size"]
    columns = [name for name in MEASURES if name in table[0]]
    named = list(zip(names, table, strict=True))
    listed = [(name, *(f"{row[column]:.6f}" for column in columns)) for name, row in named]
    write_text(output / "images.csv", csv_text(("name", *columns), listed))
    rows = [make_row(name, {column: row[column] for column in columns}) for name, row in named]
    about: dict[str, Any] = {
        "task": "recon", "protocol": identity["protocol"], "scorer": f"compared at {side} px", "model": folder.name,
        "model_hash": identity["model"], "settings": identity["settings"],
        "prompts": {"sha256": content_hash(*(row["mark"] for row in table)), "published": None, "count": len(table)},
        "prompts_scored": len(table), "whole": {},
    }  # fmt: skip
    if equal := sum(row.get("psnr", 0) >= PSNR_LIMIT for row in table):
        about["whole"][f"equal pictures, counted as {PSNR_LIMIT:g} dB"] = equal
    if identity["features"]:
        real, made = folder.array(table, "real"), folder.array(table, "made")
        about["whole"][identity["features"]] = frechet_distance(real, made)
        if len(real) <= real.shape[1]:
            log.warning("%s of %d pictures is biased: fewer pictures than features", identity["features"], len(real))
    for by in columns[:1]:  # the worst on the left, the best on the right; each a source and its reconstruction
        order = sorted(range(len(table)), key=lambda i: table[i][by] * (-1 if by == "lpips" else 1))
        shown = min(SHOWN, math.ceil(len(order) / 2))
        images, captions = [], []
        for ends in zip(order[:shown], reversed(order[-shown:]), strict=True):
            for title, i in zip(("worst", "best"), ends, strict=True):
                truth = to_bytes([prepare(pictures.load(i), side)])
                pair = torch.cat([truth, put_through(model, truth, identity["protocol"])])
                images += [Image.fromarray(v.movedim(0, -1).numpy()).resize((224, 224), 3) for v in pair]
                captions += [f"{title}: {names[i][-40:]}", f"{by} {table[i][by]:.3f}"]
        write_bytes(output / "worst-best.png", png_bytes(contact_sheet(images, 4, captions)))
    return write_scores(output, "recon", rows, Rule(), about)
