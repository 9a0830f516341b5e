"""Published data sets become shards that training reads: every layout, goes on after a stop, faults named."""

import io
import json
import tarfile

import pytest
from PIL import Image

from support import ShardWriter
from unilip.cli import main
from unilip.data.convert import LAYOUTS, convert
from unilip.data.records import decode_picture
from unilip.data.sources import open_source
from unilip.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "indices"))


@pytest.fixture
def paint(picture):
    def write(path, seed=0, size=(64, 48)):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(*size, seed).save(path)
        return path

    return write


@pytest.fixture
def sharegpt(tmp_path, paint):
    """The two lists of ShareGPT-4o-Image, with pictures in folders and in a tar file."""
    place = tmp_path / "ShareGPT"
    for i in range(3):
        paint(place / f"text_to_image/{i}.png", i)
    for i in range(2):
        paint(tmp_path / f"packed/text_and_image_to_image/{i}.png", 10 + i)
        paint(place / f"text_and_image_to_image/input_{i}.png", 20 + i)
    with tarfile.open(place / "part_0.tar", "w") as tar:
        tar.add(tmp_path / "packed/text_and_image_to_image", "text_and_image_to_image")
    drawn = [
        {"input_prompt": f"draw {i}", "output_image": f"text_to_image/{i}.png"} for i in range(4)
    ]  # 3 is not there
    edits = [
        {
            "input_prompt": f"change {i}",
            "input_image": [f"text_and_image_to_image/input_{i}.png"],
            "output_image": f"text_and_image_to_image/{i}.png",
        }
        for i in range(2)
    ]
    (place / "text_to_image.json").write_text(json.dumps(drawn))
    (place / "text_and_image_to_image.json").write_text(json.dumps(edits))
    return place


def texts(place, kind):
    source = open_source(str(place))
    return [source.read(kind, s, i).text.decode() for s, n in enumerate(source.counts(kind)) for i in range(n)]


def test_sharegpt(sharegpt, tmp_path):
    done = convert("sharegpt-4o-image", str(sharegpt), tmp_path / "out", shard_size=4)
    assert dict(done.samples) == {"caption": 3, "edit": 2} and [p.name for p in done.shards] == [
        "sharegpt-4o-image-000000.tar", "sharegpt-4o-image-000001.tar",
    ]  # fmt: skip
    assert done.skipped == {"picture missing": 1} and "text_to_image/3.png" in done.named[0]
    assert texts(tmp_path / "out", "caption") == [f"draw {i}" for i in range(3)]
    assert texts(tmp_path / "out", "edit") == ["change 0", "change 1"]
    record = open_source(str(tmp_path / "out")).read("edit", 1, 1)
    original = (sharegpt / "text_and_image_to_image/input_1.png").read_bytes()
    assert record.pictures[0] == original, "bytes stay as they are"


def test_a_name_that_no_file_can_have_is_of_a_missing_picture(tmp_path):
    rows = [{"input_prompt": "draw", "output_image": name} for name in ("a" * 5000, "no\0.png", "\ud800.png")]
    (tmp_path / "text_to_image.json").write_text(json.dumps(rows))
    assert convert("sharegpt-4o-image", str(tmp_path), tmp_path / "out").skipped == {"picture missing": 3}


