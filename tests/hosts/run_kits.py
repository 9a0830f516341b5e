"""Programs that bring this package in, or bring it people: evaluation kits, transformers, ComfyUI, Open WebUI.

ComfyUI and VLMEvalKit are in no registry: UNILIP_COMFYUI and UNILIP_VLMEVALKIT name checkouts of them. Open WebUI needs
selenium, chromium and chromedriver beside.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest

from conftest import PICTURE, ROOT, install, run

pytestmark = pytest.mark.hosts
KITS = Path(__file__).parent / "kits"
LMMS = ("lmms-eval", "loguru", "pytablewriter", "dataproperty", "tabledata", "pathvalidate", "typepy", "mbstrdecoder",
        "tcolorpy", "chardet", "evaluate", "sacrebleu", "portalocker", "tabulate", "lxml", "colorama", "jsonlines",
        "tenacity", "pytz")  # fmt: skip
COMFYUI = ("torchsde", "trampoline", "torchvision==0.28.0", "einops", "scipy", "av", "kornia", "kornia-rs", "spandrel",
           "comfy-kitchen", "alembic", "mako", "sqlalchemy", "greenlet", "pydantic-settings", "python-dotenv",
           "sentencepiece", "psutil", "markupsafe")  # fmt: skip


def checkout(name: str) -> Path:
    """The checkout that a variable of the environment names."""
    found = Path(os.environ.get(name, ""))
    if not os.environ.get(name) or not found.is_dir():
        pytest.skip(f"{name} names no checkout")
    return found.resolve()


def beside(place: Path, packages: tuple[str, ...]) -> Path:
    """An environment with these packages and no others of theirs, over what this program runs on."""
    return install(place, ("--no-deps", *packages), beside=True)


def test_lmms_eval(place, tmp_path):
    python = beside(place / "lmms-eval", LMMS)
    found = run([python, KITS / "lmms_task.py", PICTURE, tmp_path], "lmms-eval", tmp_path)
    assert "panda" in found["answer"][0] and found["right"] > 0


def test_transformers(place, tmp_path):
    python = beside(place / "transformers", ("torchvision==0.28.0",))
    found = run([python, KITS / "transformers_export.py", PICTURE, tmp_path], "transformers", tmp_path)
    assert "panda" in found["answer"][0] and not found["differing"]


def test_vlmevalkit(place, tmp_path):
    kit = checkout("UNILIP_VLMEVALKIT")
    beside(place / "vlmevalkit", ("torchvision==0.28.0",))
    needed = ("-r", str(kit / "requirements.txt"), "rouge-score")  # which it imports and does not name
    python = install(place / "vlmevalkit", needed, beside=True)
    found = run([python, KITS / "vlmevalkit_task.py", PICTURE, tmp_path], "VLMEvalKit", kit)
    assert len(found["answer"]) == 3 and round(found["right"], 3) == 0.667, found


def test_comfyui(place, tmp_path):
    kit, pack = checkout("UNILIP_COMFYUI"), ROOT / "integrations" / "comfyui"
    python = beside(place / "comfyui", COMFYUI)
    found = run([python, KITS / "comfyui_workflow.py", kit, pack, tmp_path], "ComfyUI", tmp_path)
    assert found["nodes"] == 5 and "pink" in str(found["answer"]) and found["cancelled_at"] < found["steps"], found


def test_open_webui(server, place, tmp_path):
    pytest.importorskip("selenium", reason="selenium is not installed")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("needs chromium and chromedriver")
    python = install(place / "open-webui", ("open-webui",), beside=True)
    found = run([sys.executable, KITS / "open_webui.py", python, server, PICTURE, tmp_path], "Open WebUI", tmp_path)
    assert "panda" in found["answer"] and "pink" in found["follow_up"]
