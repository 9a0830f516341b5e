"""The ComfyUI nodes, without ComfyUI: loaded and fed as it does it, and run over the example workflow."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from unilip.errors import UniLIPError

PACK = Path(__file__).resolve().parents[1] / "integrations" / "comfyui"
WORKFLOW = json.loads((PACK / "workflows" / "draw-edit-ask.json").read_text(encoding="utf-8"))
DRAW = {"seed": 3, "steps": 2, "guidance_scale": 0.0, "solver": "model's own", "count": 1}


@pytest.fixture(scope="module")
def pack():
    spec = importlib.util.spec_from_file_location(
        "custom_nodes_unilip", PACK / "__init__.py", submodule_search_locations=[str(PACK)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [name for name in sys.modules if name.startswith(spec.name)]:
        del sys.modules[name]


@pytest.fixture
def node(pack):
    """Call a node as ComfyUI does: a fresh object, the function it names, inputs by name."""

    def call(name, **inputs):
        made = pack.NODE_CLASS_MAPPINGS[name]()
        result = getattr(made, made.FUNCTION)(**inputs)
        return result["result"] if isinstance(result, dict) else result

    return call


class Cancelled(Exception):
    pass


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """Stand-ins for what the nodes use of ComfyUI; `.bars` is what its progress bars were told."""
    seen = SimpleNamespace(bars=[], cancel_after=None, models=tmp_path, loaded=[])

    class ModelPatcher:
        def __init__(self, model, load_device, offload_device):
            assert model.device == offload_device == torch.device("cpu")
            model.device = load_device  # as ComfyUI writes down where a model is
            self.model = model

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update_absolute(self, value, total=None):
            seen.bars.append((value, total))

    def interrupted():
        if seen.cancel_after is not None and len(seen.bars) >= seen.cancel_after:
            raise Cancelled

    modules = {
        "folder_paths": {"models_dir": str(tmp_path)},
        "comfy": {"__path__": []},
        "comfy.utils": {"ProgressBar": ProgressBar},
        "comfy.model_management": {
            "throw_exception_if_processing_interrupted": interrupted,
            "get_torch_device": lambda: torch.device("cpu"),
            "load_models_gpu": lambda models, force_full_load: seen.loaded.append((models[0].model, force_full_load)),
        },
        "comfy.model_patcher": {"ModelPatcher": ModelPatcher},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.fixture
def image(picture):
    """An IMAGE (2,40,60,3)."""
    arrays = [np.asarray(picture(60, 40, seed), dtype=np.float32) / 255 for seed in (0, 1)]
    return torch.from_numpy(np.stack(arrays))


def test_every_node_is_declared_as_comfyui_wants_it(pack):
    assert set(pack.NODE_DISPLAY_NAME_MAPPINGS) == set(pack.NODE_CLASS_MAPPINGS)
    for name, kind in pack.NODE_CLASS_MAPPINGS.items():
        inputs = kind.INPUT_TYPES()
        assert set(inputs) <= {"required", "optional"}, name
        assert len(kind.RETURN_TYPES) == len(kind.RETURN_NAMES)
        assert kind.CATEGORY == "UniLIP" and kind.DESCRIPTION
        function = getattr(kind, kind.FUNCTION)
        taken = function.__code__.co_varnames[1 : function.__code__.co_argcount]
        assert set(taken) == {key for group in inputs.values() for key in group}, name
        for key, spec in (item for group in inputs.values() for item in group.items()):
            assert isinstance(spec, tuple) and isinstance(spec[0], (str, list)), key


def check_workflow(workflow, nodes):
    """Return what is wrong with a workflow in ComfyUI's API format."""
    wrong = []
    for key, step in workflow.items():
        if step["class_type"] not in nodes:
            continue  # one of ComfyUI's own
        inputs = nodes[step["class_type"]].INPUT_TYPES()
        known = {name: spec for group in inputs.values() for name, spec in group.items()}
        wrong += [f"{key}: no {name}" for name in inputs["required"] if name not in step["inputs"]]
        for name, value in step["inputs"].items():
            if name not in known:
                wrong.append(f"{key}: unknown {name}")
            elif isinstance(value, list) and workflow[value[0]]["class_type"] in nodes:
                source = nodes[workflow[value[0]]["class_type"]]
                if source.RETURN_TYPES[value[1]] != known[name][0]:
                    wrong.append(f"{key}: {name} is a {known[name][0]}")
            elif isinstance(known[name][0], list) and value not in known[name][0]:
                wrong.append(f"{key}: {name} cannot be {value}")
    return wrong


