"""One word chooses how a model runs: what it picks by what is measured, what pictures lose, what wins over it."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unilip import UniLIP, cli, preset
from unilip.errors import UniLIPError
from unilip.fast import choose, products, quantise
from unilip.fast.quantise import DYNAMIC, QUANTIZED, is_quantised, kinds_of
from unilip.machine import PERFORMANCES
from unilip.pictures import psnr

EIGHT = dict.fromkeys(DYNAMIC, "int8_dynamic")
CPU = torch.device("cpu")
AMX = {"float32": 10.0, "bfloat16": 2.0, "int8": 4.0}
VNNI = {"float32": 10.0, "float32 oneDNN": 8.0, "bfloat16": 11.0, "int8": 3.0}
BOTH = {"float32": 10.0, "bfloat16": 5.0, "int8": 3.0}
OLD = {"float32": 10.0, "float32 oneDNN": 7.0, "float32 oneDNN packing": 1.0, "bfloat16": 40.0, "int8": 6.9}
PROMPTS = ("three yellow stars", "a red car", "two dogs", "a cat left of a ball")
QUICK: dict[str, Any] = dict(num_inference_steps=2, progress=False, output_type="pt", generator=0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Let products take given times; weights of any size count."""
    for module in (choose, products, quantise):
        monkeypatch.setattr(module, "SMALL", 0)

    def take(times: dict[str, float]) -> None:
        monkeypatch.setattr(products, "product_times", lambda *_, **__: times)

    return take


