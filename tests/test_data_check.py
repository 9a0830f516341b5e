"""The look at data before training: counts, sizes, what is broken and why, texts, a sheet, exit codes."""

import json

import pytest
from PIL import Image

from support import ShardWriter
from unilip.cli import main
from unilip.data.check import check
from unilip.data.shards import INDEX_SUFFIX
from unilip.data.sources import open_source


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNILIP_CACHE", str(tmp_path / "indices"))


@pytest.fixture
def place(tmp_path, picture):
    """Forty captions in four shards: one picture broken, a text too long, two the same."""
    writer = ShardWriter(tmp_path / "shards", "part", 10)
    picture(96, 48).save(tmp_path / "p.png")
    data = (tmp_path / "p.png").read_bytes()
    for i in range(40):
        text = "x" * 1200 if i == 7 else "same" if i in (1, 2) else f"caption {i:02d}"
        writer.write(f"{i:03d}", {"png": data[:50] if i == 3 else data, "txt": text.encode()})
    writer.close()
    return tmp_path / "shards"


def test_everything_is_told(place):
    told = []
    report, sheet = check(open_source(str(place)), None, progress=lambda done, total: told.append((done, total)))
    assert report.counts["caption"] == report.counts["image"] == report.read == 40 and report.shards == 4
    assert (
        report.bad == 1
        and report.skipped == {"picture unreadable": 1}
        and "/003: picture unreadable" in report.named[0]
    )
    assert report.left_out == {"caption over 1000 characters": 1} and report.repeated_texts == 1
    assert report.shorter_side == (48, 48, 48) and report.aspect == (2.0, 2.0, 2.0)
    assert report.characters == {"caption": (4, 10, 10)} and told[-1] == (40, 40)
    assert sheet.size[0] > 500 and sheet.size[1] > 500
    lines = "\n".join(report.lines())
    for words in ("4 shards; 40 image, 40 caption", "1 cannot be used", "picture unreadable: 1", "4 to 10 characters"):
        assert words in lines


def test_a_strip_is_shown(tmp_path):
    Image.new("RGB", (1000, 3)).save(tmp_path / "strip.png")
    report, sheet = check(open_source(str(tmp_path)))
    assert report.read == 1 and not report.bad and sheet is not None


def test_a_choice_is_spread_over_all_shards(place):
    report, _ = check(open_source(str(place)), 4)
    assert report.read == 4 and report.counts["caption"] == 40
    seen = []
    source = open_source(str(place))
    read = source.read
    source.read = lambda kind, shard, i: seen.append(shard) or read(kind, shard, i)
    check(source, 4)
    assert seen == [0, 1, 2, 3]


def test_damaged_shards_are_told(place):
    for index in place.glob(f"*{INDEX_SUFFIX}"):
        index.unlink()
    path = place / "part-000002.tar"
    path.write_bytes(path.read_bytes()[:4000])
    report, _ = check(open_source(str(place)), 10)
    assert len(report.damaged) == 1 and "part-000002.tar" in report.damaged[0] and report.counts["caption"] < 40


def test_edits_and_conversations(tmp_path, picture):
    picture(60, 60, 1).save(tmp_path / "a.png")
    rows = [
        {"source": "a.png", "target": "a.png", "instruction": "turn it"},
        {"image": "a.png", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report, sheet = check(open_source(str(tmp_path / "x.jsonl")))
    assert set(report.characters) == {"instruction", "conversation"} and report.bad == 0 and sheet is not None


def test_the_command(place, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert main(["data", "check", str(place), "--output", str(sheet), "--samples", "40"]) == 1, "something is broken"
    out = capsys.readouterr().out
    assert "picture unreadable: 1" in out and out.splitlines()[-1] == str(sheet) and Image.open(sheet).width > 500
    picture = tmp_path / "fine"
    picture.mkdir()
    Image.new("RGB", (40, 40)).save(picture / "a.png")
    (picture / "a.txt").write_text("fine")
    assert main(["data", "check", str(picture), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["places"][0]["counts"]["caption"] == 1
    assert main(["data", "check", f"{picture},{place}", "--output", str(sheet)]) == 1, "a mixture"
    assert (tmp_path / "sheet-2.png").exists()
    assert main(["data", "check", str(tmp_path / "nowhere")]) == 2
    assert main(["data", "check", str(picture), "--output", "sheet.txt"]) == 2
