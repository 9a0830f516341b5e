"""The studio without a browser: what its handlers yield on the tiny model, and how its page is served."""

import json
import re
import socket
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unilip import cli
from unilip.errors import UniLIPError
from unilip.serve.engine import Engine
from unilip.serve.jobs import Result, Turn
from unilip.serve.studio_desk import MAX_PICTURES, Desk, Desks, Studio, _context, bar, difference, note

DRAW = {
    "prompt": "stars", "negative": None, "seed": 3, "fresh": False, "steps": 2, "guidance": 2.0, "solver": "dpm++",
    "count": 1,
}  # fmt: skip
CHANGE = {key: value for key, value in DRAW.items() if key not in ("prompt", "count")} | {
    "instruction": "make it red", "fit": "resize", "keep_aspect": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def engine(fresh_model):
    with Engine(fresh_model(), batch_wait=0.0) as engine:
        yield engine


@pytest.fixture(scope="module")
def studio(engine):
    return Studio(engine)


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path / "desk", "tiny")


@pytest.fixture
def source(picture, tmp_path):
    path = tmp_path / "source.png"
    picture(80, 40).save(path)
    return str(path)


def last(updates):
    """Everything that a handler left on the page, and the statuses on the way."""
    page, statuses = {}, []
    for update in updates:
        page |= update
        statuses.append(update.get("status", ""))
    return page, statuses


def test_drawing_shows_every_step_and_keeps_the_pictures(studio, desk, engine, tiny_model):
    page, statuses = last(studio.generate(desk, **(DRAW | {"count": 2, "steps": 3})))
    steps = [int(found) for text in statuses for found in re.findall(r'<progress value="(\d+)" max="6"', text)]
    assert steps == sorted(steps) and steps[-1] == 6 and len(steps) >= 3
    assert "2 pictures of 3 steps" in page["status"] and "done" in page["status"]
    assert [caption for _, caption in page["pictures"]] == ["seed 3", "seed 4"]
    assert page["seed"] == 3
    import torch

    for (path, _), seed in zip(page["pictures"], (3, 4), strict=True):
        image = Image.open(path)
        alone = tiny_model.generate(
            "stars", num_inference_steps=3, guidance_scale=2.0, generator=torch.Generator().manual_seed(seed)
        ).images[0]
        assert np.abs(np.asarray(image, int) - np.asarray(alone, int)).max() <= 1
        assert image.text["prompt"] == "stars" and image.text["model"] == "tiny" and image.text["seed"] == str(seed)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"steps": 3},
        {"guidance": 9.0},
        {"solver": "euler"},
        {"negative": "a dog"},
        {"prompt": "a blue car"},
    ],
    ids=str,
)
def test_every_setting_of_the_page_counts(studio, desk, change):
    def draw(settings):
        return np.asarray(Image.open(last(studio.generate(desk, **settings))[0]["pictures"][0][0]))

    assert np.array_equal(draw(DRAW), draw(DRAW))
    assert not np.array_equal(draw(DRAW), draw(DRAW | change))


def test_a_new_seed_each_time_is_told(studio, desk):
    seeds = {last(studio.generate(desk, **(DRAW | {"fresh": True, "steps": 1})))[0]["seed"] for _ in range(3)}
    assert len(seeds) == 3


def test_editing_compares_with_the_source(studio, desk, source):
    page, _ = last(studio.edit(desk, source, **CHANGE))
    before, after = page["slider"][0], Image.open(page["slider"][1])
    assert before.size == after.size == (56, 56)
    assert page["edited"] == page["slider"][1]
    gap, share = difference(before, after)
    assert np.array_equal(np.asarray(gap), np.asarray(page["difference"]))
    assert f"{share:.0%} of the pixels changed" in page["status"]


def test_editing_can_give_the_shape_back(studio, desk, source):
    page, _ = last(studio.edit(desk, source, **(CHANGE | {"keep_aspect": True, "fit": "pad"})))
    assert page["slider"][0].size == Image.open(page["edited"]).size == (56, 28)


