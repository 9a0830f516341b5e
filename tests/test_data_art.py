"""The art layer without any art: fake packages, fake sprites, and what the errors say."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest

from unilip.emoji import art
from unilip.emoji.concepts import SHAPES, TONES, concept, concepts
from unilip.emoji.world import World
from unilip.errors import DataError


@pytest.fixture(scope="module")
def world():
    return World.pico()


@pytest.fixture(scope="module")
def atlas(world):
    return art.Atlas.synthetic(world)


UNNAMED = ("1f600", "1f64b-200d-2642-fe0f", "1f590-1f3fb", "1f1e9-1f1ea", "1f5dd")  # the first alone is to be drawn


def fake_package(style: art.Style, folder, leave_out: str = "", names=None) -> None:
    """Write an npm package like Iconify's: one coloured square per concept and tone, off centre and small."""
    chars = {code: f"icon-{code}" for code in UNNAMED}
    icons = {name: {"body": '<rect x="2" y="4" width="8" height="8" fill="#22d"/>'} for name in chars.values()}
    for name, c in concepts().items():
        if names and name not in names:
            continue
        for tone in (None, *(TONES if c.toned else ())):
            code = c.tone_codepoint(tone) if tone else c.codepoint
            if c.codepoint and name != leave_out:
                chars[code] = f"{name}-{tone}".replace(" ", "-")
                icons[chars[code]] = {"body": '<rect x="2" y="4" width="8" height="8" fill="#d22"/>'}
    folder.mkdir(parents=True)
    (folder / "icons.json").write_text(json.dumps({"icons": icons, "aliases": {}, "width": 32, "height": 32}))
    (folder / "chars.json").write_text(json.dumps(chars))


def fake_source(folder, leave_out: str = "", names=None):
    for style in art.STYLES.values():
        fake_package(style, folder / style.package.rsplit("/", 1)[-1], leave_out, names)
    return folder


def test_palette_and_backgrounds_are_as_announced():
    assert len(art.PALETTE) == 8
    kinds = [b.kind for b in art.BACKGROUNDS.values()]
    assert (kinds.count("plain"), kinds.count("gradient"), kinds.count("horizon")) == (13, 4, 4)


def test_sprites_have_the_asked_size_and_are_cached(atlas):
    one = atlas.sprite("cat", "flat", 72)
    assert one.size == (72, 72)
    assert one.mode == "RGBA"
    assert atlas.sprite("cat", "flat", 72) is one


def test_a_pickled_atlas_gives_the_same_pixels(atlas):
    again = pickle.loads(pickle.dumps(atlas))
    assert again.fingerprint == atlas.fingerprint
    for colour in (None, "blue"):
        assert again.sprite("car", "flat", 48, colour).tobytes() == atlas.sprite("car", "flat", 48, colour).tobytes()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("colour", art.PALETTE)
def test_drawn_shapes_have_their_palette_colour_and_fill_their_box(atlas, shape, colour):
    pixels = np.asarray(atlas.sprite(shape, "flat", 64, colour))
    solid = pixels[..., 3] == 255
    assert np.abs(pixels[solid][:, :3].astype(int) - art.PALETTE[colour]).max() <= 1
    columns = np.flatnonzero((pixels[..., 3] > 128).any(0))
    assert columns[0] <= 4
    assert columns[-1] >= 59
    assert 0.35 < solid.mean() < 0.95


@pytest.mark.parametrize("colour", art.PALETTE)
def test_recolouring_moves_the_dominant_tone_onto_the_palette(colour):
    pixels = np.zeros((40, 40, 4), np.uint8)
    pixels[5:35, 5:35] = (250, 200, 40, 255)  # yellow, the most common tone
    pixels[5:12, 5:35] = (200, 150, 20, 255)  # its shade
    pixels[15:20, 15:20] = (20, 20, 20, 255)  # an eye
    pixels[30:35, 5:35] = (30, 90, 220, 255)  # blue, another hue
    from PIL import Image

    out = np.asarray(art.recolour(Image.fromarray(pixels), art.PALETTE[colour]))
    assert np.abs(out[25, 25, :3].astype(int) - art.PALETTE[colour]).max() <= 4
    assert out[8, 20, :3].sum() < out[25, 25, :3].sum()  # the shade stays darker
    assert np.array_equal(out[16, 16], pixels[16, 16])
    assert np.array_equal(out[32, 20], pixels[32, 20])
    assert np.array_equal(out[..., 3], pixels[..., 3])