def test_the_example_workflow_fits_the_nodes(pack):
    assert check_workflow(WORKFLOW, pack.NODE_CLASS_MAPPINGS) == []
    broken = json.loads(json.dumps(WORKFLOW))
    broken["2"]["inputs"] |= {"solver": "magic", "colour": 1}
    broken["4"]["inputs"]["image"] = ["1", 0]
    assert len(check_workflow(broken, pack.NODE_CLASS_MAPPINGS)) == 3


def test_the_example_workflow_runs(pack, node, comfy, tiny_folder):
    (comfy.models / "unilip").mkdir()
    (comfy.models / "unilip" / "embedded-tiny").symlink_to(tiny_folder)
    results = {}
    for key, step in WORKFLOW.items():
        if step["class_type"] not in pack.NODE_CLASS_MAPPINGS:
            continue
        inputs = {k: results[v[0]][v[1]] if isinstance(v, list) else v for k, v in step["inputs"].items()}
        if step["class_type"] == "UniLIPLoad":
            inputs["model"] = "embedded-tiny"
        if "steps" in inputs:
            inputs["steps"] = 2
        results[key] = node(step["class_type"], **inputs)
    assert results["2"][0].shape == results["3"][0].shape == results["5"][0].shape == (2, 56, 56, 3)
    assert isinstance(results["4"][0], str)
    assert 0 < results["5"][1] < 60


def test_loading_offers_the_folders_of_comfyui(pack, node, comfy, tiny_folder):
    (comfy.models / "unilip").mkdir()
    (comfy.models / "unilip" / "mine").symlink_to(tiny_folder)
    (comfy.models / "unilip" / "notes.txt").write_text("no model")
    offered = pack.NODE_CLASS_MAPPINGS["UniLIPLoad"].INPUT_TYPES()["required"]["model"][0]
    assert offered == ["embedded", "mine", "kanashi6/UniLIP-1B", "kanashi6/UniLIP-3B"]
    (model,) = node("UniLIPLoad", model="mine", device="auto", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"


@pytest.mark.parametrize("name", ["../mine", "/etc", "nobody/nothing", ""])
def test_a_workflow_cannot_name_other_paths(node, comfy, name):
    with pytest.raises(UniLIPError, match="models/unilip"):
        node("UniLIPLoad", model=name, device="cpu", dtype="float32")


def test_generate_draws_what_the_model_draws(node, tiny_model):
    (made,) = node("UniLIPGenerate", model=tiny_model, prompt="stars", **(DRAW | {"count": 2}))
    for i in range(2):
        alone = tiny_model.generate(
            "stars", num_inference_steps=2, generator=torch.Generator().manual_seed(3 + i), output_type="np"
        )
        assert np.allclose(made[i].numpy(), alone.images[0], atol=1e-4)
    assert made.dtype == torch.float32 and made.min() >= 0 and made.max() <= 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 4}, {"steps": 3}, {"guidance_scale": 9.0}, {"solver": "euler"}, {"negative_prompt": "a dog"}],
    ids=str,
)
def test_every_input_of_generate_counts(node, tiny_model, change):
    plain = {"model": tiny_model, "prompt": "stars", **DRAW}
    assert not torch.equal(node("UniLIPGenerate", **plain)[0], node("UniLIPGenerate", **(plain | change))[0])


def test_edit_takes_a_batch(node, tiny_model, image):
    inputs = {"model": tiny_model, "image": image, "instruction": "make it red", **(DRAW | {"count": 2})}
    inputs["keep_aspect"] = False
    (made,) = node("UniLIPEdit", **inputs, fit="resize")
    assert made.shape == (4, 56, 56, 3)
    assert not torch.allclose(made[0], made[2], atol=1e-3)
    assert not torch.equal(made, node("UniLIPEdit", **inputs, fit="pad")[0])


