"""Adapters: trained in place of weights, kept in peft's format, loaded, weighed, stacked, merged, taken off."""

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import unilip.emoji.tokenizer
from unilip import UniLIP, adapters, cli
from unilip.adapters import INNER, WEIGHTS, adapted_layers, adapter_names, adapter_scale, unload_adapters
from unilip.checkpoints.hub import Adapted, adapted
from unilip.errors import CheckpointError, ConfigError, UniLIPError
from unilip.eval.runs import model_hash
from unilip.info import describe
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.adapters import add_adapter, is_adapter, save_adapter, target_layers
from unilip.train.build import trained_parameters
from unilip.train.loop import train

peft = pytest.importorskip("peft")
LORA = ("adapter.rank=2", "trains=connector,dit:0.5", "adapter.targets=to_q,to_v,q_proj")


def recipe(*settings, name="tiny/sft"):
    return override(get_recipe(name), [*LORA, *settings])


def touched(model, *settings, seed=0):
    """Give a model an adapter that changes what it does, as after training."""
    one = recipe(f"seed={seed}", *settings)
    add_adapter(one, model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def folders(fresh_model, tmp_path_factory):
    """Three adapters of the same model: two LoRAs and a DoRA."""
    place = tmp_path_factory.mktemp("adapters")
    for name, settings in {"red": ("seed=1",), "blue": ("seed=2",), "dora": ("adapter.dora=1",)}.items():
        save_adapter(touched(fresh_model(), *settings, seed=len(name)), place / name)
    return place


def latent(model):
    """What the model draws; the same model, the same numbers."""
    with torch.no_grad():
        return model.generate(
            "a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
            progress=False,
        ).images  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------


def test_only_the_adapter_trains_and_starts_from_nothing(fresh_model):
    model = fresh_model()
    before = latent(model)
    one = recipe()
    layers = target_layers(one, model)
    assert {name.split(".")[-1] for name in layers} == {"to_q", "to_v", "q_proj"}
    assert {name.split(".")[0] for name in layers} == {"connector", "dit"}, "not the LLM, whose layers also have q_proj"
    add_adapter(one, model)
    trained = trained_parameters(one, model)
    assert len(trained) == 2 * len(layers) and all(is_adapter(name) for name in trained)
    assert {factor for name, (_, factor) in trained.items() if name.startswith("dit")} == {0.5}
    assert torch.equal(latent(model), before), "an adapter that has learned nothing changes nothing"
    again = fresh_model()
    add_adapter(one, again)
    assert all(torch.equal(p, trained_parameters(one, again)[name][0]) for name, (p, _) in trained.items())


def test_all_linear_layers_but_the_language_head_by_default(fresh_model):
    model = fresh_model()
    names = target_layers(recipe("adapter.targets=", "trains=mllm,connector"), model)
    assert any(name.endswith("gate_proj") for name in names) and "connector.to_dit" in names
    assert "mllm.language_model.lm_head" not in names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("adapter.targets=to_nothing",), "no linear layer is called to_nothing"),
        (("trains=mllm.queries,connector", "adapter.targets="), r"trains names mllm.queries"),
        (("adapter.rank=0",), "adapter.rank is 0"),
    ],
)
def test_an_adapter_without_a_place_is_refused(fresh_model, settings, message):
    with pytest.raises(ConfigError, match=message):
        target_layers(recipe(*settings), fresh_model())


