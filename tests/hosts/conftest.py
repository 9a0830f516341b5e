"""What the scripts of this folder share: a server with the embedded model, environments of their own, a report.

`make test-hosts` runs them; each installs its client from the registry. Nothing here belongs to the quick suite.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "src" / "unilip" / "weights" / "examples" / "panda.png"
INSTALL_SECONDS = 300
REPORT: list[str] = []


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
    process = subprocess.Popen([sys.executable, "-m", "unilip", "serve", "--port", str(port)], cwd=ROOT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/ready", timeout=2)
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(60)


def install(folder: Path, packages: tuple[str, ...]) -> Path:
    """Make an environment with packages of the registry; return its Python. Skips where nothing can be installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    if done.returncode:
        pytest.skip(f"{' '.join(packages)} cannot be installed: {done.stderr.strip().splitlines()[-1][:200]}")
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
        pytest.skip(f"{' '.join(packages)} cannot be installed: {done.stderr.strip().splitlines()[-1][:200]}")
    return node


def run(command: list[str], name: str, folder: Path, seconds: int = 300) -> dict[str, object]:
    """Run a client; its last line is a JSON object of what it saw, which is reported."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OPENAI_BASE_URL")}
    environment |= {"OPENAI_API_KEY": "none"}
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
