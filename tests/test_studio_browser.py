"""The studio in a real browser: headless Chromium, driven by selenium, on the embedded model.

One page is opened once and used by the tests in their order, as a visitor would use it. Screenshots are written to the
folder UNILIP_SCREENSHOTS, or a temporary one. Without Chromium and its driver the tests are skipped.
"""

import json
import os
import shutil
import socket
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,1000",
)  # fmt: skip
PATIENCE = 180  # seconds: the core may be shared with much else
EXAMPLES = Path(__file__).resolve().parents[1] / "src/unilip/weights/examples"


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    """The folder of the screenshots."""
    folder = Path(os.environ.get("UNILIP_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def address():
    """Where the studio of the embedded model is served."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed")
    from unilip.cli.studio import CAN, CANNOT, samples
    from unilip.model import UniLIP
    from unilip.serve.engine import Engine
    from unilip.serve.studio import About, create_app

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Engine(UniLIP.from_pretrained()) as engine:
        app = create_app(engine, About("embedded (pico)", CAN, CANNOT), samples())
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
        deadline = time.monotonic() + 60
        while len(app.state.desks) and time.monotonic() < deadline:
            time.sleep(0.2)
        left = len(app.state.desks)
        server.should_exit = True
        thread.join(60)
    assert left == 0, "a page that was closed left its desk behind"
    assert not app.state.desks.folder.parent.exists(), "the studio left files behind"


class Visitor:
    """A browser with the page open, and what a person does with it."""

    def __init__(self, driver, downloads, shots):
        self.driver, self.downloads, self.shots = driver, downloads, shots
        self.requests = set()

    def all(self, css):
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css):
        self.until(lambda: self.all(css), f"there is no {css}")
        return self.all(css)[0]

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
            time.sleep(0.15)
        self.shoot("failed")
        raise AssertionError(f"{what}, after {patience} s")

    def tab(self, name):
        def click():
            for button in self.all("#tabs :not([aria-hidden=true]) > button"):  # not gradio's copies for measuring
                if button.text.strip() == name and button.is_displayed():
                    self.driver.execute_script("arguments[0].click()", button)
                    return True
            for more in self.all("#tabs .overflow-menu > button"):  # on a narrow page
                if more.is_displayed():
                    more.click()
            return False

        self.until(click, f"there is no tab {name}")
        time.sleep(0.3)

    def click(self, css):
        element = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        self.until(lambda: self.one(css).is_displayed() and self.one(css).is_enabled(), f"{css} cannot be clicked")
        self.driver.execute_script("arguments[0].click()", self.one(css))

    def type(self, css, *keys):
        from selenium.webdriver.common.keys import Keys

        def ready():
            field = self.one(css)
            return field if field.is_displayed() and field.is_enabled() else None

        field = self.until(ready, f"{css} takes no words")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(*keys)

    def status(self, tab, kind):
        """Wait until a tab's status is of a kind, and return its words."""
        return self.until(
            lambda: next((found.text for found in self.all(f"#{tab}-status .note.{kind}")), None),
            f"no {kind} in {tab}; it says {[found.text for found in self.all(f'#{tab}-status')]}",
        )

    def idle(self, tab):
        """Wait until nothing is being done in a tab."""
        self.until(
            lambda: (
                not any(stop.is_displayed() for stop in self.all(f"#{tab}-stop"))
                and not self.all(f"#{tab}-status progress")
            ),
            f"{tab} does not end",
        )

    def shoot(self, name):
        time.sleep(0.6)
        path = self.shots / f"{name}.png"
        self.driver.save_screenshot(str(path))
        return Image.open(path)

    def watch(self):
        """Collect the addresses that the browser asked for so far."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requests.add(message["params"]["request"]["url"])
        return self.requests


@pytest.fixture(scope="module")
def visitor(address, shots):
    """A browser on the page."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip(f"needs Chromium (found: {chromium}) and chromedriver (found: {chromedriver})")
    home = Path(tempfile.mkdtemp())
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={home / 'profile'}"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(home / "downloads")})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.get(address)
        visitor = Visitor(driver, home / "downloads", shots)
        visitor.until(lambda: len(visitor.all("#tabs button[role=tab]")) >= 5, "the page does not appear")
        time.sleep(1)
        yield visitor
    finally:
        driver.quit()
        shutil.rmtree(home, ignore_errors=True)


def test_the_page_tells_what_its_model_is(visitor):
    head = visitor.one("#about").text
    assert "embedded (pico)" in head and "million parameters" in head and "112 px" in head and "CPU" in head
    assert "Can:" in head and "Cannot: photographs" in head
    visitor.shoot("chat-empty")


def test_draw(visitor):
    from selenium.webdriver.common.keys import Keys

    visitor.tab("Generate")
    visitor.type("#generate-prompt textarea", "three yellow stars", Keys.ENTER)
    value = visitor.until(
        lambda: next((bar.get_attribute("value") for bar in visitor.all("#generate-status progress")), None),
        "no progress bar",
    )
    assert float(value) >= 0
    visitor.shoot("generate-working")
    assert "1 picture of 20 steps" in visitor.status("generate", "done")
    visitor.until(lambda: visitor.all("#generate-gallery img"), "no picture")
    visitor.idle("generate")
    assert len(visitor.shoot("generate").getcolors(2**24)) > 50


def test_edit_the_result(visitor):
    from selenium.webdriver.common.keys import Keys

    visitor.click("#generate-edit")
    visitor.until(lambda: visitor.all("#edit-source img"), "the picture did not come along")
    visitor.type("#edit-instruction textarea", "change the background to pink", Keys.ENTER)
    assert "of the pixels changed" in visitor.status("edit", "done")
    visitor.until(lambda: len(visitor.all("#edit-slider img")) >= 2, "no before and after")
    visitor.until(lambda: visitor.all("#edit-difference img"), "no difference map")
    visitor.idle("edit")
    visitor.shoot("edit")


def test_talk_draw_change_and_ask(visitor):
    from selenium.webdriver.common.keys import Keys

    visitor.tab("Chat")
    for said, pictures, words in (
        ("draw a blue car", 1, "Drawn: “a blue car”"),
        ("change the background to yellow", 2, "Changed: “change the background to yellow”"),
    ):
        visitor.type("#chat-box textarea", said, Keys.ENTER)
        visitor.until(lambda words=words: words in visitor.one("#chat").text, f"no answer to {said!r}")
        visitor.until(lambda n=pictures: len(visitor.all("#chat .bot img")) >= n, f"no picture for {said!r}")
        visitor.idle("chat")
        assert visitor.one("#chat-box textarea").get_attribute("value") == ""
    visitor.type("#chat-box textarea", "What color is the background?", Keys.ENTER)
    visitor.until(lambda: "What color is the background?" in visitor.one("#chat").text, "the question is not shown")
    visitor.idle("chat")
    last = [message.text for message in visitor.all("#chat .bot .message-content") if message.text][-1]
    assert "Changed" not in last
    visitor.shoot("chat")


def test_ask_about_an_example(visitor):
    visitor.click("#chat-new")
    visitor.until(lambda: "Drawn" not in visitor.one("#chat").text, "the conversation is still there")
    example = visitor.until(
        lambda: (
            next((e for e in visitor.all("#chat-examples button") if "What is this?" in e.text), None)
            or next((e for e in visitor.all("button") if "What is this?" in e.text), None)
        ),
        "no example",
    )
    visitor.driver.execute_script("arguments[0].click()", example)
    visitor.until(lambda: visitor.one("#chat-box textarea").get_attribute("value") == "What is this?", "not filled in")
    visitor.click("#chat-box .submit-button")
    visitor.until(lambda: visitor.all("#chat .user img"), "the picture is not shown")
    visitor.until(lambda: [m for m in visitor.all("#chat .bot .message-content") if m.text], "no answer")
    visitor.idle("chat")
    visitor.shoot("chat-picture")


def test_cancel_by_button_and_by_key(visitor):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    visitor.tab("Generate")
    before = [image.get_attribute("src") for image in visitor.all("#generate-gallery img")]
    for css, value in (("#generate-steps", "100"), ("#generate-count", "8")):
        visitor.type(f"{css} input[type=number]", value, Keys.TAB)
    for cancel in ("button", "key"):
        visitor.click("#generate-go")
        visitor.until(lambda: "of 800" in visitor.one("#generate-status").text, "no step was shown")
        if cancel == "button":
            visitor.click("#generate-stop")
        else:
            visitor.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
        visitor.until(lambda: "Cancelled" in visitor.one("#generate-status").text, f"the {cancel} does not cancel", 60)
        visitor.idle("generate")
    assert [image.get_attribute("src") for image in visitor.all("#generate-gallery img")] == before
    visitor.shoot("cancelled")


def test_errors_are_shown_kindly(visitor, tmp_path):
    from selenium.webdriver.common.keys import Keys

    visitor.type("#generate-prompt textarea", Keys.DELETE)
    visitor.click("#generate-go")
    assert visitor.status("generate", "error") == "The prompt is empty; say in words what you want."
    assert visitor.one("#generate-status .error").get_attribute("role") == "alert"
    visitor.shoot("error")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"this is no picture")
    visitor.tab("Reconstruct")
    visitor.one("#reconstruct-source input[type=file]").send_keys(str(broken))
    visitor.until(lambda: visitor.all("#reconstruct-source img"), "nothing was uploaded")
    visitor.click("#reconstruct-go")
    assert "broken.png is not an image that can be read" in visitor.status("reconstruct", "error")
    visitor.shoot("error-picture")


def test_reconstruct(visitor):
    visitor.click("#reconstruct-source button[aria-label='Remove Image'], #reconstruct-source button[title*='lear']")
    visitor.one("#reconstruct-source input[type=file]").send_keys(str(EXAMPLES / "panda.png"))
    visitor.until(lambda: visitor.all("#reconstruct-source img"), "nothing was uploaded")
    visitor.click("#reconstruct-go")
    assert "dB at 112 px" in visitor.status("reconstruct", "done")
    for name in ("seen", "again", "difference"):
        visitor.until(lambda name=name: visitor.all(f"#reconstruct-{name} img"), f"no picture {name}")
    visitor.shoot("reconstruct")


def test_the_history_is_downloaded(visitor):
    visitor.tab("History")
    visitor.until(lambda: len(visitor.all("#history-gallery img")) >= 5, "the history is not shown")
    visitor.shoot("history")
    visitor.click("#history-zip")
    (path,) = visitor.until(lambda: list(visitor.downloads.glob("*.zip")), "nothing was downloaded")
    with zipfile.ZipFile(path) as archive:
        entries = json.loads(archive.read("history.json"))["entries"]
        names = set(archive.namelist())
    assert [entry["verb"] for entry in entries] == ["generate", "edit", "generate", "edit", "ask", "ask", "reconstruct"]
    assert all(name in names for entry in entries for name in entry["files"])


def test_dark_and_light(visitor):
    visitor.tab("Edit")
    light = sum(visitor.shoot("edit-light").convert("L").resize((1, 1)).getpixel((0, 0)) for _ in range(1))
    visitor.click("#theme")
    dark = visitor.shoot("edit-dark").convert("L").resize((1, 1)).getpixel((0, 0))
    assert dark < 100 < light
    visitor.tab("Chat")
    visitor.shoot("chat-dark")
    visitor.click("#theme")


def test_a_phone_shows_everything(visitor):
    visitor.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    for name in ("Chat", "Generate", "Edit"):
        visitor.driver.execute_script("window.scrollTo(0, 0)")
        visitor.tab(name)
        width = visitor.driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert width[0] <= width[1] + 1, f"{name} is wider than a phone: {width}"
        visitor.shoot(f"phone-{name.lower()}")
    sizes = visitor.driver.execute_script(
        "return [...document.querySelectorAll('.note, textarea, .about p')].filter(e => e.offsetParent)"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert sizes and min(sizes) >= 12
    visitor.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_was_asked_of_other_hosts(visitor, address):
    asked = visitor.watch()
    assert any(url.startswith(address) for url in asked)
    foreign = [url for url in asked if not url.startswith((address, "data:", "blob:", "chrome:", "about:"))]
    assert foreign == []
    refused = [e["message"] for e in visitor.driver.get_log("browser") if "Content Security Policy" in e["message"]]
    assert refused == []
