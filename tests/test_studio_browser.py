"""The page in a real browser: headless Chromium, driven by selenium, on the embedded model.

One page is opened once and used by the tests in their order, as a visitor would use it. Screenshots at 1280x800 and
390x844 are written to the folder UNILIP_SCREENSHOTS, or a temporary one. Without Chromium and its driver it is skipped.
"""

import dataclasses
import json
import os
import shlex
import shutil
import tempfile
import threading
import time
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from unilip.cli import main

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
PATIENCE = 120  # seconds: the core may be shared with much else
EXAMPLES = Path(__file__).resolve().parents[1] / "src/unilip/weights/examples"
KEY = "a-key-of-twenty-four-signs"
DESK, PHONE = (1280, 800), (390, 844)


@contextmanager
def serving(model, runs=None, **rules):
    """A server in a thread, as `unilip studio` starts it: its address, and its engine."""
    from unilip.cli.serving import about
    from unilip.serve.app import Settings, create_app
    from unilip.serve.engine import Engine
    from unilip.serve.guard import Rules
    from unilip.serve.server import listen, make_server
    from unilip.serve.training import Trainer

    taken = listen("127.0.0.1", 0)
    with Engine(model) as engine:
        told, trainer = about(Namespace(model=None, performance="auto"), model), None
        if runs is not None:
            told["trains"], trainer = True, Trainer(runs, str(runs / "base"), "tiny", "cpu", engine.lend)
        settings = Settings("unilip", Rules(rate_limit=0, **rules), about=told)
        server = make_server(create_app(engine, settings, trainer=trainer), 3)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{taken.getsockname()[1]}/", engine
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture(scope="module")
def model():
    pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    from unilip.model import UniLIP

    return UniLIP.from_pretrained()


@pytest.fixture(scope="module")
def served(model):
    with serving(model) as found:
        yield found