def test_reconstructing_tells_the_psnr(studio, desk, source):
    from skimage.metrics import peak_signal_noise_ratio

    page, _ = last(studio.reconstruct(desk, source, "crop"))
    seen, again = np.asarray(page["seen"]), np.asarray(Image.open(page["again"]))
    assert page["score"] == pytest.approx(peak_signal_noise_ratio(seen, again), abs=1e-6)
    assert f"PSNR {page['score']:.1f} dB at 56 px" in page["status"]


@pytest.mark.parametrize(
    ("verb", "inputs", "message"),
    [
        ("generate", {"prompt": "   "}, "The prompt is empty"),
        ("generate", {"seed": 1.5}, "must be a whole number"),
        ("generate", {"seed": -1}, "seed"),
        ("generate", {"count": 99}, "99"),
        ("edit", {"path": None}, "no picture to change yet"),
        ("edit", {"instruction": ""}, "is empty"),
        ("edit", {"path": "broken"}, "broken.png is not an image"),
        ("reconstruct", {"path": "broken"}, "broken.png is not an image"),
        ("reconstruct", {"path": None}, "no picture to reconstruct yet"),
    ],
)
def test_bad_input_is_answered_kindly(studio, desk, source, tmp_path, verb, inputs, message):
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    if inputs.get("path") == "broken":
        inputs = inputs | {"path": str(tmp_path / "broken.png")}
    whole = {"generate": DRAW, "edit": {"path": source} | CHANGE, "reconstruct": {"path": source, "fit": "crop"}}[verb]
    page, statuses = last(getattr(studio, verb)(desk, **(whole | inputs)))
    assert list(page) == ["status"], "what was there before stays"
    assert 'role="alert"' in statuses[-1] and message in statuses[-1]
    assert str(tmp_path) not in statuses[-1] and "Traceback" not in statuses[-1]
    assert desk.entries == []


def test_what_nobody_foresaw_is_logged_and_answered_kindly(studio, desk, monkeypatch, caplog):
    monkeypatch.setattr(desk, "keep", lambda *args: 1 / 0)
    _, statuses = last(studio.generate(desk, **DRAW))
    assert "Something went wrong" in statuses[-1] and "ZeroDivision" not in statuses[-1]
    assert "ZeroDivisionError" in caplog.text


def test_cancelling_stops_between_steps_and_changes_nothing(studio, desk, engine):
    seen = []
    for update in studio.generate(desk, **(DRAW | {"steps": 100, "count": 4})):
        seen.append(update)
        if "step 4 of" in update["status"]:
            assert desk.busy and desk.cancel("generate")
    assert "Cancelled" in seen[-1]["status"] and "pictures" not in seen[-1]
    assert len(seen) < 60 and not desk.busy and desk.entries == []
    assert not desk.cancel("generate")


def test_leaving_the_page_cancels_its_work(studio, engine, tmp_path):
    desks = Desks(tmp_path, "tiny")
    work = studio.generate(desks.get("a"), **(DRAW | {"steps": 200, "count": 4}))
    seen, leaving = [], threading.Thread(target=desks.drop, args=["a"])
    for update in work:
        seen.append(update)
        if len(seen) == 2:  # it has begun
            leaving.start()
    leaving.join(20)
    assert "Cancelled" in seen[-1]["status"]
    assert len(desks) == 0 and not list(tmp_path.iterdir())


def test_who_stops_listening_cancels(studio, desk, engine):
    work = studio.generate(desk, **(DRAW | {"steps": 200}))
    next(work), next(work)
    work.close()
    assert not desk.busy
    deadline = time.monotonic() + 20
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not engine.stats().running


# --- the conversation


def say(studio, desk, text, *files, mode="auto"):
    return last(studio.say(desk, {"text": text, "files": list(files)}, mode))[0]


