"""Reconstruction, questions, the kits and comparisons: measures against references, formats, resuming, bad input."""

import base64
import csv
import dataclasses
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval_support import paint, write_prompts
from unilip.errors import ImageError, UniLIPError
from unilip.eval import compare, recon, understand
from unilip.eval.benchmarks import open_benchmark
from unilip.eval.generation import Settings, generate
from unilip.eval.pictures import open_pictures
from unilip.eval.scores import Rule, column, read_scores, write_scores
from unilip.machine import Place
from unilip.pictures import IMAGENET_MEAN, IMAGENET_STD, PSNR_LIMIT

# --- measures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(generator):
    a = torch.rand(2, 3, 24, 20, generator=generator)
    return a, (a + 0.1 * torch.randn(a.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_that_of_scikit_image(pair, data_range):
    metrics = pytest.importorskip("skimage.metrics")
    for a, b, value in zip(*pair, recon.ssim(*pair, data_range), strict=True):
        x, y = (t.movedim(0, -1).double().numpy() for t in (a, b))
        expected = metrics.structural_similarity(x, y, data_range=data_range, channel_axis=-1)
        assert float(value) == pytest.approx(expected, abs=1e-9)


def test_psnr_is_that_of_scikit_image(pair):
    metrics = pytest.importorskip("skimage.metrics")
    for a, b, value in zip(*pair, recon.psnr(*pair), strict=True):
        expected = metrics.peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1.0)
        assert float(value) == pytest.approx(expected, abs=1e-9)
    assert float(recon.psnr(pair[0], pair[0])[0]) == PSNR_LIMIT


def test_the_papers_ssim_reads_higher(pair):
    assert (recon.ssim(*pair, 2.0) > recon.ssim(*pair, 1.0)).all()


def test_frechet_distance_of_known_gaussians():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 4)), rng.normal(size=(400, 4)) @ np.diag([1, 2, 0.5, 1]) + [0, 0, 3, 0]
    product = linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        np.cov(a, rowvar=False) + np.cov(b, rowvar=False) - 2 * product
    )
    assert recon.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert recon.frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    few = rng.normal(size=(5, 40))  # singular covariance
    assert np.isfinite(recon.frechet_distance(few, few + 1))
    with pytest.raises(UniLIPError, match="at least two"):
        recon.frechet_distance(a[:1], a)


def test_the_real_inception_where_it_is_installed():
    pytest.importorskip("torch_fidelity", reason="torch-fidelity, and torchvision that it needs, are not installed")
    name, extract = recon.open_extractor("torch-fidelity")
    assert name == "rfid" and extract(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 2048)


def test_the_real_lpips_where_it_is_installed():
    pytest.importorskip("lpips", reason="lpips, and torchvision that it needs, are not installed")
    distance = recon.open_lpips()
    assert float(distance(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))[0]) == pytest.approx(0, abs=1e-6)


class Means(torch.nn.Module):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float().mean((2, 3))


def test_a_torchscript_extractor(tmp_path):
    torch.jit.trace(Means(), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).save(str(tmp_path / "means.pt"))
    name, extract = recon.open_extractor(str(tmp_path / "means.pt"))
    assert (
        name.startswith("fd[means ")
        and extract(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8)).tolist() == [[7] * 3] * 2
    )
    (tmp_path / "means.pt").rename(tmp_path / "my-inception.pt")
    assert recon.open_extractor(str(tmp_path / "my-inception.pt"))[0].startswith("rfid[my-inception "), "which one"
    (tmp_path / "bad.pt").write_bytes(b"no script")
    with pytest.raises(UniLIPError, match="no TorchScript"):
        recon.open_extractor(str(tmp_path / "bad.pt"))
    with pytest.raises(UniLIPError, match="is no file"):
        recon.open_extractor("nothing.pt")


# --- protocols ------------------------------------------------------------------------------------------------------