def test_a_second_image_helps_with_each(node, tiny_model, image):
    inputs = {"model": tiny_model, "image": image, "instruction": "make it red", "fit": "resize", **DRAW, "count": 2}
    (made,) = node("UniLIPEdit", **inputs, image2=image[:1], keep_aspect=False)
    assert made.shape == (4, 56, 56, 3)
    sources = [(one * 255).round().byte().numpy() for one in (image[1], image[0])]
    alone = tiny_model.edit(
        sources, "make it red", joint=True, num_inference_steps=2, generator=[5, 6], num_images_per_prompt=2
    )
    for one, other in zip(made[2:], alone, strict=True):
        assert ((one * 255) - torch.from_numpy(np.array(other))).abs().max() <= 1


def test_ask_answers_with_and_without_a_picture(pack, node, tiny_model, image):
    inputs = {"model": tiny_model, "question": "What is this?", "max_new_tokens": 4, "temperature": 0.0, "seed": 0}
    assert node("UniLIPAsk", **inputs, image=image)[0] == tiny_model.ask(
        [(one * 255).round().byte().numpy() for one in image], "What is this?", max_new_tokens=4
    )
    assert node("UniLIPAsk", **inputs)[0] == tiny_model.ask(None, "What is this?", max_new_tokens=4)
    warm = inputs | {"temperature": 2.0, "max_new_tokens": 16}
    assert node("UniLIPAsk", **warm) != node("UniLIPAsk", **(warm | {"seed": 1}))
    shown = pack.NODE_CLASS_MAPPINGS["UniLIPAsk"]().ask(**inputs)
    assert shown["ui"]["text"] == list(shown["result"])


def test_the_workflow_shows_what_it_finds():
    """ComfyUI draws the text of its own PreviewAny on the page, and that of no other node."""
    shown = [step["inputs"]["source"] for step in WORKFLOW.values() if step["class_type"] == "PreviewAny"]
    kinds = [(WORKFLOW[key]["class_type"], output) for key, output in shown]
    assert kinds == [("UniLIPAsk", 0), ("UniLIPReconstruct", 1)]


def test_edits_keep_the_shape_of_their_source(node, tiny_model, image):
    inputs = {"model": tiny_model, "image": image, "instruction": "make it red", **DRAW, "fit": "resize"}
    assert node("UniLIPEdit", **inputs)[0].shape == (2, 37, 56, 3)
    assert node("UniLIPEdit", **inputs, keep_aspect=False)[0].shape == (2, 56, 56, 3)


def test_an_answer_moves_the_bar_and_can_be_cancelled(node, comfy, tiny_model):
    inputs = {"model": tiny_model, "question": "What is this?", "max_new_tokens": 16, "temperature": 2.0, "seed": 1}
    node("UniLIPAsk", **inputs)
    assert comfy.bars == [(i + 1, 16) for i in range(len(comfy.bars))] and len(comfy.bars) > 3
    comfy.bars.clear()
    comfy.cancel_after = 2
    with pytest.raises(Cancelled):
        node("UniLIPAsk", **inputs)
    assert len(comfy.bars) == 2


def test_comfyui_moves_the_model(node, comfy, tiny_folder, image):
    (comfy.models / "unilip").mkdir()
    (comfy.models / "unilip" / "mine").symlink_to(tiny_folder)
    (model,) = node("UniLIPLoad", model="mine", device="auto", dtype="float32")
    assert comfy.loaded == [], "it waits on the CPU"
    node("UniLIPGenerate", model=model, prompt="stars", **DRAW)
    node("UniLIPReconstruct", model=model, image=image, fit="pad")
    assert [(held.model is model, whole) for held, whole in comfy.loaded] == [(True, True)] * 2
    assert not [name for name in model.state_dict() if "patcher" in name]
    with pytest.raises(UniLIPError, match="no CUDA device"):
        node("UniLIPLoad", model="mine", device="cuda", dtype="float32")