def test_a_conversation_draws_edits_and_answers(studio, desk):
    page = say(studio, desk, "please draw three yellow stars")
    assert page["messages"][0] == {"role": "user", "content": "please draw three yellow stars"}
    drawn = page["messages"][1]["content"]["path"]
    assert Image.open(drawn).size == (56, 56) and "“three yellow stars”" in page["messages"][2]["content"]
    page = say(studio, desk, "change the background to pink")
    changed = page["messages"][4]["content"]["path"]
    assert changed != drawn and "Changed" in page["messages"][5]["content"]
    page = say(studio, desk, "What color is the background?")
    assert len(page["messages"]) == 8 and page["messages"][-1]["content"]
    assert [entry.verb for entry in desk.entries] == ["generate", "edit", "ask"]
    assert [turn.role for turn in desk.turns] == ["user", "assistant"] * 3


def test_an_answer_is_that_of_the_model(studio, desk, source, tiny_model):
    page = say(studio, desk, "What is this?", source)
    assert page["messages"][-1]["content"] == (tiny_model.ask(source, "What is this?") or "(no answer)")


def test_an_edit_changes_the_newest_picture(studio, desk, source, picture, tmp_path):
    say(studio, desk, "What is this?", source)
    other = tmp_path / "other.png"
    picture(56, 56, seed=5).save(other)
    say(studio, desk, "make it red", str(other))
    kept = Image.open(desk.folder / desk.entries[-1].sources[0])
    assert np.array_equal(np.asarray(kept), np.asarray(picture(56, 56, seed=5)))


@pytest.mark.parametrize(("mode", "verb"), [("ask", "ask"), ("generate", "generate"), ("edit", "edit")])
def test_the_mode_overrules_the_words(studio, desk, source, mode, verb):
    say(studio, desk, "draw a star", source, mode=mode)
    assert desk.entries[-1].verb == verb


def test_what_an_answer_knows():
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (3, 3))
    question, answer = Turn("user", "What?"), Turn("assistant", "A star.")
    assert _context([question, answer], (one,)) == ([], (one,))
    assert _context([question, answer], ()) == ([question, answer], ())
    drawn = [question, answer, Turn("user", "draw"), Turn("assistant", "Drawn.", (two,))]
    assert _context(drawn, ()) == ([], (two,))
    assert _context([*drawn, question, answer], ()) == ([Turn("user", "What?", (two,)), answer], ())
    given = [Turn("user", "What?", (one,)), answer]
    assert _context([*drawn, *given], ()) == (given, ())