def test_prepare_scales_the_shorter_side_and_cuts_the_middle():
    picture = Image.new("RGB", (90, 30), "red")
    picture.paste("blue", (30, 0, 60, 30))
    done = recon.prepare(picture, 28)
    assert done.size == (28, 28) and done.getpixel((14, 14)) == (0, 0, 255) and done.getpixel((4, 14)) == (0, 0, 255)
    assert recon.prepare(Image.new("RGB", (31, 77)), 28).size == (28, 28)
    strip = Image.new("RGB", (2, 10_000), "red")  # as a whole 28 x 140,000 px
    strip.paste("blue", (0, 4_990, 2, 5_010))
    assert recon.prepare(strip, 28).getpixel((14, 14)) == (0, 0, 255)


def test_256_is_padded_by_reflection_and_shrunk_with_aligned_corners(tiny_model, monkeypatch):
    """The padding and the shrinking, with an encoder and a decoder that only look and resize."""
    seen = {}
    pictures = torch.randint(0, 256, (1, 3, 256, 256), dtype=torch.uint8)
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]

    def encoder(pixels):
        seen["pixels"] = pixels * std + mean
        return torch.zeros(1, 100, tiny_model.config.text.hidden_size)

    def decode(latent):
        seen["latent"] = latent.shape
        return (
            torch.nn.functional.interpolate(seen["pixels"], size=(320, 320), mode="bilinear", align_corners=True) * 2
            - 1
        )

    monkeypatch.setattr(type(tiny_model.encoder), "forward", lambda self, pixels: encoder(pixels))
    monkeypatch.setattr(type(tiny_model.pixel_decoder), "decode", lambda self, latent: decode(latent))
    made = recon.put_through(tiny_model, pictures, "256")
    padded = np.pad(pictures[0].numpy(), ((0, 0), (12, 12), (12, 12)), mode="reflect")
    assert np.allclose(seen["pixels"][0].numpy() * 255, padded, atol=1e-3)
    assert tuple(seen["latent"])[2:] == (10, 10) and made.shape == (1, 3, 256, 256)
    # smooth pictures come back as they were: nothing is shifted by the two resizes
    pictures = torch.linspace(0, 255, 256).round().to(torch.uint8).expand(1, 3, 256, 256).contiguous()
    again = recon.put_through(tiny_model, pictures, "256")
    inside = (again.int() - pictures.int())[..., 16:-16].abs()
    assert int(inside.max()) <= 1


@pytest.mark.parametrize("protocol", ["native", "224"])
def test_square_protocols_are_the_models_reconstruction(protocol, tiny_model, picture):
    side = 56 if protocol == "native" else 224
    image = picture(side, side)
    made = recon.put_through(tiny_model, recon.to_bytes([image]), protocol)
    expected = np.asarray(tiny_model.reconstruct(image, image_size=side).images[0])
    assert np.abs(made[0].movedim(0, -1).numpy().astype(int) - expected).max() <= 1


# --- reconstruction runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for n in range(5):
        paint(folder / f"{n % 2}" / f"{n}.png", n, (70, 60 + n))
    return folder


def run_recon(tiny_folder, pictures, output, **more):
    given = {"protocol": "native", "batch_size": 2, "place": Place(), **more}
    return recon.evaluate(pictures, output, tiny_folder, **given)


def test_a_run_writes_rows_scores_and_a_grid(tiny_folder, photos, tmp_path):
    measures = ["psnr", "ssim", "ssim_paper", "lpips", "rfid"]
    summary = run_recon(
        tiny_folder, open_pictures(photos), tmp_path / "run", measures=measures, extractor=("fd[means]", Means()),
        distance=lambda a, b: (a - b).abs().flatten(1).mean(1),
    )  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "run/images.csv").open()))
    assert [row["name"] for row in rows] == ["0/0.png", "0/2.png", "0/4.png", "1/1.png", "1/3.png"]
    for name in measures[:4]:
        mean = np.mean([float(row[name]) for row in rows])
        assert summary["scores"][""][name]["value"] == pytest.approx(mean, abs=1e-5)
    assert summary["whole"]["fd[means]"] > 0
    assert Image.open(tmp_path / "run/worst-best.png").size[0] > 4 * 56
    assert summary["whole"].keys() == {"fd[means]"}
    assert column(summary).startswith("recon native; compared at 56 px")