def test_a_lora_is_loaded_with_its_strength(pack, node, comfy, tiny_folder):
    from unilip import UniLIP
    from unilip.adapters import adapter_scale, library

    peft = library()
    (comfy.models / "loras").mkdir()
    (comfy.models / "unilip").mkdir()
    (comfy.models / "unilip" / "mine").symlink_to(tiny_folder)
    config = peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    peft.get_peft_model(UniLIP.from_pretrained(tiny_folder), config).save_pretrained(comfy.models / "loras" / "red")
    inputs = pack.NODE_CLASS_MAPPINGS["UniLIPLoad"].INPUT_TYPES()
    assert inputs["optional"]["lora"][0] == ["none", "red"] and "red" not in inputs["required"]["model"][0]
    common = {"model": "mine", "device": "cpu", "dtype": "float32"}
    (model,) = node("UniLIPLoad", **common, lora="red", lora_strength=0.5)
    assert adapter_scale(model, "lora") == pytest.approx(0.5)
    with pytest.raises(UniLIPError, match="models/loras"):
        node("UniLIPLoad", **common, lora="../red")


def test_comfyui_does_not_wait_for_the_model_s_code(tmp_path):
    program = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('pack', sys.argv[1] + '/__init__.py', "
        "submodule_search_locations=[sys.argv[1]]); m = u.module_from_spec(s); sys.modules['pack'] = m; "
        "s.loader.exec_module(m); m.NODE_CLASS_MAPPINGS['UniLIPLoad'].INPUT_TYPES(); "
        "print([n for n in sys.modules if n in ('unilip.model', 'transformers', 'diffusers', 'tokenizers', 'peft')])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(PACK)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reconstruct_tells_the_psnr(node, tiny_model, image):
    from skimage.metrics import peak_signal_noise_ratio

    from unilip.pictures import fit_square, load_image

    made, psnr = node("UniLIPReconstruct", model=tiny_model, image=image, fit="crop")
    seen = [np.asarray(fit_square(load_image(one.numpy()), 56, "crop")) / 255 for one in image]
    wanted = [
        peak_signal_noise_ratio(a, b.numpy().astype(float), data_range=1) for a, b in zip(seen, made, strict=True)
    ]
    assert psnr == pytest.approx(np.mean(wanted), abs=1e-3)
    half = node("UniLIPReconstruct", model=tiny_model, image=image.bfloat16(), fit="resize")[0]
    assert half.dtype == torch.float32 and len(half) == len(image)


def test_pictures_of_any_shape(node, tiny_model):
    wide = torch.rand(2, 60, 120, 3)
    made = node("UniLIPGenerate", model=tiny_model, prompt="stars", **DRAW, width=84, height=56)[0]
    assert made.shape[1:] == (56, 84, 3)
    edit = dict(model=tiny_model, image=wide, instruction="red", fit="resize")
    assert node("UniLIPEdit", **edit, **DRAW)[0].shape[1:] == (28, 56, 3)
    assert node("UniLIPEdit", **edit, **DRAW, width=56, height=56)[0].shape[1:] == (56, 56, 3)
    made, psnr = node("UniLIPReconstruct", model=tiny_model, image=wide, fit="resize", height=56)
    assert made.shape == (2, 56, 112, 3) and psnr > 0


def test_the_bar_moves_and_cancel_stops(node, comfy, tiny_model):
    node("UniLIPGenerate", model=tiny_model, prompt="stars", **(DRAW | {"steps": 3}))
    assert comfy.bars == [(1, 3), (2, 3), (3, 3)]
    comfy.bars.clear()
    comfy.cancel_after = 2
    with pytest.raises(Cancelled):
        node("UniLIPGenerate", model=tiny_model, prompt="stars", **(DRAW | {"steps": 9}))
    assert len(comfy.bars) == 2


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("UniLIPGenerate", {"prompt": " ", **DRAW}, "is empty"),
        ("UniLIPEdit", {"image": torch.zeros(4, 4), "instruction": "x", "fit": "pad", **DRAW}, r"\(B,H,W,3\)"),
        ("UniLIPEdit", {"image": torch.zeros(1, 4, 4, 3), "instruction": "x", "fit": "melt", **DRAW}, "melt"),
        ("UniLIPEdit", {"image": torch.zeros(0, 4, 4, 3), "instruction": "x", "fit": "pad", **DRAW}, r"not \(0,"),
        ("UniLIPReconstruct", {"image": torch.zeros(0, 4, 4, 3), "fit": "pad"}, r"not \(0,"),
    ],
    ids=["empty", "shape", "fit", "none to edit", "none to reconstruct"],
)
def test_bad_input_is_explained(node, tiny_model, name, inputs, message):
    with pytest.raises(UniLIPError, match=message):
        node(name, model=tiny_model, **inputs)