def test_a_long_conversation_forgets_its_beginning(studio, desk, source):
    say(studio, desk, "What is this?", source)
    limit = studio.engine.model.processor.max_tokens
    desk.turns += [Turn("user", "star " * (limit // 3)), Turn("assistant", "yes " * (limit // 3))] * 2
    page = say(studio, desk, "And now?")
    assert "error" not in page["status"] and page["messages"][-1]["content"]


@pytest.mark.parametrize(
    ("text", "mode", "message"), [("", "auto", "is empty"), ("make it red", "edit", "no picture to change yet")]
)
def test_a_refused_message_comes_back(studio, desk, text, mode, message):
    page = say(studio, desk, text, mode=mode)
    assert message in page["status"] and 'role="alert"' in page["status"]
    assert page["box"]["text"] == text and page["messages"] == []


def test_a_new_conversation_keeps_the_history(studio, desk):
    say(studio, desk, "draw a star")
    assert studio.forget(desk)["messages"] == []
    assert desk.turns == [] and len(desk.entries) == 1


# --- the history


def test_the_history_can_be_taken_along(studio, desk, source):
    with pytest.raises(UniLIPError, match="nothing in the history yet"):
        desk.archive()
    last(studio.generate(desk, **(DRAW | {"count": 2})))
    last(studio.edit(desk, source, **CHANGE))
    last(studio.reconstruct(desk, source, "pad"))
    say(studio, desk, "What is this?", source)
    with zipfile.ZipFile(desk.archive()) as archive:
        assert archive.testzip() is None
        record = json.loads(archive.read("history.json"))
        names = set(archive.namelist())
    assert record["model"] == "tiny"
    assert [entry["verb"] for entry in record["entries"]] == ["generate", "edit", "reconstruct", "ask"]
    assert {name for entry in record["entries"] for name in (*entry["files"], *entry["sources"])} | {
        "history.json"
    } == names
    first = record["entries"][0]
    assert first["seeds"] == [3, 4] and first["text"] == "stars" and len(first["files"]) == 2
    assert record["entries"][2]["psnr"] > 0 and record["entries"][3]["answer"] is not None
    assert [caption.split(" · ")[0] for _, caption in desk.pictures()] == ["3", "2", "1", "1"]
    desk.clear()
    assert desk.pictures() == [] and not list(desk.folder.glob("*.png"))


def test_the_history_is_bounded(desk):
    for _ in range(MAX_PICTURES // 100 + 2):
        desk.keep("generate", "many", Result(), [Image.new("RGB", (2, 2))] * 1, [Image.new("RGB", (2, 2))] * 99)
    count = sum(len(entry.files) + len(entry.sources) for entry in desk.entries)
    assert count <= MAX_PICTURES and desk.entries[0].number > 1
    assert len(list(desk.folder.glob("*.png"))) == count


def test_desks_are_apart_and_their_files_end_with_them(tmp_path):
    desks = Desks(tmp_path, "tiny")
    a, b = desks.get("a"), desks.get("b")
    a.keep("generate", "star", Result(), [Image.new("RGB", (2, 2))])
    assert b.pictures() == [] and desks.get("a") is a
    desks.drop("a")
    assert not a.folder.exists() and b.folder.exists() and len(desks) == 1
    desks.close()
    assert not list(tmp_path.iterdir())


def test_metadata_can_be_left_out(tmp_path):
    (path,) = Desk(tmp_path, "tiny", metadata=False).keep("generate", "x", Result(), [Image.new("RGB", (2, 2))])
    assert Image.open(path).text == {}


# --- small things


def test_the_difference_is_black_where_nothing_changed(picture):
    one = picture()
    gap, share = difference(one, one)
    assert share == 0 and np.asarray(gap).max() == 0
    gap, share = difference(Image.new("RGB", (4, 4), "black"), Image.new("RGB", (4, 4), "white"))
    assert share == 1 and np.asarray(gap).min() == 255
    half = Image.new("RGB", (4, 4), "black")
    half.paste("red", (0, 0, 2, 4))
    assert difference(Image.new("RGB", (4, 4), "black"), half)[1] == 0.5


def test_words_of_visitors_are_no_html():
    from unilip.serve.jobs import Event

    assert "<script>" not in note("<script>alert(1)</script>", "error")
    assert 'max="20"' in bar(Event("step", 3, 20)) and "step 3 of 20" in bar(Event("step", 3, 20))


# --- the page


@pytest.fixture(scope="module")
def page(engine):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from starlette.testclient import TestClient

    from unilip.serve.studio import About, Samples, create_app

    app = create_app(engine, About("tiny <b>", "draw noise", "draw anything else"), Samples(prompts=["three stars"]))
    with TestClient(app, base_url="http://127.0.0.1:7860") as client:
        yield client


def test_the_page_states_its_model(page):
    text = page.get("/config").text
    assert "tiny &lt;b&gt;" in text and "draw noise" in text and "draw anything else" in text
    assert "million parameters" in text and "56 px" in text and "CPU, float32" in text


def test_nothing_may_be_loaded_from_elsewhere(page):
    answer = page.get("/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy and "connect-src 'self'" in policy
    assert not re.findall(r"https?:|\*", policy)
    loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?://[^\"]+)", answer.text)
    assert [url for url in loaded if "127.0.0.1" not in url] == []


def test_nothing_is_reported_or_published(page):
    import gradio.analytics

    config = page.get("/config").json()
    assert not gradio.analytics.analytics_enabled()
    assert config["analytics_enabled"] is False
    assert [name for name in config["footer_links"] if name in ("api", "runs")] == []


def test_other_names_for_the_host_are_refused(page):
    assert page.get("/", headers={"host": "evil.example"}).status_code == 403
    for host in ("localhost:7860", "127.0.0.1", "[::1]:7860"):
        assert page.get("/", headers={"host": host}).status_code == 200


def test_files_of_the_machine_are_not_served(page):
    for path in ("/gradio_api/file=/etc/passwd", "/gradio_api/file%3D/etc/passwd"):
        assert page.get(path).status_code in (403, 404)


def test_a_password_is_asked_for(engine):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from starlette.testclient import TestClient

    from unilip.serve.studio import About, create_app

    app = create_app(engine, About("tiny"), hosts=["*"], password="many secret words")
    with TestClient(app, base_url="http://studio.example") as client:
        assert client.get("/config").status_code == 401
        assert client.post("/login", data={"username": "unilip", "password": "wrong"}).status_code == 400
        assert client.post("/login", data={"username": "unilip", "password": "many secret words"}).status_code == 200
        assert client.get("/config").status_code == 200


def test_a_tokenizer_alone_can_only_reconstruct(fresh_model):
    pytest.importorskip("gradio", reason="gradio is not installed")
    from starlette.testclient import TestClient

    from unilip.serve.studio import About, create_app

    model = fresh_model(parts=("encoder", "latent_head", "pixel_decoder"))
    with Engine(model) as engine, TestClient(create_app(engine, About("half")), base_url="http://localhost") as client:
        components = client.get("/config").json()["components"]
    tabs = [part["props"]["label"] for part in components if part["type"] == "tabitem"]
    assert tabs == ["Reconstruct", "History"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "give a --password of at least"),
        (["--host", "0.0.0.0", "--password", "short"], "give a --password of at least"),
        (["--password", " "], "The password is empty"),
        (["--port", "99999"], "99999"),
    ],
)
def test_the_verb_refuses(words, message, capsys, monkeypatch):
    monkeypatch.delenv("UNILIP_PASSWORD", raising=False)
    assert cli.main(["studio", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_taken_port_is_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("unilip.cli.studio.load", lambda o: pytest.fail("loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert cli.main(["studio", "--port", str(port)]) == 2
    assert f"port {port}" in capsys.readouterr().err


def test_invented_visitors_do_not_delete_what_others_made(studio, tmp_path, monkeypatch, source):
    monkeypatch.setattr("unilip.serve.studio_desk.MAX_DESKS", 5)
    desks = Desks(tmp_path, "tiny")
    mine = desks.get("me")
    last(studio.reconstruct(mine, source, "crop"))
    for number in range(50):
        desks.get(f"stranger {number}")
    assert len(desks) == 5 and desks.get("me") is mine and mine.folder.exists() and len(mine.entries) == 1
    for number in range(4):
        last(studio.reconstruct(desks.get(f"worker {number}"), source, "crop"))
    with pytest.raises(UniLIPError, match="5 pages are open"):
        desks.get("one more")
    mine.used -= 4000
    desks.get("one more")
    assert not mine.folder.exists()


def test_uploads_go_with_the_page_and_examples_stay(engine, tmp_path):
    from unilip.serve.studio_desk import Studio

    studio, desks = Studio(engine, tmp_path), Desks(tmp_path / "desks", "tiny")
    for name in ("example.png", "mine.png"):
        Image.new("RGB", (9, 9), "red").save(tmp_path / name)
    studio.kept = frozenset({(tmp_path / "example.png").resolve()})
    desk = desks.get("me")
    for name in ("example.png", "mine.png"):
        page, _ = last(studio.reconstruct(desk, str(tmp_path / name), "crop"))
        assert page["score"] > 0
    shown = Path(desk.show(Image.new("RGB", (9, 9))))
    desks.drop("me")
    assert (tmp_path / "example.png").exists() and not (tmp_path / "mine.png").exists() and not shown.exists()
    page, statuses = last(studio.reconstruct(desks.get("me"), "/etc/hostname", "crop"))
    assert "was not uploaded here" in statuses[-1]