def test_two_processes_and_a_rerun_give_the_rows_of_one(tiny_folder, photos, tmp_path):
    pictures = open_pictures(photos)
    run_recon(tiny_folder, pictures, tmp_path / "one")
    assert run_recon(tiny_folder, pictures, tmp_path / "two", place=Place(1, 2)) is None
    run_recon(tiny_folder, pictures, tmp_path / "two", place=Place(0, 2))
    whole = (tmp_path / "one/images.csv").read_bytes()
    assert (tmp_path / "two/images.csv").read_bytes() == whole
    parts = sorted((tmp_path / "one/parts").iterdir())
    parts[1].unlink()
    times = {part: part.stat().st_mtime_ns for part in parts if part.exists()}
    run_recon(tiny_folder, pictures, tmp_path / "one")
    assert (tmp_path / "one/images.csv").read_bytes() == whole
    assert {part: part.stat().st_mtime_ns for part in times} == times


def test_another_set_with_the_same_names_gets_its_own_numbers(tiny_folder, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    values = {}
    for n, name in enumerate(("a", "b")):
        cells = [
            {"image": {"bytes": paint(tmp_path / f"{name}{i}.png", 10 * n + i, (60, 60)).read_bytes()}}
            for i in range(3)
        ]
        parquet.write_table(pa.Table.from_pylist(cells), tmp_path / f"{name}.parquet")
        pictures = open_pictures(tmp_path / f"{name}.parquet")
        values[name] = run_recon(tiny_folder, pictures, tmp_path / "run")["scores"][""]["psnr"]["value"]
    fresh = run_recon(tiny_folder, pictures, tmp_path / "fresh")["scores"][""]["psnr"]["value"]
    assert values["b"] == fresh != values["a"]
    few = run_recon(tiny_folder, open_pictures(tmp_path / "a.parquet", 2), tmp_path / "run", batch_size=1)
    assert few["items"] == 2 and (tmp_path / "run/images.csv").read_text().count("\n") == 3


def test_equal_pictures_are_counted_and_said(tiny_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(recon, "put_through", lambda model, pictures, protocol: pictures.clone())
    summary = run_recon(tiny_folder, open_pictures(photos, 2), tmp_path / "run", measures=["psnr"])
    assert summary["whole"] == {"equal pictures, counted as 100 dB": 2}


def test_the_distance_of_features_alone_and_a_part_that_is_damaged(tiny_folder, photos, tmp_path):
    given = (tiny_folder, open_pictures(photos), tmp_path / "run")
    more = {"measures": ["rfid"], "extractor": ("fd[means]", Means())}
    assert run_recon(*given, **more)["whole"]["fd[means]"] > 0
    part = next((tmp_path / "run/parts").glob("*.npz"))
    part.write_bytes(b"")
    with pytest.raises(UniLIPError, match=rf"remove {part.stem}\.jsonl"):
        run_recon(*given, **more)
    part.with_suffix(".jsonl").unlink()
    assert run_recon(*given, **more)["whole"]["fd[means]"] > 0


def test_a_row_without_a_picture_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    cells = [{"image": {"bytes": None, "path": "nothing.png"}}, {"image": None}]
    parquet.write_table(pa.Table.from_pylist(cells), tmp_path / "a.parquet")
    pictures = open_pictures(tmp_path / "a.parquet")
    for index in range(2):
        with pytest.raises(ImageError):
            pictures.load(index)


def test_other_measures_in_the_same_folder_are_refused(tiny_folder, photos, tmp_path):
    pictures = open_pictures(photos, 2)
    run_recon(tiny_folder, pictures, tmp_path / "run", measures=["psnr"])
    with pytest.raises(UniLIPError, match="another run: measures"):
        run_recon(tiny_folder, pictures, tmp_path / "run", measures=["psnr", "ssim"])
    with pytest.raises(UniLIPError, match="no measure 'psnr2'"):
        run_recon(tiny_folder, pictures, tmp_path / "run", measures=["psnr2"])


def test_pictures_come_from_folders_tars_parquet_and_datasets(photos, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    files = sorted(photos.rglob("*.png"))
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:
        for n, file in enumerate(files[:3]):
            archive.add(file, f"{n:04d}.png")
            info = tarfile.TarInfo(f"{n:04d}.txt")
            info.size = 2
            archive.addfile(info, io.BytesIO(b"hi"))
    (tmp_path / "table").mkdir()
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}, "label": 0} for file in files]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "table/a.parquet", row_group_size=2)
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"image": [str(file) for file in files]}).cast_column("image", datasets.Image())
    data.save_to_disk(tmp_path / "saved")
    expected = [Image.open(file).convert("RGB").tobytes() for file in files]
    for source, count in ((photos, 5), (tmp_path / "shard-0.tar", 3), (tmp_path / "table", 5), (tmp_path / "saved", 5)):
        found = open_pictures(source)
        assert len(found) == count, source
        assert [found.load(i).tobytes() for i in range(count)] == expected[:count], source
    assert len(open_pictures(photos, 2)) == 2
    with pytest.raises(UniLIPError, match="holds no pictures"):
        open_pictures(_empty(tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/x.png").write_bytes(b"nothing")
    with pytest.raises(ImageError, match=r"x\.png"):
        open_pictures(tmp_path / "bad").load(0)
    (tmp_path / "bad.tar").write_bytes(b"nothing")
    for name, message in (("bad.tar", "none of 1 shards"), ("nothing", "not a folder")):
        with pytest.raises(UniLIPError, match=message):
            open_pictures(tmp_path / name)


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


# --- questions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(tiny_folder, tmp_path, monkeypatch):
    """Ask a model that answers by a picture's first pixel: f(rows, images, output) -> (answers, asked, found)."""
    from unilip.model import UniLIP

    def call(rows, images="a", output="run", **more):
        asked = []

        def reply(self, images, questions, **choices):
            asked.extend(questions)
            return [
                f"{q.split()[0]} {[p.getpixel((0, 0)) for p in own]}" for q, own in zip(questions, images, strict=True)
            ]

        monkeypatch.setattr(UniLIP, "ask", reply)
        (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sheet = understand.open_questions(tmp_path / "q.jsonl", tmp_path / images)
        given = {"batch_size": 2, "place": Place(), **more}
        found = understand.evaluate(sheet, tmp_path / output, tiny_folder, **given)
        file = tmp_path / output / "answers.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line)["answer"] for line in lines], asked, found

    for n, name in enumerate("ab"):
        paint(tmp_path / name / "1.png", n, (56, 56))
        paint(tmp_path / name / "2.png", n + 2, (56, 56))
    return call


QUESTIONS = [
    {"id": 7, "question": "What?", "image": "1.png", "answer": "what"},
    {"question": "Both?", "image": ["1.png", "2.png"], "category": "pairs"},
    {"question": "None at all?", "answer": "NONE!  []"},
]


def test_questions_are_asked_once_and_known_by_their_pictures(ask, tmp_path):
    first, asked, (summary,) = ask(QUESTIONS)
    assert len(first) == len(asked) == 3 and first[2] == "None []" and first[1].count("(") == 2
    assert summary["scores"][""]["exact_match"]["value"] == 0.5 and summary["prompts_scored"] == 2
    assert ask(QUESTIONS)[:2] == (first, [])
    other, asked, _ = ask(QUESTIONS, "b")  # the same names, other pictures
    assert asked == ["What?", "Both?"] and (other, first[2:]) == (ask(QUESTIONS, "b", "fresh")[0], other[2:])
    paint(tmp_path / "a/2.png", 9, (56, 56))  # a picture is replaced
    assert ask(QUESTIONS)[1] == ["Both?"]
    changed = [{**QUESTIONS[0], "question": "Who?"}, *QUESTIONS[1:]]
    assert ask(changed)[1] == ["Who?"]
    with pytest.raises(UniLIPError, match="settings"):
        ask(QUESTIONS, max_new_tokens=3)


def test_other_pictures_are_another_table_and_no_old_score_stays(ask, tmp_path):
    (_, _, (first,)), (_, _, (other,)) = ask(QUESTIONS), ask(QUESTIONS, images="b", output="other")
    assert column(first) != column(other) and first["prompts"]["sha256"] == other["prompts"]["sha256"]
    assert column(ask(QUESTIONS)[2][0]) == column(first)
    assert ask([{"question": "And now?"}])[2] == []
    with pytest.raises(UniLIPError, match="has no scores"):
        read_scores(tmp_path / "run")


def test_processes_share_the_questions(ask):
    answers, first, found = ask(QUESTIONS, place=Place(1, 2))
    assert found is None and answers == [] and len(first) == 1
    assert len(ask(QUESTIONS, place=Place(0, 2))[1]) == 2 and ask(QUESTIONS)[1] == []
    assert ask([{"question": "Why?"}], output="no answers")[2] == []


def test_damaged_questions_are_told(tmp_path):
    coded = base64.b64encode(b"no picture").decode()
    cases = {
        "": "holds no questions", "{": "not JSON", "[1]": "not a JSON object", '{"image": "x.png"}': "no question",
        '{"question": "a", "image": "x.png"}': "--images", '{"question": "a", "image": "!!!"}': "neither base64",
        '{"question": "a", "image": 3}': "path or base64", '{"question": "a", "answer": ["b"]}': "list",
        '{"question": "a", "id": 1}\n{"question": "b", "id": "1"}': "twice",
        '{"question": "\\ud800"}': "question 0: .*surrogate",
    }  # fmt: skip
    for text, message in cases.items():
        (tmp_path / "a.jsonl").write_text(text)
        with pytest.raises(UniLIPError, match=message):
            understand.open_questions(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "a", "image": coded}))
    with pytest.raises(ImageError, match="question 0"):
        understand.evaluate(understand.open_questions(tmp_path / "a.jsonl"), tmp_path / "run", place=Place())
    for name in ("MMBench.tsv", "nothing.jsonl"):
        with pytest.raises(UniLIPError, match="lmms-eval"):
            understand.open_questions(tmp_path / name)


# --- the kits -------------------------------------------------------------------------------------------------------


def test_the_class_for_vlmevalkit(tiny_folder, tmp_path):
    from unilip.eval.vlmevalkit import make_class, split_message

    class Base:
        def __init__(self) -> None:
            self.dump_image_func = None

    model = make_class(Base)(path=str(tiny_folder), device="cpu", dtype="float32", max_tiles=1, max_new_tokens=4)
    file = paint(tmp_path / "x.png", 0)
    message = [
        {"type": "image", "value": str(file)},
        {"type": "text", "value": "What?"},
        {"type": "text", "value": "A. x"},
    ]
    assert split_message(message) == ([str(file)], "What?\nA. x")
    assert model.generate_inner(message) == model.model.ask([str(file)], "What?\nA. x", max_new_tokens=4)
    with pytest.raises(UniLIPError, match="video"):
        split_message([{"type": "video", "value": "x"}])
    model.dump_image = lambda line, dataset: line["files"]
    row = {"question": "What?", "A": "x", "B": "y", "files": [str(file)]}
    assert not model.use_custom_prompt("any")
    assert split_message(model.build_prompt(row, "any")) == ([str(file)], "What?")


def test_the_class_for_lmms_eval(tiny_folder, tmp_path, monkeypatch, caplog):
    from types import SimpleNamespace

    from unilip.eval.lmms import UniLIP, cut

    monkeypatch.delenv("RANK", raising=False)
    model = UniLIP(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=2, max_tiles=1)
    picture = Image.open(paint(tmp_path / "x.png", 0))
    model.task_dict = {"task": {"test": [{"image": picture}, {"image": None}, {"image": picture}]}}
    requests = [
        SimpleNamespace(
            args=("What? <image>", {"max_new_tokens": 4, "until": ["\n"]}, lambda d: [d["image"]], n, "task", "test")
        )
        for n in range(3)
    ]
    answers = model.generate_until(requests)
    assert len(answers) == 3 and answers[0] == answers[2]
    expected = model.model.ask([[picture], []], ["What?", "What?"], max_new_tokens=4)
    assert answers[:2] == [cut(answer, ["\n"]) for answer in expected]
    assert cut("one\n\ntwo", ["\n\n"]) == "one"
    asked = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "num_beams": 4, "do_sample": True}
    assert model._settings(asked) == {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9}
    assert "num_beams cannot be followed" in caplog.text and model._settings({"num_beams": 1})["temperature"] == 0
    model.max_tiles, asked = 4, []
    model.task_dict = {"task": {"test": [{"images": [picture] * count} for count in (1, 2)]}}
    monkeypatch.setattr(model.model, "ask", lambda p, q, max_tiles, **_: asked.append((len(p), max_tiles)) or ["x"])
    model.generate_until(
        [SimpleNamespace(args=("What?", {}, lambda d: d["images"], n, "task", "test")) for n in (0, 1)]
    )
    assert asked == [(1, 4), (1, 2)], "a picture has the tiles that it has alone, whatever its batch"


