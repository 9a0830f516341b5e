"""Open WebUI as it is installed, in headless Chromium: chats, asks about a picture, draws, edits, follows up."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.common.keys import Keys

python, picture, place = (Path(sys.argv[i]).absolute() for i in (1, 3, 4))
address = sys.argv[2]
port, patience = int(os.environ.get("OPEN_WEBUI_PORT", 28080)), 1200
place.mkdir(parents=True, exist_ok=True)
given = {
    "DATA_DIR": str(place / "data"), "WEBUI_AUTH": "False", "OFFLINE_MODE": "True", "ENABLE_OLLAMA_API": "False",
    "OPENAI_API_BASE_URL": f"{address}/v1", "OPENAI_API_KEY": "none", "WEBUI_SECRET_KEY": "s" * 32,
    "RAG_EMBEDDING_ENGINE": "openai", "ANONYMIZED_TELEMETRY": "False", "DO_NOT_TRACK": "True",
}  # fmt: skip
command = [python.parent / "open-webui", "serve", "--host", "127.0.0.1", "--port", str(port)]
process = subprocess.Popen(list(map(str, command)), env=os.environ | given, cwd=place, stdout=sys.stderr)


def until(what, condition):
    end = time.monotonic() + patience
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except Exception as error:  # not there yet
            last = error
        assert process.poll() is None, "Open WebUI ended"
        time.sleep(1)
    if driver is not None:
        driver.save_screenshot(str(place / "failed.png"))
    raise AssertionError(f"{what}: {locals().get('last')}")


driver = None
try:
    until("no answer", lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1280,900")
    for flag in (*flags, f"--user-data-dir={place / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(patience)
    driver.set_script_timeout(120)
    driver.get(f"http://127.0.0.1:{port}/")
    until("no place to write", lambda: driver.find_element("id", "chat-input"))
    for close in driver.find_elements("xpath", '//button[contains(., "Let\'s Go")]'):
        driver.execute_script("arguments[0].click()", close)

    def newest():
        """The newest answer's identity, whether it has ended, its words, and how many pictures are in it."""
        return driver.execute_script(
            "const last = [...document.querySelectorAll('.chat-assistant')].at(-1);"
            "const all = last?.closest('[id^=message-]');"
            "return last ? [all.id, all.querySelector('.copy-response-button') !== null, last.innerText.trim(), "
            "last.querySelectorAll('img').length] : ['', false, '', 0]"
        )

    def say(words, file=None):
        """Send a message; return the words of its answer, and how many pictures are in it."""
        before = newest()[0]
        if file:
            field = driver.find_element("css selector", "input[type=file][multiple]:not([accept])")
            driver.execute_script("arguments[0].hidden = false", field)
            field.send_keys(str(file))
            driver.execute_script("arguments[0].hidden = true", field)
            until("the picture is not attached", lambda: driver.find_elements("css selector", "form img"))
            time.sleep(5)
        field = until("no place to write", lambda: driver.find_element("id", "chat-input"))
        driver.execute_script("arguments[0].focus()", field)
        field.send_keys(words, Keys.ENTER)
        until("no answer that ended", lambda: newest()[0] != before and newest()[1])
        say.count = getattr(say, "count", 0) + 1
        driver.save_screenshot(str(place / f"{say.count}.png"))
        return newest()[2:]

    found = {"version": subprocess.run(
        [python, "-c", "from importlib.metadata import version; print(version('open-webui'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()}  # fmt: skip
    found["chat"] = say("hello")[0]
    found["answer"] = say("What is in the picture?", picture)[0]
    for name, words in (("drawn", "draw three yellow stars"), ("edited", "change the background to pink")):
        found[name] = say(words)[1]
        assert found[name] == 1, (name, found)
    found["follow_up"] = say("What color is the background?")[0]
    print(json.dumps(found, ensure_ascii=False))
finally:
    if driver is not None:
        driver.quit()
    process.terminate()
    process.wait(120)