@pytest.mark.parametrize("dora", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_leaves_an_adapter_and_resumes_bit_for_bit(fresh_model, tmp_path, monkeypatch, dora, picture):
    make = unilip.emoji.tokenizer.train_tokenizer
    monkeypatch.setattr(unilip.emoji.tokenizer, "train_tokenizer", lambda *a: make(*a, sentences=300))
    base = fresh_model()
    base.save_pretrained(tmp_path / "base")
    settings = (
        f"init=all={tmp_path / 'base'}", f"adapter.dora={dora}", "steps=3", "save_every=1", "sample_every=9",
        "log_every=1", "batch_size=2",
    )  # fmt: skip
    whole = train(recipe("name=a/whole", *settings), tmp_path, progress=False)
    train(recipe("name=a/parts", *settings), tmp_path, progress=False, stop_after=1)
    parts = train(recipe("name=a/parts", *settings), tmp_path, progress=False)
    assert {p.name for p in whole.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "recipe.json"}
    assert (whole / "adapter_model.safetensors").read_bytes() == (parts / "adapter_model.safetensors").read_bytes()
    kept = load_file(tmp_path / "a" / "whole" / "step_00000003" / "weights.safetensors")
    assert all(is_adapter(name) for name in kept), "checkpoints hold the adapter alone"
    before = latent(base)
    assert base.load_adapter(whole) == "whole"
    assert not torch.equal(latent(base), before)
    base.unload_adapters()
    assert torch.equal(latent(base), before)


# --- at inference -----------------------------------------------------------------------------------------------------


def test_the_format_is_pefts_own(fresh_model, folders):
    """Read back by peft itself, without a line of ours, the adapter does the same; and ours reads what peft writes."""
    ours = fresh_model()
    ours.load_adapter(folders / "red")
    theirs = fresh_model()
    wrapped = peft.PeftModel.from_pretrained(theirs, str(folders / "red"))
    torch.testing.assert_close(latent(ours), latent(theirs), atol=1e-5, rtol=1e-5)
    wrapped.save_pretrained(str(folders / "written"))
    again = fresh_model()
    again.load_adapter(folders / "written")
    assert torch.equal(latent(ours), latent(again))
    shutil.rmtree(folders / "written")


@pytest.mark.parametrize("name", ["red", "dora"])
def test_loaded_scaled_merged(fresh_model, folders, name, tmp_path):
    plain, model = fresh_model(), fresh_model()
    before = latent(plain)
    assert model.load_adapter(folders / name) == name and adapter_names(model) == [name]
    full = latent(model)
    assert (full - before).abs().max() > 1e-3
    model.set_adapters({})
    assert torch.equal(latent(model), before)
    model.set_adapters({name: 1.0})
    torch.testing.assert_close(latent(model), full)
    model.merge_adapters()
    assert not list(adapted_layers(model)) and model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(latent(model), full, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(latent(UniLIP.from_pretrained(tmp_path / "merged")), full, atol=1e-4, rtol=1e-4)


def test_scales_are_shares_of_the_update(fresh_model, folders):
    weights = []
    for scale in (0.0, 0.5, 1.0):
        model = fresh_model()
        model.load_adapter(folders / "red", scale=scale)
        assert adapter_scale(model, "red") == pytest.approx(scale)
        name = next(name for name, _ in adapted_layers(model))
        model.merge_adapters()
        weights.append(model.get_submodule(name).weight.detach())
    torch.testing.assert_close(weights[1], (weights[0] + weights[2]) / 2)
    assert not torch.equal(weights[0], weights[2])


def test_stacked_adapters_add_up(fresh_model, folders):
    both = fresh_model()
    both.load_adapter(folders / "red", scale=0.5)
    both.load_adapter(folders / "blue")
    assert adapter_names(both) == ["blue", "red"] and adapter_scale(both, "red") == pytest.approx(0.5)
    name, layer = next(adapted_layers(both))
    base = layer.base_layer.weight.detach()
    wanted = base + layer.get_delta_weight(INNER + "red") + layer.get_delta_weight(INNER + "blue")  # scaled already
    drawn = latent(both)
    both.merge_adapters()
    torch.testing.assert_close(both.get_submodule(name).weight.detach(), wanted.detach())
    torch.testing.assert_close(latent(both), drawn, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused(fresh_model, folders, tmp_path):
    model = fresh_model()
    before = model.state_dict().keys()
    with pytest.raises(CheckpointError, match="is no adapter"):
        model.load_adapter(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folders / "red", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    pair = sorted(tensors)[:2]
    for change, message in (
        ({name: tensors[name][:, :-1].contiguous()}, "does not fit the model"),
        (
            {k: None for k in pair} | {k.replace("connector", "collector"): tensors[k] for k in pair},
            "not fit the model",
        ),
        ({name: None}, "is not whole"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, broken / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            model.load_adapter(broken)
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="is damaged"):
        model.load_adapter(broken)
    config = json.loads((folders / "red" / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    shutil.copy(folders / "red" / "adapter_model.safetensors", broken)
    with pytest.raises(CheckpointError, match="of the kind IA3"):
        model.load_adapter(broken)
    assert model.state_dict().keys() == before, "nothing of them is left in the model"
    model.load_adapter(folders / "red")
    with pytest.raises(UniLIPError, match="loaded already"):
        model.load_adapter(folders / "red")
    with pytest.raises(UniLIPError, match="There is no adapter green; loaded: red"):
        model.set_adapters({"green": 1.0})


def variant(folder, target, tensors=None, **changes):
    """A copy of an adapter with other settings (None drops one) and tensors."""
    shutil.copytree(folder, target)
    settings = json.loads((target / "adapter_config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value is not None or key not in changes}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    if tensors is not None:
        save_file(tensors, target / "adapter_model.safetensors")
    return target


def test_the_base_is_known_again(fresh_model, folders, tiny_folder, tmp_path, caplog):
    """By its weights, in any type, however they are read; another of the same shapes is refused, one changed told."""
    caplog.set_level(logging.INFO, "unilip.adapters")
    for how in ({}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"low_memory": True}, {"quantization": "int8"}):
        UniLIP.from_pretrained(tiny_folder, **how).load_adapter(folders / "red")
    assert not caplog.records, "nothing to say"
    changed = fresh_model()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(1 + 0.05 * torch.randn(parameter.shape))
    changed.load_adapter(folders / "red")
    assert "was trained on tiny/pretrain (weights" in caplog.text and "and this is tiny (" in caplog.text
    other = fresh_model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
    other.save_pretrained(tmp_path / "other")
    before = latent(other)
    beside = Adapted(tmp_path / "other", ((str(folders / "red"), 1.0),))
    for load in (
        lambda: other.load_adapter(folders / "red"), lambda: UniLIP.from_pretrained(beside),
        lambda: UniLIP.from_pretrained(beside, low_memory=True),
        lambda: UniLIP.from_pretrained(tmp_path / "other", low_memory=True).load_adapter(folders / "red"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=r"trained on tiny/pretrain .* another model of the same shapes"):
            load()
    assert torch.equal(latent(other), before) and not adapter_names(other)
    caplog.clear()
    other.load_adapter(variant(folders / "red", tmp_path / "untold", auto_mapping=None))
    assert "does not tell the weights that it was trained on; it names tiny/pretrain" in caplog.text
    for i, odd in enumerate(({"connector.to_dit": 1}, {"connector.to_dit": "?"}, "x", [1])):
        with pytest.raises(CheckpointError, match="is damaged"):
            other.load_adapter(variant(folders / "red", tmp_path / f"odd{i}", auto_mapping={"trained_on": odd}))


def test_faulty_settings_and_tensors_change_nothing(fresh_model, folders, tmp_path):
    model = fresh_model()
    model.load_adapter(folders / "blue", scale=0.5)
    before, names = latent(model), list(model.state_dict())
    good = load_file(folders / "red" / "adapter_model.safetensors")
    first = sorted(good)[0]
    cases = {
        "no r": {"r": None}, "no alpha": {"lora_alpha": None}, "another r": {"r": 8}, "r as text": {"r": "2"},
        "r 0": {"r": 0}, "r true": {"r": True}, "alpha nan": {"lora_alpha": float("nan")},
        "alpha list": {"lora_alpha": [2]},
        "pattern of nothing": {"alpha_pattern": {".*to_q": 7}}, "pattern": {"rank_pattern": {"to_q": 5}},
        "patterns": {"rank_pattern": [3]}, "turned": {"fan_in_fan_out": True}, "no kind": {"peft_type": None},
        "whole name": {"alpha_pattern": {"^to_q": 7}}, "changed base": {"init_lora_weights": "pissa_niter_4"},
        "after words": {"alora_invocation_tokens": [1, 2]},
        "a list": {"peft_type": ["LORA"]}, "dora": {"use_dora": True}, "biased": {"lora_bias": True},
        "nan": {"tensors": good | {first: good[first] * float("nan")}},
        "integers": {"tensors": good | {first: good[first].int()}},
        "a bias": {"tensors": good | {first.replace("lora_A.weight", "lora_A.bias"): torch.zeros(2)}},
        "empty": {"tensors": {}},
    }  # fmt: skip
    passed = []
    for name, changes in cases.items():
        folder = variant(folders / "red", tmp_path / name.replace(" ", "-"), **changes)
        try:
            model.load_adapter(folder)
            passed.append(name)
        except CheckpointError as error:
            assert name.replace(" ", "-") in str(error), name
    for scale in ("1", float("nan"), True):
        with pytest.raises(UniLIPError, match="must be a number"):
            model.load_adapter(folders / "red", scale=scale)
    assert passed == [] and adapter_names(model) == ["blue"] and list(model.state_dict()) == names
    assert adapter_scale(model, "blue") == 0.5 and torch.equal(latent(model), before)


def test_what_peft_cannot_do_is_undone(fresh_model, folders, monkeypatch):
    model = fresh_model()
    model.load_adapter(folders / "blue", scale=0.5)
    before, names = latent(model), list(model.state_dict())
    layer = peft.tuners.lora.Linear
    update, calls = layer.update_layer, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("no memory")
        return update(self, *args, **kwargs)

    monkeypatch.setattr(layer, "update_layer", failing)
    with pytest.raises(UniLIPError, match="could not be put into the model"):
        model.load_adapter(folders / "red")
    assert len(calls) == 3 and list(model.state_dict()) == names and torch.equal(latent(model), before)
    monkeypatch.undo()
    model.load_adapter(folders / "red")
    assert adapter_names(model) == ["blue", "red"]


def test_any_name_will_do_and_patterns_count(fresh_model, folders, tmp_path):
    wanted = fresh_model()
    wanted.load_adapter(folders / "blue")
    wanted.load_adapter(folders / "red")
    model = fresh_model()
    model.load_adapter(folders / "blue")
    for name in ("1", "to_q", "train", "half", "keys", "default", "style.v2", "lora_A", "0.weight"):
        folder = shutil.copytree(folders / "red", tmp_path / name)
        got = model.load_adapter(folder)
        assert got == name.replace(".", "_") and adapter_names(model) == sorted(["blue", got])
        torch.testing.assert_close(latent(model), latent(wanted), atol=1e-5, rtol=1e-5)  # sums in another order
        unload_adapters(model, [got])
    settings = json.loads((folders / "red" / "adapter_config.json").read_text())
    twice = variant(folders / "red", tmp_path / "twice", alpha_pattern={"to_q": settings["lora_alpha"] * 2})
    model.load_adapter(twice)
    rates = {n.rpartition(".")[2]: layer.scaling[INNER + "twice"] for n, layer in adapted_layers(model)}
    assert rates["to_q"] == 2 * rates["to_v"] == 2 * rates["q_proj"]


def test_merging_is_all_or_nothing(fresh_model, folders):
    pytest.importorskip("torchao")
    model = fresh_model()
    model.load_adapter(folders / "red")
    model.load_adapter(folders / "blue")
    before, names = latent(model), list(model.state_dict())
    name, layer = list(adapted_layers(model))[-1]
    kept = layer.base_layer.weight.detach().clone()
    with torch.no_grad():
        layer.base_layer.weight[0, 0] = float("inf")
    with pytest.raises(UniLIPError, match=f"overflows torch.float32 in {name}"):
        model.merge_adapters()
    with torch.no_grad():
        layer.base_layer.weight.copy_(kept)
    assert list(model.state_dict()) == names and torch.equal(latent(model), before)
    quantised = fresh_model().quantize("int8")
    quantised.load_adapter(folders / "red")
    before = latent(quantised)
    with pytest.raises(UniLIPError, match="load the model plainly, merge"):
        quantised.merge_adapters()
    assert adapter_names(quantised) == ["red"] and torch.equal(latent(quantised), before)


def test_an_offloaded_model_takes_no_adapter(fresh_model, folders):
    model = fresh_model().enable_cpu_offload("cpu")
    before = latent(model)
    with pytest.raises(UniLIPError, match="load adapters first"):
        model.load_adapter(folders / "red")
    assert adapter_names(model) == [] and torch.equal(latent(model), before)


@pytest.mark.parametrize("low_memory", [False, True])
def test_what_one_adapter_did_no_other_does_when_it_goes(folders, tiny_folder, low_memory):
    model = UniLIP.from_pretrained(tiny_folder, low_memory=low_memory)
    before, flags = latent(model), {name: p.requires_grad for name, p in model.named_parameters()}
    for name in ("red", "blue", "dora"):
        model.load_adapter(folders / name)
    model.set_adapters({"red": 1.0, "dora": 0.5})
    unload_adapters(model, ["dora"])
    assert {name: adapter_scale(model, name) for name in adapter_names(model)} == {"red": 1.0, "blue": 0.0}
    unload_adapters(model, ["red"])
    assert adapter_scale(model, "blue") == 0 and torch.equal(latent(model), before)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora" in name)
    unload_adapters(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize("low_memory", [False, True])
def test_at_strength_0_an_adapter_is_off_whatever_is_loaded_later(folders, tiny_folder, low_memory):
    model = UniLIP.from_pretrained(tiny_folder, low_memory=low_memory)
    before = latent(model)
    model.load_adapter(folders / "dora")
    assert not torch.equal(latent(model), before)
    for off in ({}, {"dora": 0.0}):
        model.set_adapters(off)
        assert torch.equal(latent(model), before), off
    model.load_adapter(folders / "red", scale=0.0)
    assert torch.equal(latent(model), before)
    model.set_adapters({"dora": 1.0})
    assert not torch.equal(latent(model), before)


def test_low_memory_adds_adapters_to_weights_as_they_are_read(folders, tiny_folder):
    low, plain = UniLIP.from_pretrained(tiny_folder, low_memory=True), UniLIP.from_pretrained(tiny_folder)
    before = latent(low)
    steps = (
        lambda m: m.load_adapter(folders / "red"), lambda m: m.load_adapter(folders / "dora", scale=0.5),
        lambda m: m.load_adapter(folders / "blue"), lambda m: m.set_adapters({"dora": 1.0, "blue": -0.5}),
        lambda m: m.set_adapters({}), lambda m: unload_adapters(m, ["red"]), lambda m: m.set_adapters({"blue": 2.0}),
    )  # fmt: skip
    for number, step in enumerate(steps):
        assert step(low) == step(plain)
        found = [{name: adapter_scale(m, name) for name in adapter_names(m)} for m in (low, plain)]
        assert found[0] == found[1], number
        drawn = latent(low)
        assert torch.allclose(drawn, latent(plain), atol=1e-4), number
        assert torch.equal(drawn, before) == (number in (4, 5))
    copied, wanted = copy.deepcopy(low), latent(plain)
    low.set_adapters({})
    assert torch.allclose(latent(copied), wanted, atol=1e-4) and torch.equal(latent(low), before), "each has its own"
    with pytest.raises(UniLIPError, match="without low_memory to merge"):
        low.merge_adapters()
    low.unload_adapters()
    assert adapter_names(low) == [] and torch.equal(latent(low), before)


def test_quantised_models_take_adapters(folders, tiny_folder, tmp_path):
    pytest.importorskip("torchao")
    source = Adapted(tiny_folder, ((str(folders / "red"), 2.0),))
    before = latent(UniLIP.from_pretrained(tiny_folder, quantization="int8", low_memory=True))
    beside, read = (UniLIP.from_pretrained(source, quantization="int8", low_memory=low) for low in (False, True))
    moved = (latent(beside) - before).abs().mean()
    assert (latent(read) - latent(beside)).abs().mean() < 0.2 * moved, "but for the rounding of the sum"
    UniLIP.from_pretrained(tiny_folder, quantization="int8").save_pretrained(tmp_path / "few")
    few = UniLIP.from_pretrained(tmp_path / "few", low_memory=True)
    with pytest.raises(UniLIPError, match="quantised weights"):
        few.load_adapter(folders / "red")


def test_the_result_of_a_run_stands_for_its_model(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [f"init=all={tiny_folder}", "steps=1", "sample_every=9", "data.edit_share=0", "name=a/mine"]
    final = train(recipe(*settings), "runs", progress=False)
    with torch.no_grad():  # a step changes too little to be seen
        tensors = {k: t + 0.1 if ".lora_B." in k else t for k, t in load_file(final / WEIGHTS).items()}
    save_file(tensors, final / WEIGHTS, metadata={"format": "pt"})
    beside = UniLIP.from_pretrained(tiny_folder)
    plain = latent(beside)
    assert beside.load_adapter(final) == "mine"
    shutil.copytree("runs", "elsewhere/runs")  # where the base lies is said from the adapter's folder
    model = UniLIP.from_pretrained(final, parts=("mllm",))
    assert set(model.parts) == {"mllm", "connector", "dit"} and adapter_names(model) == ["mine"]
    model = UniLIP.from_pretrained(Adapted(final, ((str(final), 0.5),)))
    assert adapter_names(model) == ["mine", "mine1"] and adapter_scale(model, "mine1") == 0.5
    model.set_adapters({"mine": 1.0})
    assert torch.equal(latent(model), latent(beside)) and not torch.equal(latent(model), plain)
    assert describe(final)["base"] == str(adapted(final).base) and Path(str(adapted(final).base)).samefile(tiny_folder)
    assert model_hash(final) not in (model_hash(tiny_folder), model_hash(Adapted(final, ((str(final), 2.0),))))
    quick = ["--steps", "1", "--no-progress", "--output"]
    for name, words in {"model": ["--model", final], "beside": ["--model", tiny_folder, "--adapter", final]}.items():
        assert cli.main(["generate", "a star", *map(str, words), *quick, f"{name}.png"]) == 0
    assert Path("model.png").read_bytes() != Path("beside.png").read_bytes(), "their notes name what was given"
    assert Image.open("model.png").tobytes() == Image.open("beside.png").tobytes()
    assert cli.main(["convert", str(final), "whole"]) == 0
    assert torch.allclose(latent(UniLIP.from_pretrained("whole")), latent(beside), atol=1e-4)
    with pytest.raises(CheckpointError, match="unilip convert"):
        train(recipe(f"init=all={final}", "name=a/second"), "runs", progress=False)
    (final / "adapter_config.json").write_text("{")
    for call in (UniLIP.from_pretrained, describe):
        with pytest.raises(CheckpointError, match="is damaged"):
            call(final)


def test_a_transformer_copied_for_guidance_has_the_adapters_of_the_moment(fresh_model, folders):
    split, plain = fresh_model().split_guidance("cpu"), fresh_model()
    steps = (
        lambda m: m.load_adapter(folders / "red"), lambda m: m.load_adapter(folders / "dora", scale=0.5),
        lambda m: m.set_adapters({"red": 2.0}), lambda m: m.merge_adapters(),
        lambda m: adapters.load_adapter(m, folders / "blue"), lambda m: adapters.unload_adapters(m),
    )  # fmt: skip
    before, wrong = latent(plain), []
    for number, step in enumerate(steps):
        step(split), step(plain)
        after = latent(plain)
        moved = (after - before).abs().max() > 1e-5
        if not (latent(split) - after).abs().max() < 1e-5 or moved == (number == 3):  # merged it draws the same
            wrong.append(number)
        before = after
    assert wrong == []


def test_an_adapter_may_stand_on_another_but_not_on_itself(fresh_model, folders, tiny_folder, tmp_path):
    lower = variant(folders / "red", tmp_path / "lower", base_model_name_or_path=str(tiny_folder))
    upper = variant(folders / "blue", tmp_path / "upper", base_model_name_or_path="../lower")
    beside = fresh_model()
    for folder in (lower, upper):
        beside.load_adapter(folder)
    assert torch.equal(latent(UniLIP.from_pretrained(upper)), latent(beside))
    assert describe(upper)["base"] == f"{tiny_folder} + {lower}"
    with pytest.raises(UniLIPError, match="lower, upper: adapters lie beside the weights; merge or unload them"):
        beside.save_pretrained(tmp_path / "saved")
    ring = variant(folders / "red", tmp_path / "ring", base_model_name_or_path="../ring")
    with pytest.raises(CheckpointError, match=r"ring holds an adapter of \.\./ring"):
        UniLIP.from_pretrained(ring)


def test_merged_weights_are_stored_as_the_bases_were(fresh_model, folders, tmp_path):
    fresh_model().save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    adapter = variant(folders / "red", tmp_path / "red", base_model_name_or_path="../half")
    for words, stored in (((), "bfloat16"), (("--dtype", "float16"), "float16")):
        assert cli.main(["convert", str(adapter), str(tmp_path / stored), *words]) == 0
        assert list(describe(tmp_path / stored)["dtypes"]) == [stored]


def test_an_adapter_is_known_as_one(folders, tmp_path):
    several = variant(folders / "red", tmp_path / "red", base_model_name_or_path="encoder=a,mllm=b")
    with pytest.raises(CheckpointError, match="holds an adapter of encoder=a,mllm=b; load that"):
        UniLIP.from_pretrained(several)
    found = describe(folders / "red")
    assert (found["kind"], found["rank"], found["dora"]) == ("adapter", [2], False)
    assert found["base"] == "tiny/pretrain" and found["parts"].keys() == {"connector", "dit"}
    assert found["parameters"] == sum(
        t.numel() for t in load_file(folders / "red" / "adapter_model.safetensors").values()
    )
    assert json.loads(json.dumps(found)) == found
    assert cli.main(["info", str(folders / "red")]) == 0