@pytest.mark.parametrize("recall", [True, False])
def test_the_kits_cut_into_tiles_what_a_model_may_know(recall, fresh_model, tmp_path, monkeypatch):
    """A model of plain questions has read single squares alone; tiles depend on no other question of the batch."""
    from types import SimpleNamespace

    from unilip.eval.lmms import UniLIP
    from unilip.eval.vlmevalkit import make_class

    monkeypatch.delenv("RANK", raising=False)
    saved = fresh_model()
    sampling = dataclasses.replace(saved.config.sampling, recall=recall)
    saved.config = dataclasses.replace(saved.config, sampling=sampling)
    saved.save_pretrained(folder := str(tmp_path / "model"))
    picture = Image.open(paint(tmp_path / "x.png", 0)).resize((600, 300))
    shown = [[picture], [picture] * 3]

    def asked(model, **given):
        tiles = []
        monkeypatch.setattr(model.model, "ask", lambda p, q, max_tiles, **_: tiles.append(max_tiles) or [""] * len(p))
        if hasattr(model, "generate_inner"):
            for pictures in shown:
                model.generate_inner([{"type": "image", "value": str(tmp_path / "x.png")} for _ in pictures])
        else:
            model.task_dict = {"task": {"test": shown}}
            arguments = [("What?", {}, list, n, "task", "test") for n in range(len(shown))]
            model.generate_until([SimpleNamespace(args=args) for args in arguments])
        return tiles

    common = {"device": "cpu", "dtype": "float32"}
    kit = make_class(type("Base", (), {}))
    for given, expected in (({}, [12, 4] if recall else [1]), ({"max_tiles": 6}, [6, 2])):
        found = asked(UniLIP(pretrained=folder, batch_size=2, **common, **given))
        assert found == expected
        assert asked(kit(path=folder, **common, **given)) == (expected * 2)[:2]


