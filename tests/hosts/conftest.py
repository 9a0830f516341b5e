"""What the scripts of this folder share: a server with the embedded model, environments of their own, a report.

`make test-hosts` runs them; each installs its client from the registry. Nothing here belongs to the quick suite.
"""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "src" / "unilip" / "weights" / "examples" / "panda.png"
INSTALL_SECONDS = 900
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
OPERATORS = """import torch
kept = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    kept.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""  # torchvision asks for them at its import, and has them for CUDA's PyTorch alone
REPORT: list[str] = []


def short(value: object, most: int = 80) -> object:
    """Cut what was sent to what its kind can be told by: the beginnings of texts without pictures, two of the tools."""
    if isinstance(value, dict):
        return {name: short(one[:2] if name == "tools" else one) for name, one in value.items()}
    if isinstance(value, list):
        return [short(one) for one in value]
    return value[:most] if isinstance(value, str) and PIXEL not in value else value


class Recorder(BaseHTTPRequestHandler):
    """Passes requests on, and keeps the JSON among them, shortened, with the smallest of pictures in place of theirs.

    `make test-hosts ARGS=--record` writes them to tests/recorded_requests.json, which the quick suite sends again.
    """

    port, client, kept = 0, "", {}

    def do_POST(self):  # the name that the library gives it
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command == "POST" and "json" in self.headers.get("Content-Type", ""):
            small = re.sub(r"iVBORw0KGgo[A-Za-z0-9+/=]{40,}", PIXEL, body.decode())
            entry = {"path": self.path, "body": short(json.loads(small))}
            if entry not in self.kept.setdefault(Recorder.client, []):
                self.kept[Recorder.client].append(entry)
        onward = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        names = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        headers = {name: names.get(name.lower(), value) for name, value in self.headers.items()}
        onward.request(self.command, self.path, body or None, headers)
        answer = onward.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        while piece := answer.read1(65536):
            self.wfile.write(piece)
        self.close_connection = True

    do_GET = do_POST

    def log_message(self, *given):
        """Say nothing."""


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write down what the clients sent")


def pytest_sessionfinish(session):
    if session.config.getoption("--record", False):
        path = ROOT / "tests" / "recorded_requests.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(known | Recorder.kept, indent=1, ensure_ascii=False) + "\n")


def pytest_terminal_summary(terminalreporter):
    if REPORT:
        terminalreporter.section("real clients")
        terminalreporter.write_line("\n".join(REPORT))


@pytest.fixture(scope="session")
def server():
    """The address of `unilip serve` with its default settings."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    recorder = ThreadingHTTPServer(("127.0.0.1", 0), type("Recorder", (Recorder,), {"port": port}))
    threading.Thread(target=recorder.serve_forever, daemon=True).start()
    process = subprocess.Popen([sys.executable, "-m", "unilip", "serve", "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/ready", timeout=2)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
        yield f"http://127.0.0.1:{recorder.server_port}"
    finally:
        recorder.shutdown()
        process.terminate()
        process.wait(300)


def install(folder: Path, packages: tuple[str, ...], beside: bool = False) -> Path:
    """Make an environment with packages of the registry; return its Python. Skips where nothing can be installed.

    None at all means this program's own environment, and `beside` makes a new one that sees what is in that.
    """
    if not packages:
        return Path(sys.executable)
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        site = next(folder.glob("lib/python*/site-packages"))
        if beside:
            (site / "beside.pth").write_text("\n".join([str(ROOT / "src"), *(p for p in sys.path if "site-pack" in p)]))
        if any(name.startswith("torchvision") for name in packages):
            (site / "declared_operators.py").write_text(OPERATORS)
            (site / "operators.pth").write_text("import declared_operators")
    uv = shutil.which("uv")  # much faster, where it is at hand
    which = ["--python", python]  # each has its own place for it
    pip = [uv, "pip", "install", *which] if uv else [sys.executable, "-m", "pip", *which, "install"]
    if beside and uv:  # which sees nothing that is beside, and would bring another PyTorch
        (folder / "overrides.txt").write_text("torch; python_version < '3'\n")
        pip += ["--overrides", folder / "overrides.txt"]
    pip += ["-q", *packages]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed: {done.stderr.strip()[-200:]}")
    return python


def install_node(folder: Path, packages: tuple[str, ...]) -> str:
    """Install packages for Node beside a script; return the program that runs it."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not installed")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "package.json").write_text('{"type": "module"}')
    command = [npm, "install", "--no-audit", "--no-fund", *packages]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed: {done.stderr.strip()[-200:]}")
    return node


def run(command: list[str], name: str, folder: Path, seconds: int = 1800) -> dict[str, object]:
    """Run a client; its last line is a JSON object of what it saw, which is reported."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OPENAI_BASE_URL")}
    environment |= {"OPENAI_API_KEY": "none"}
    Recorder.client = name
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    said = json.dumps(found, ensure_ascii=False)
    REPORT.append(f"| {name} | {time.strftime('%Y-%m-%d')} | {commit.strip()} | `{re.sub(r'[|`]', ' ', said)}` |")
    return found


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Where environments are kept: UNILIP_HOSTS, to use them again, or a temporary folder."""
    kept = os.environ.get("UNILIP_HOSTS")
    return Path(kept) if kept else tmp_path_factory.mktemp("hosts")