def test_what_each_word_chooses(measured: Callable[[dict[str, float]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    one, few, none = torch.float32, torch.bfloat16, dict[str, str]()
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None if name == missing else object())
    free, missing, wrong = 2**40, "", []
    monkeypatch.setattr(choose, "spare_memory", lambda: free)

    def check(word: str, wanted: tuple[Any, ...], **given: Any) -> None:
        *found, said = choose.choose(word, preset("1b"), 10**9, CPU, **given)
        if tuple(found) != wanted or word not in said:
            wrong.append((word, given, wanted, found))

    for times, speed in ((AMX, (few, none)), (VNNI, (one, EIGHT)), (BOTH, (few, EIGHT)), (OLD, (one, none))):
        measured(times)
        check("exact", (one, none, False))
        check("auto", (one, none, False))
        check("speed", (*speed, False))
        check("memory", (few, dict.fromkeys(QUANTIZED, "int8"), True))
    measured(VNNI)
    check("speed", (few, EIGHT, False), dtype=few)
    check("speed", (one, {"mllm": "int4"}, True), quantization={"mllm": "int4"}, low_memory=True)
    check("memory", (one, none, False), dtype=one, quantization={}, low_memory=False)
    missing = "torchao"
    check("speed", (one, none, False))
    check("memory", (few, none, True))
    free = 4 * 10**9
    check("auto", (one, none, True))
    check("auto", (one, none, False), low_memory=False)
    check("auto", (few, none, False), dtype=few)  # which fits
    check("speed", (one, none, False))
    assert not wrong, "\n".join(map(str, wrong))
    measured({name: ms for name, ms in VNNI.items() if name != "bfloat16"})  # of a build that cannot
    check("speed", (one, none, False))
    assert not wrong and "bfloat16" not in choose.choose("speed", preset("1b"), 1, CPU)[-1]


def test_small_products_are_not_slowed_down() -> None:
    pytest.importorskip("torchao")
    layers = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.Linear(512, 1024))
    quantise.quantise(layers, "int8_dynamic")
    assert [is_quantised(layer) for layer in layers] == [False, True]
    x = torch.randn(64, 512)
    plain = torch.nn.Linear(512, 1024)
    few = torch.nn.Linear(512, 1024)
    few.load_state_dict(plain.state_dict())
    quantise.quantise(few, "int8_dynamic")
    assert 1e-4 < float((few(x) - plain(x)).norm() / plain(x).norm()) < 0.02


def test_every_part_has_its_kind(tiny_folder: Path, tiny_model: UniLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantise, "SMALL", 0)
    assert kinds_of("int8_dynamic") == {"encoder": "int8", "mllm": "int8"} | EIGHT
    assert kinds_of(None) == kinds_of("none") == kinds_of({}) == {}
    assert kinds_of("dit=int8, mllm = fp8") == {"dit": "int8", "mllm": "fp8"}
    for wrong in (
        "",
        "int3",
        "dit",
        "dit=",
        "=int8",
        "dit=int8,",
        "dit=int8,int8",
        "eye=int8",
        {"dit": 3},
        {3: "int8"},
    ):
        with pytest.raises(UniLIPError):
            kinds_of(wrong)
            pytest.fail(str(wrong))
    exact = tiny_model.generate("a red star", **QUICK | {"output_type": "latent"}).images
    most = {"dit": 0.04, "connector": 0.01, "mllm": 0.02}  # relative distances of latents, by which part is quantised
    distances = {}
    for part in most:
        model = UniLIP.from_pretrained(tiny_folder, quantization={part: "int8_dynamic"})
        assert [name for name in QUANTIZED if is_quantised(model.get_submodule(name))] == [part]
        near = model.generate("a red star", **QUICK | {"output_type": "latent"}).images
        distances[part] = float((near - exact).norm() / exact.norm())
    assert {part: d for part, d in distances.items() if not 1e-6 < d < most[part]} == {}, distances


def state(model: UniLIP) -> tuple[Any, ...]:
    """What a choice shows in a model."""
    kinds = sorted(part for part in QUANTIZED if is_quantised(model.get_submodule(part)))
    runtime = model.runtime
    return model.dtype, kinds, runtime.offload is not None, runtime.strips > 1, runtime.products is not None


def test_loaded_models_are_run_so(
    tiny_folder: Path, tiny_model: UniLIP, measured: Callable[[dict[str, float]], None],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    pytest.importorskip("torchao")
    measured(BOTH)
    one, few, exact = torch.float32, torch.bfloat16, tiny_model.generate("a star", **QUICK).images
    eight = ["connector", "dit"]
    cases: list[tuple[dict[str, Any], tuple[Any, ...], float]] = [
        ({}, (one, [], False, False, True), 100),
        ({"performance": "exact"}, (one, [], False, False, True), 100),
        ({"performance": "auto"}, (one, [], False, False, True), 100),
        ({"performance": "speed"}, (few, eight, False, False, True), 20),
        ({"performance": "speed", "dtype": "float32"}, (one, eight, False, False, True), 20),
        ({"performance": "speed", "quantization": "none"}, (few, [], False, False, True), 30),
        ({"performance": "memory"}, (few, [], True, True, False), 20),
        (
            {"performance": "memory", "low_memory": False, "dtype": "float32", "quantization": "none"},
            (one, [], False, False, False), 100,
        ),
    ]  # fmt: skip
    wrong = []
    for options, wanted, decibels in cases:
        caplog.clear()
        with caplog.at_level(logging.INFO, "unilip"):
            model = UniLIP.from_pretrained(tiny_folder, **options)
        lines = [record.getMessage() for record in caplog.records if "performance" in record.getMessage()]
        away = float(psnr(model.generate("a star", **QUICK).images.float(), exact).mean())
        said = options.get("performance", "exact") == "exact" or (lines and options["performance"] in lines[0])
        if state(model) != wanted or away < decibels or len(lines) > 1 or not said:
            wrong.append((options, state(model), away, lines))
    assert not wrong, "\n".join(map(str, wrong))
    for word in ("fast", 3, None, ""):
        with pytest.raises(UniLIPError, match="exact, auto, speed, memory"):
            UniLIP.from_pretrained("nowhere", performance=word)
    UniLIP.from_pretrained(tiny_folder, quantization="int8").save_pretrained(tiny_folder.parent / "few")
    model = UniLIP.from_pretrained(tiny_folder.parent / "few", performance="speed")  # has its few bits already
    assert model.generate("a star", **QUICK).images.isfinite().all()


def test_auto_keeps_its_promise(measured: Callable[[dict[str, float]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(word: str) -> Tensor:
        model = UniLIP.from_pretrained(performance=word)
        settings: dict[str, Any] = dict(num_inference_steps=10, generator=[0, 1, 2, 3], progress=False)
        images: Tensor = model.generate(list(PROMPTS), output_type="pt", **settings).images
        assert (model.runtime.offload is not None) == (word == "auto" and free == 0)
        return images

    free = 2**40
    exact = draw("exact")
    measured(OLD)  # so that all weights are packed
    away = psnr(draw("auto"), exact)
    monkeypatch.setattr(choose, "spare_memory", lambda: free)
    free = 0
    away = torch.cat([away, psnr(draw("auto"), exact)])
    assert float(away.min()) > choose.DECIBELS, away


def test_words_and_options_of_the_command_line(
    tiny_folder: Path, tmp_path: Path, measured: Callable[[dict[str, float]], None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    measured(AMX)
    monkeypatch.chdir(tmp_path)
    load, loaded = UniLIP.from_pretrained, list[dict[str, Any]]()
    spy = staticmethod(lambda *given, **options: (loaded.append(options), load(*given, **options))[1])
    monkeypatch.setattr(UniLIP, "from_pretrained", spy)

    def run(*words: str, model: Path = tiny_folder) -> tuple[int, dict[str, Any], str]:
        given = ["generate", "a star", "--model", str(model), "--steps", "1", "--json", *words]
        code = cli.main(given)
        out, err = capsys.readouterr()
        return code, json.loads(out) if code == 0 else {}, err

    for word, dtype in zip(PERFORMANCES, ("float32", "float32", "bfloat16", "bfloat16"), strict=True):
        code, report, err = run("--performance", word)
        assert (code, report["dtype"], loaded[-1]["performance"]) == (0, dtype, word)
        assert (f"performance {word}: {dtype}" in err) == (word != "exact")
    assert run("--performance", "speed", "--dtype", "float32")[1]["dtype"] == "float32"
    assert run()[1]["dtype"] == "float32"
    count = len(loaded)
    for wrong in (("--performance", "fast"), ("--performance",)):
        assert run(*wrong)[0] == 2
    assert len(loaded) == count
    assert run("--quantize", "eye=int8")[0] == 2 and run("--quantize", "int3")[0] == 2

    mute = shutil.copytree(tiny_folder, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    count = len(loaded)
    code, _, err = run(model=mute)
    assert code == 2 and "no tokenizer" in err and len(loaded) == count  # told before anything is loaded