def test_the_file_for_their_repository_registers_the_same_class(monkeypatch):
    import runpy
    from types import ModuleType

    from unilip.eval.lmms import UniLIP

    registry, names = ModuleType("lmms_eval.api.registry"), []
    registry.register_model = lambda *given: names.extend(given) or (lambda kind: kind)
    for name in ("lmms_eval", "lmms_eval.api"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lmms_eval.api.registry", registry)
    path = Path(__file__).parents[1] / "integrations" / "lmms_eval" / "models" / "simple" / "unilip.py"
    assert issubclass(runpy.run_path(str(path))["UniLIP"], UniLIP) and names == ["unilip"]


def test_the_entry_point_of_lmms_eval_is_declared():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["lmms_eval.models"]["unilip"].split(":")
    import importlib

    assert callable(getattr(importlib.import_module(module), function))


# --- comparing ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, values, scorer="judge a", noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    rows = [
        {"key": str(n), "cluster": str(n), "group": "g", "split": "", "picture": None, "status": "ok",
         "scores": {"m": float(v + noise * rng.normal())}}
        for n, v in enumerate(values)
    ]  # fmt: skip
    about = {
        "task": "wise",
        "protocol": "verified",
        "scorer": scorer,
        "model": folder.name,
        "prompts": {"published": True},
    }
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"identity": {}, "environments": [], "model": folder.name}))
    write_scores(folder, scorer, rows, Rule(), about)