def test_recolouring_leaves_grey_alone():
    from PIL import Image

    grey = Image.new("RGBA", (8, 8), (120, 120, 120, 255))
    assert art.recolour(grey, art.PALETTE["red"]).tobytes() == grey.tobytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cat", "flat", 0), ("0", "at least 1")),
        (("cat", "etched", 48), ("etched", "flat")),
        (("unheard of", "flat", 48), ("unheard of", "prepare")),
        (("car", "flat", 48, "mauve"), ("mauve", "red")),
        (("heart", "flat", 48), ("heart", "needs a colour")),
    ],
)
def test_wrong_sprites_are_named_with_what_is_allowed(atlas, arguments, words):
    with pytest.raises(DataError) as caught:
        atlas.sprite(*arguments)
    assert all(word in str(caught.value) for word in words)


def test_unknown_concept():
    with pytest.raises(DataError, match="unheard of"):
        concept("unheard of")


def test_warm_decodes_everything_once(world):
    atlas = art.Atlas.synthetic(world, size=16).warm(world)
    assert (
        atlas._master.cache_info().currsize == 40 + 4 + 47 + len(world.strangers) + 12 * 6
    )  # concepts, what is drawn only, guests, others, and paints


def test_missing_atlas_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILIP_DATA", str(tmp_path))
    assert art.data_dir() == tmp_path
    with pytest.raises(DataError, match="unilip data prepare emoji"):
        art.Atlas.load()


def test_prepare_reads_folders_and_tarballs_alike(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    names = ("cat", "man", "heart")
    monkeypatch.setattr(art, "concepts", lambda: {name: concept(name) for name in names})
    folder = fake_source(tmp_path / "folders", names=names)
    tarballs = tmp_path / "tarballs"
    tarballs.mkdir()
    for style in art.STYLES.values():
        with tarfile.open(tarballs / style.tarball, "w:gz") as archive:
            archive.add(folder / style.package.rsplit("/", 1)[-1], "package")
    seen = []
    first = art.prepare(tmp_path / "a", folder, lambda done, total: seen.append((done, total)))
    second = art.prepare(tmp_path / "b", tarballs)
    assert first.read_bytes() == second.read_bytes()
    monkeypatch.setattr(art, "_npm_pack", lambda folder: pytest.fail("what is there was fetched again"))
    assert art.prepare(tmp_path / "a") == first
    assert seen[-1] == (24, 24)  # cat, man and a face without a name in three styles, the man in five more tones
    assert art.Atlas.load(first).strange == [(style, UNNAMED[0]) for style in art.STYLES]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["CREDITS.txt", art.ATLAS_FILE]
    credits = (tmp_path / "a" / "CREDITS.txt").read_text()
    assert all(style.licence in credits for style in art.STYLES.values())
    sprite = np.asarray(art.Atlas.load(tmp_path / "a").sprite("cat", "glossy", 160))
    assert (sprite[..., 3] > 200).mean() > 0.97  # the small square off centre now fills the box


def test_prepare_without_the_art_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"npm pack.*leave source away"):
        art.prepare(tmp_path / "out", tmp_path)
    monkeypatch.setattr(art.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"npm was not found.*--source"):
        art.prepare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prepare_names_a_drawing_that_the_package_lacks(tmp_path):
    pytest.importorskip("resvg_py")
    folder = fake_source(tmp_path / "source", leave_out="dog")
    with pytest.raises(DataError, match="dog"):
        art.prepare(tmp_path / "out", folder)


def test_a_place_that_cannot_be_written_to_is_told_before_the_drawing(tmp_path, monkeypatch):
    pytest.importorskip("resvg_py")
    drawn = []
    monkeypatch.setattr(art, "_rasterise", drawn.append)
    monkeypatch.setattr(art.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    with pytest.raises(DataError, match=r"cannot be written to.*--output"):
        art.prepare(tmp_path, fake_source(tmp_path / "source"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        art.prepare(tmp_path / "file" / "art", tmp_path / "source")
    assert drawn == []


def test_npm_failures_are_told(tmp_path, monkeypatch):
    class Failed:
        returncode, stderr = 1, "no network"

    monkeypatch.setattr(art.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(art.subprocess, "run", lambda *a, **k: Failed)
    with pytest.raises(DataError, match=r"exit status 1.*no network.*--source"):
        art.prepare(tmp_path / "out")


def test_contact_sheet():
    from unilip.pictures import contact_sheet

    images = [np.zeros((20, 30, 3), np.uint8)] * 5
    page = contact_sheet(images, columns=2, captions=["a caption that has to be broken into lines"] * 5)
    assert page.width == 2 * 36 + 6
    assert page.height > 3 * 26
    page.save(io.BytesIO(), "PNG")
    with pytest.raises(ValueError, match="no images"):
        contact_sheet([])