class Visitor:
    """A browser with the page open, and what a person does with it."""

    def __init__(self, driver, shots):
        self.driver, self.shots = driver, shots

    def all(self, css):
        from selenium.webdriver.common.by import By

        return [one for one in self.driver.find_elements(By.CSS_SELECTOR, css) if one.is_displayed()]

    def until(self, condition, what, patience=PATIENCE):
        from selenium.common.exceptions import ElementNotInteractableException, StaleElementReferenceException

        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                found = condition()
            except (StaleElementReferenceException, ElementNotInteractableException):
                found = None
            if found:
                return found
            time.sleep(0.1)
        self.driver.save_screenshot(str(self.shots / "failed.png"))
        raise AssertionError(f"{what}, after {patience} s; the note says {self.text('#note')!r}")

    def one(self, css, words=""):
        """The first visible element of a selector, with these words in it."""
        return self.until(
            lambda: next((found for found in self.all(css) if words in found.text), None), f"no {css} {words!r}"
        )

    def text(self, css):
        return " ".join(found.text for found in self.all(css))

    def click(self, css, words=""):
        self.one(css, words).click()

    def type(self, css, *keys):
        from selenium.webdriver.common.keys import Keys

        field = self.one(css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(*(keys or (Keys.DELETE,)))

    def say(self, *words):
        """Write a message and send it."""
        from selenium.webdriver.common.keys import Keys

        self.type("#words", *words, Keys.ENTER)

    def idle(self):
        self.until(lambda: self.text("#go") not in ("", "Cancel") and not self.all(".pending"), "it does not end")

    def thumbs(self):
        return len(self.driver.find_elements("css selector", "#thumbs img"))

    def turns(self):
        return len(self.all(".turn"))

    def made(self, count):
        """Wait for the picture of turn `count`, and return the facts below it."""
        self.until(lambda: self.turns() == count and self.all(".turn:last-child .pictures img"), f"no picture {count}")
        self.idle()
        return self.text(".turn:last-child .facts")

    def size(self, width, height):
        touch = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", touch)

    def shoot(self, name):
        """Take the screen at both sizes; nothing may be wider than it."""
        for label, size in (("phone", PHONE), ("desk", DESK)):
            self.size(*size)
            time.sleep(0.5)
            wide = self.driver.execute_script(
                "return [...document.querySelectorAll('body, #talk, #composer, aside, dialog')]"
                ".filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1).map(e => e.id || e.tagName)"
            )
            page = self.driver.execute_script("return document.documentElement.scrollWidth - innerWidth")
            assert page <= 0 and not wide, (name, label, page, wide)
            path = self.shots / f"{name}-{label}.png"
            self.driver.save_screenshot(str(path))
        return Image.open(path).convert("RGB")

    def in_view(self, css):
        """How much of an element can be seen, from 0 to 1."""
        return self.driver.execute_script(
            "const e = [...document.querySelectorAll(arguments[0])].at(-1), b = e.getBoundingClientRect();"
            "const t = document.getElementById('talk').getBoundingClientRect();"
            "return Math.max(0, Math.min(b.bottom, t.bottom) - Math.max(b.top, t.top)) / b.height", css,
        )  # fmt: skip


@pytest.fixture(scope="module")
def visitor(served, tmp_path_factory):
    """A browser on the page."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip(f"needs Chromium (found: {chromium}) and chromedriver (found: {chromedriver})")
    home = Path(tempfile.mkdtemp())
    shots = Path(os.environ.get("UNILIP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={home / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(home / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        driver.set_page_load_timeout(PATIENCE)
        visitor = Visitor(driver, shots)
        visitor.downloads = home / "downloads"
        visitor.size(*DESK)
        driver.get(served[0])
        visitor.one("#start")
        yield visitor
    finally:
        driver.quit()
        shutil.rmtree(home, ignore_errors=True)


def test_the_page_says_what_its_model_is_and_offers_what_it_can(visitor):
    assert "embedded (pico)" in visitor.text("#model") and "flat emoji" in visitor.text("#can")
    facts = visitor.driver.execute_script("return document.getElementById('facts').textContent")
    assert "cpu, float32, performance: auto" in facts
    assert len(visitor.all("#prompts button")) == 4 and len(visitor.all("#samples img")) == 4
    visitor.shoot("1-start")
    visitor.size(*PHONE)
    every = "for (const e of document.querySelectorAll('header [hidden]')) e.hidden = false;"
    assert visitor.driver.execute_script(every + "return document.querySelector('header').offsetHeight") < 56
    visitor.size(*DESK)
    visitor.driver.refresh()


def test_draw(visitor):
    visitor.say("three yellow stars")
    visitor.one(".pending")
    visitor.one(".facts", "Step")
    visitor.one(".pending img")
    facts = visitor.made(1)
    assert "seed" in facts and "20 steps" in facts and "112 × 112 px" in facts
    assert visitor.in_view(".turn:last-child .pictures img") == 1
    width = visitor.driver.execute_script("return document.querySelector('.turn .pictures img').clientWidth")
    assert width % 112 == 0 and width >= 336, "a whole multiple of its size"
    assert len(visitor.shoot("3-drawn").getcolors(2**24)) > 50
    visitor.size(*PHONE)
    time.sleep(0.5)
    assert visitor.in_view(".turn:last-child .pictures img") == 1
    visitor.size(*DESK)


def test_edit_what_was_drawn_and_compare(visitor):
    visitor.say("change the background to pink")
    visitor.made(2)
    assert "Taken as a change of the picture" in visitor.text(".turn:last-child")
    visitor.shoot("4-edited")
    visitor.click(".turn:last-child .acts button", "Compare")
    visitor.until(lambda: len(visitor.all("#views img")) == 2, "no two pictures")
    visitor.shoot("5-compared")
    visitor.click("#viewer .close")


def test_ask_about_it(visitor):
    visitor.say("What color is the background?")
    visitor.until(lambda: visitor.turns() == 3 and visitor.text(".turn:last-child .answer"), "no answer")
    visitor.idle()
    visitor.say("How many stars are there?")
    visitor.until(lambda: visitor.turns() == 4 and visitor.text(".turn:last-child .answer"), "no answer")
    visitor.idle()
    visitor.shoot("6-asked")
    visitor.click(".turn:last-child .taken button")
    assert visitor.one("#words").get_attribute("value") == "How many stars are there?"
    assert visitor.text("#go") == "Edit"


def test_a_picture_of_ones_own_is_edited_and_reconstructed(visitor):
    from selenium.webdriver.support.ui import Select

    visitor.click("#new")
    visitor.one("#start")
    visitor.driver.find_element("id", "files").send_keys(str(EXAMPLES / "panda.png"))
    visitor.one("#attached .thumb", "panda.png")
    visitor.type("#words", "make the background blue")
    visitor.until(lambda: visitor.text("#go") == "Edit", "not taken as an edit")
    visitor.shoot("7-attached")
    visitor.click("#go")
    visitor.made(1)
    visitor.driver.find_element("id", "files").send_keys(str(EXAMPLES / "cactus.png"))
    visitor.one("#attached .thumb", "cactus.png")
    Select(visitor.one("#mode")).select_by_value("reconstruct")
    visitor.click("#go")
    assert "dB" in visitor.made(2)
    visitor.shoot("8-reconstructed")
    assert Select(visitor.one("#mode")).first_selected_option.get_attribute("value") == "auto"


def test_unknown_words_are_told_before_and_after(visitor):
    visitor.type("#words", "draw a dragon above a castle")
    visitor.one("#unread", "Never read in training: dragon, castle")
    visitor.click("#go")
    visitor.made(3)
    visitor.one(".turn:last-child .warn", "dragon")
    visitor.shoot("9-unknown-words")


def test_settings_are_used_and_several_pictures_drawn(visitor):
    visitor.click("#show-settings")
    for name, value in (("n", "4"), ("seed", "7"), ("steps", "8")):
        visitor.type(f"#values [name={name}]", value)
    visitor.shoot("10-settings")
    visitor.click("#settings .close")
    visitor.say("draw a blue car")
    visitor.until(lambda: len(visitor.all(".turn:last-child .pictures img")) == 4, "no four pictures")
    visitor.idle()
    visitor.shoot("11-four")
    visitor.click(".turn:last-child figure button")
    assert "seed 7" in visitor.text("#viewed") and "8 steps" in visitor.text("#viewed")
    visitor.click("#viewer .close")
    visitor.click("#show-settings")
    visitor.click("#values [type=reset]")
    assert visitor.one("#values [name=seed]").get_attribute("value") == ""
    visitor.click("#settings .close")


def test_shapes_and_the_best_of_several(visitor):
    visitor.click("#show-settings")
    assert visitor.all("#values [name=plan]") and "turbo" in visitor.text("#values [name=preset]")
    for name, value in (("best_of", "2"), ("steps", "6")):
        visitor.type(f"#values [name={name}]", value)
    visitor.click("#settings .close")
    turns = visitor.turns()
    visitor.type("#words", "draw a green fish")
    visitor.click("#shapes label", "3:2")
    assert [chip.text for chip in visitor.all("#shapes label")] == ["1:1", "3:2", "2:3"], "what 16 cells can tell apart"
    visitor.shoot("20-shapes")
    visitor.click("#go")
    facts = visitor.made(turns + 1)
    assert "140 × 84 px" in facts and "best of 2" in facts
    visitor.shoot("21-wide")
    visitor.click("#show-settings")
    visitor.click("#values [type=reset]")
    square = "return document.querySelector('#shapes input').checked"
    visitor.until(lambda: visitor.driver.execute_script(square), "the shape stays")
    visitor.click("#settings .close")


def test_cancel_by_button_and_key_keeps_the_words(visitor, served):
    from selenium.webdriver.common.keys import Keys

    visitor.click("#show-settings")
    visitor.type("#values [name=steps]", "200")
    visitor.click("#settings .close")
    turns = visitor.turns()
    for way in ("button", "key"):
        visitor.say("draw a red balloon")
        visitor.one(".facts", "Step")
        if way == "button":
            visitor.one(".pending img")
            visitor.shoot("2-drawing")
            visitor.click("#go", "Cancel")
        else:
            visitor.one("#words").send_keys(Keys.ESCAPE)
        visitor.until(lambda: visitor.turns() == turns, f"the {way} does not cancel", 30)
        visitor.idle()
        assert visitor.one("#words").get_attribute("value") == "draw a red balloon"
        visitor.one("#note.hint", "Cancelled")
        visitor.until(lambda: visitor.text("#go") == "Draw", "taken as something else")
        visitor.until(lambda: served[1].stats().running == 0, "the engine goes on")
    visitor.shoot("12-cancelled")


def test_the_place_in_the_queue_is_told(visitor, served):
    from unilip.serve.jobs import Generate

    tickets = [served[1].submit(Generate("a frog", count=8, steps=40, image_size=side)) for side in (112, 224)]
    visitor.say("draw a green cactus")
    visitor.one(".facts", "ahead")
    visitor.shoot("13-queue")
    visitor.click("#go", "Cancel")
    for ticket in tickets:
        ticket.cancel()
    visitor.idle()
    visitor.click("#show-settings")
    visitor.click("#values [type=reset]")
    visitor.click("#settings .close")


def test_errors_are_told_in_words_and_nothing_is_lost(visitor, tmp_path):
    visitor.click("#show-settings")
    visitor.type("#values [name=steps]", "5000")
    visitor.click("#settings .close")
    visitor.say("draw a red balloon")
    visitor.one("#note", "steps must be at most 1000")
    assert visitor.one("#words").get_attribute("value") == "draw a red balloon"
    visitor.shoot("14-error")
    visitor.click("#show-settings")
    visitor.click("#values [type=reset]")
    for odd in ("9007199254740993", "1e"):  # rounded, and nothing, for JavaScript
        visitor.type("#values [name=seed]", odd)
        visitor.click("#go")
        visitor.one("#note", "Seed of the settings is no number")
    visitor.click("#values [type=reset]")
    visitor.click("#settings .close")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no picture")
    visitor.driver.find_element("id", "files").send_keys(str(broken))
    visitor.one("#note", "broken.png is no picture that can be read")
    visitor.type("#words")
    visitor.click("#go")
    visitor.one("#note", "There are no words")


def test_the_gallery_outlives_the_page_and_gives_words_and_seed_back(visitor):
    count = visitor.thumbs()
    assert count == 2 + 2 + 1 + 4 + 1
    visitor.driver.refresh()
    visitor.until(lambda: visitor.thumbs() == count, "the gallery is lost")
    thumb = visitor.one("#thumbs button[title='a blue car']")
    thumb.click()
    visitor.shoot("15-viewer")
    first = visitor.driver.execute_script("return document.querySelector('#views img').src")
    facts = visitor.text("#viewed .soft")
    visitor.click("#tools button", "Use words and seed")
    assert visitor.one("#words").get_attribute("value") == "a blue car"
    visitor.click("#go")
    assert visitor.made(1).split(" · ")[:4] == facts.split(" · ")[:4]
    script = """
        const pixels = async (url) => {
            const image = Object.assign(new Image(), {src: url});
            await image.decode();
            const context = new OffscreenCanvas(112, 112).getContext('2d');
            context.drawImage(image, 0, 0);
            return context.getImageData(0, 0, 112, 112).data.join();
        };
        Promise.all([arguments[0], arguments[1]].map(pixels)).then(([a, b]) => arguments[2](a === b));
    """
    second = visitor.driver.execute_script("return document.querySelector('.turn img').src")
    same = visitor.driver.execute_async_script(script, first, second)
    assert same, "the same seed gives the same picture"


def test_delete_and_undo(visitor):
    count = visitor.thumbs()
    visitor.click("#thumbs button")
    visitor.click("#tools button", "Delete")
    visitor.until(lambda: visitor.thumbs() == count - 1, "it is still there")
    visitor.shoot("16-deleted")
    visitor.click("#toast button", "Undo")
    visitor.until(lambda: visitor.thumbs() == count, "it does not come back")
    visitor.click("#clear")
    visitor.until(lambda: visitor.thumbs() == 0, "they are still there")
    visitor.click("#toast button", "Undo")
    visitor.until(lambda: visitor.thumbs() == count, "they do not come back")
    visitor.driver.refresh()
    visitor.until(lambda: visitor.thumbs() == count, "undone in sight only")


def test_a_picture_is_downloaded_and_made_again_by_its_command(visitor, tmp_path):
    visitor.click("#thumbs button")
    visitor.click("#tools button", "Download")
    path = visitor.until(lambda: next(iter(visitor.downloads.glob("*.png")), None), "nothing was downloaded")
    visitor.until(lambda: path.stat().st_size > 0, "it is empty")
    assert Image.open(path).size == (112, 112) and path.name.startswith("a-blue-car-")
    visitor.click("#tools button", "Copy as command")
    command = shlex.split(visitor.text("#viewed code"))
    assert command[:2] == ["unilip", "generate"] and command[-1] == "a blue car", command
    again = tmp_path / "again.png"
    main([*command[1:3], f"--output={again}", *command[3:]])
    with Image.open(path) as seen, Image.open(again) as drawn:
        assert ImageChops.difference(seen.convert("RGB"), drawn.convert("RGB")).getextrema() == ((0, 0),) * 3
    visitor.click("#viewer .close")
    visitor.size(*PHONE)
    visitor.click("#show-gallery")
    visitor.driver.save_screenshot(str(visitor.shots / "17-gallery-phone.png"))
    visitor.click("#gallery .close")
    visitor.size(*DESK)


def test_dark_follows_the_system(visitor):
    def shade(theme):
        visitor.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        )
        return visitor.shoot(f"18-{theme}").convert("L").getpixel((1270, 790))

    visitor.say("draw a frog")
    visitor.made(1)
    assert shade("dark") < 90 < shade("light")


def test_nothing_was_asked_of_other_hosts_and_nothing_went_wrong(visitor, served):
    asked = set()
    for entry in visitor.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    assert any(url.startswith(served[0]) for url in asked)
    assert [url for url in asked if not url.startswith((served[0], "data:", "blob:", "chrome", "about:"))] == []
    wrong = [one["message"] for one in visitor.driver.get_log("browser")]
    assert [one for one in wrong if "400 (Bad Request)" not in one] == []


def test_a_key_is_asked_for(visitor, model):
    with serving(model, api_keys=(KEY,)) as (address, _):
        visitor.driver.get(address)
        visitor.shoot("19-key")
        visitor.type("#key-text", "something-else")
        visitor.click("#key .main")
        visitor.one("#key-note", "That key was wrong")
        visitor.type("#key-text", KEY)
        visitor.click("#key .main")
        visitor.click("#prompts button")
        visitor.made(1)


def test_what_a_model_has_learned_is_offered(visitor, fresh_model):
    """Jumps and written plans, of a tiny model that has both, and the shapes of its four cells."""
    from unilip.fewstep import add_embedder, few_config

    model = fresh_model()
    add_embedder(model.dit)
    sampling = dataclasses.replace(model.config.sampling, plan="Describe: ")
    model.config = few_config(model.config.replace(sampling=sampling), (4, 2, 1))
    with serving(model) as (address, _):
        visitor.driver.get(address)
        visitor.one("#start")
        visitor.click("#show-settings")
        visitor.one("#values [name=plan]")
        visitor.click("#values [name=preset] option", "turbo")
        visitor.click("#settings .close")
        visitor.type("#words", "draw a star")
        assert [chip.text for chip in visitor.all("#shapes label")] == ["1:1", "16:9", "9:16"]
        visitor.click("#go")
        assert "turbo" in visitor.made(1)
        visitor.one(".turn:last-child .plan", "Written out")
        visitor.shoot("22-planned")


def test_an_adapter_is_trained(visitor, fresh_model, tmp_path, picture):
    """Pictures and captions are chosen, the training is watched, and its adapter picked."""
    from unilip.serve.training import Trainer

    pytest.importorskip("peft")
    model = fresh_model()
    model.save_pretrained(tmp_path / "base")
    for i in range(6):
        picture(80, 60, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a red star,\nnumber {i}" if i else "")
    files = [str(path) for path in sorted(tmp_path.glob("[0-9].*"))]
    with serving(model, tmp_path) as (address, _):
        visitor.driver.get(address)
        visitor.click("#show-train")
        visitor.one("#train-count", "5 to 50 pictures")
        visitor.driver.find_element("css selector", "#train-files").send_keys("\n".join(files))
        visitor.one("#train-count", "5 of 6 pictures are complete")
        assert visitor.all("#train-rows input")[1].get_attribute("value") == "a red star, number 1"
        assert not visitor.one("#train-go").is_enabled()
        visitor.type("#train-rows .row input", "a red star")
        visitor.type("#train-form [name=name]", "stars")
        visitor.type("#train-form [name=steps]", "40")
        visitor.shoot("23-train")
        visitor.click("#train-form [name=kind] option", "an edit")
        visitor.one("#train-count", "3 of 3 pairs are complete")
        visitor.shoot("24-pairs")
        visitor.size(*PHONE)
        edges = "const right = e => e.getBoundingClientRect().right, box = document.getElementById('train');"
        beyond = "return [...box.querySelectorAll('*')].filter(e => e.offsetParent && right(e) > right(box)).length"
        assert visitor.driver.execute_script(edges + beyond) == 0
        visitor.size(*DESK)
        visitor.click("#train-form [name=kind] option", "a style")
        visitor.one("#train-count", "6 of 6 pictures are complete")
        visitor.click("#train-go")
        visitor.one("#train-state", "of 40")
        visitor.until(lambda: visitor.all("#train-sheet"), "no picture of the progress")
        visitor.shoot("25-training")
        visitor.one("#train-state", "is done")
        visitor.click("#train .close")
        visitor.click("#show-settings")
        picked = "return document.querySelector('#values [name=model]').value"
        assert visitor.driver.execute_script(picked) == "unilip:stars"
        visitor.shoot("26-picked")
    assert list(Trainer(tmp_path, str(tmp_path / "base"), "tiny", "cpu").kept()) == ["stars"]