def test_differences_are_paired(tmp_path):
    base = np.random.default_rng(1).normal(0, 5, 200)
    write_run(tmp_path / "a", base)
    write_run(tmp_path / "b", base + 0.3, noise=0.5)
    tables = compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")["tables"]
    (rows,) = tables.values()
    a, b = rows
    assert b["difference"] == pytest.approx(b["value"] - a["value"]) and b["shared"] == 200
    assert b["d_low"] > 0.1 and b["d_high"] < 0.5  # prompts cancel
    assert b["high"] - b["low"] > 1.0  # and do not for a single score
    assert "difference" not in a


def test_scores_of_other_scorers_are_other_tables(tmp_path):
    write_run(tmp_path / "a", [1, 2, 3])
    write_run(tmp_path / "b", [1, 2, 3], scorer="judge b")
    tables = compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")["tables"]
    assert len(tables) == 2 and all("difference" not in row for rows in tables.values() for row in rows)
    text = (tmp_path / "out/compare.md").read_text()
    assert "judge a" in text and "judge b" in text
    listed = list(csv.DictReader((tmp_path / "out/compare.csv").open()))
    assert {row["column"] for row in listed} == set(tables)


def test_one_prompt_makes_no_interval_of_a_difference(tmp_path):
    for name, value in (("a", 1.0), ("b", 0.5)):
        write_run(tmp_path / name, [value])
    ((_, b),) = compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")["tables"].values()
    assert b["difference"] == -0.5 and b["d_low"] is None and b["low"] is None
    assert "| 0.5000 |  |  | 1 |" in (tmp_path / "out/compare.md").read_text()