@pytest.mark.parametrize("form", ["fields", "conversation", "lines", "shards"])
def test_gpt_image_edit(tmp_path, paint, form):
    place = tmp_path / "gpt"
    rows = []
    for i in range(2):
        source = paint(place / f"hqedit/input/{i}.png", i).relative_to(place)
        target = paint(place / f"hqedit/output/{i}.png", 9 + i).relative_to(place)
        if form == "conversation":
            turns = [{"from": "human", "value": f"<image>\nedit {i}"}, {"from": "gpt", "value": "<image>"}]
            rows.append({"image": [str(source), str(target)], "conversations": turns})
        else:
            rows.append({"input": str(source), "output": str(target), "instruction": f"edit {i}"})
    rows.append({"instruction": "no pictures"})
    if form == "shards":
        place = tmp_path / "tars"
        writer = ShardWriter(place, "x")
        for i in range(2):
            pair = {f"{p}.png": paint(tmp_path / f"{p}{i}.png", i).read_bytes() for p in ("input", "output")}
            writer.write(f"{i}", {**pair, "txt": f"edit {i}".encode()})
        writer.close()
    elif form == "lines":
        (place / "hqedit.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        (place / "hqedit.json").write_text(json.dumps(rows))
    done = convert("gpt-image-edit", str(place), tmp_path / "out")
    assert texts(tmp_path / "out", "edit") == ["edit 0", "edit 1"]
    assert done.skipped == ({} if form == "shards" else {"entry malformed": 1})


def test_lines_that_are_no_entries_are_left_out_and_counted(tmp_path, paint):
    for name in ("0", "1"):
        paint(tmp_path / "gpt" / f"{name}.png", int(name))
    row = json.dumps({"input": "0.png", "output": "1.png", "instruction": "edit"})
    (tmp_path / "gpt" / "list.jsonl").write_text("\n".join([row, "{half", "[5]", row]))
    (tmp_path / "gpt" / "none.json").write_text("[]")
    done = convert("gpt-image-edit", str(tmp_path / "gpt"), tmp_path / "out")
    assert done.samples == {"edit": 2} and done.skipped == {"line unreadable": 1, "entry malformed": 1}
    assert all("list.jsonl at byte" in name for name in done.named)


def test_blip3o_is_checked_and_cut_anew(tmp_path, paint):
    writer = ShardWriter(tmp_path / "in", "00000")
    for i in range(5):
        data = b"broken" if i == 2 else paint(tmp_path / f"{i}.jpg", i).read_bytes()
        writer.write(f"{i:05d}", {"jpg": data, "txt": b"" if i == 4 else f"caption {i}".encode()})
    writer.close()
    done = convert("blip3o-60k", str(tmp_path / "in"), tmp_path / "out", shard_size=2)
    assert len(done.shards) == 3 and texts(tmp_path / "out", "caption") == ["caption 0", "caption 1", "caption 3"]
    assert done.skipped == {"picture unreadable": 1, "caption empty": 1}


def test_large_pictures_are_scaled_down(sharegpt, tmp_path):
    convert("sharegpt-4o-image", str(sharegpt), tmp_path / "out", shorter_side=24)
    data = open_source(str(tmp_path / "out")).read("caption", 0, 0).pictures[0]
    assert decode_picture(data).size == (32, 24) and Image.open(io.BytesIO(data)).format == "JPEG"


def test_an_interrupted_conversion_goes_on(sharegpt, tmp_path):
    whole = convert("sharegpt-4o-image", str(sharegpt), tmp_path / "whole", shard_size=2)
    cut = tmp_path / "cut"

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert("sharegpt-4o-image", str(sharegpt), cut, shard_size=2, progress=stop)
    assert [p.name for p in sorted(cut.glob("*.tar"))] == ["sharegpt-4o-image-000000.tar"], "whole shards only"
    again = convert("sharegpt-4o-image", str(sharegpt), cut, shard_size=2)
    assert again.samples.total() == whole.samples.total() - 2
    for path in whole.shards:
        assert (cut / path.name).read_bytes() == path.read_bytes()
    assert not list(cut.glob(".*.part"))


def test_a_download_that_was_completed_is_not_taken_for_the_same(sharegpt, tmp_path):
    whole = (sharegpt / "part_0.tar").read_bytes()
    (sharegpt / "part_0.tar").unlink()
    out = sharegpt / "shards"
    assert convert("sharegpt-4o-image", str(sharegpt), out).skipped["picture missing"] == 3
    assert not convert("sharegpt-4o-image", str(sharegpt), out).samples, "all shards are there"
    (sharegpt / "part_0.tar").write_bytes(whole)
    with pytest.raises(DataError, match="shards of another conversion: content"):
        convert("sharegpt-4o-image", str(sharegpt), out)


def test_what_is_no_download_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for layout in LAYOUTS:
        with pytest.raises(DataError, match=r"neither|holds no|no pictures"):
            convert(layout, str(tmp_path / "empty"), tmp_path / "out")
    with pytest.raises(DataError, match="allowed: gpt-image-edit"):
        convert("laion", str(tmp_path), tmp_path / "out")
    (tmp_path / "empty" / "list.json").write_text("[1")
    with pytest.raises(DataError, match=r"list\.json is no JSON list"):
        convert("gpt-image-edit", str(tmp_path / "empty"), tmp_path / "out")


def test_the_command(sharegpt, tmp_path, capsys):
    words = ["data", "convert", "sharegpt-4o-image", str(sharegpt)]
    assert main(words) == 2 and "no --output" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "out"), "--shard-size", "4", "--shorter-side", "24", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert len(out["shards"]) == 2 and out["samples"] == {"caption": 3, "edit": 2} and out["skipped"]
    assert main([*words, "--output", str(tmp_path / "out2")]) == 0
    said = capsys.readouterr()
    assert said.out.strip().endswith("sharegpt-4o-image-000000.tar") and "picture missing: 1" in said.err