def test_pictures_are_side_by_side(tiny_folder, tiny_model, tmp_path):
    prompts = write_prompts(tmp_path / "files")
    benchmark = open_benchmark("wise", **prompts["wise"])
    for name in ("a", "b"):
        settings = Settings.resolve(tiny_folder, steps=1, seed=ord(name))
        generate(
            benchmark, tmp_path / name, tiny_folder, settings, load=lambda: tiny_model, place=Place(), batch_size=12
        )
        rows = [
            {"key": item.key, "cluster": item.cluster, "group": item.group, "split": "", "picture": item.path,
             "prompt": "<b>" + item.prompt, "status": "ok", "scores": {"m": 1.0}}
            for item in benchmark.items
        ]  # fmt: skip
        about = {"task": "wise", "protocol": "v", "scorer": "s", "model": "<i>m</i>", "prompts": {"published": True}}
        write_scores(tmp_path / name, "s", rows, Rule(), about)
    found = compare.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out", pictures=3)
    sheet = Image.open(tmp_path / "out/pictures-1.png")
    assert sheet.width < 3 * 2 * compare.CELL and sheet.height > 3 * compare.CELL
    assert "pictures-1.png" in (tmp_path / "out/compare.md").read_text()
    assert list(found["pictures"].values()) == ["pictures-1.png"]
    assert compare.compare([tmp_path / "a"], tmp_path / "none", pictures=0)["pictures"] == {}


def test_impossible_comparisons_are_told(tmp_path):
    write_run(tmp_path / "a", [1, 2])
    (tmp_path / "empty").mkdir()
    for folders, message in (
        ([tmp_path / "a", tmp_path / "a"], "twice"),
        ([tmp_path / "nothing"], "no folder"),
        ([tmp_path / "empty"], r"run\.json is missing"),
    ):
        with pytest.raises(UniLIPError, match=message):
            compare.compare(folders, tmp_path / "out")
