"""Compiled layers: which they are, that names and numbers stay, and that recomputation and shards compose with them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import unilip.emoji.tokenizer
from test_train_parallel import checks, log_of, same_curve
from unilip.recipes.catalog import get_recipe
from unilip.recipes.record import override
from unilip.train.build import compile_layers, enable_checkpointing, make_batches, trained_parameters
from unilip.train.loop import train
from unilip.train.objectives import make_objective, needed_parts

LAYERS = {  # of each kind of recipe: what is compiled, by the end of its name
    "tiny/instruct": {"layer"},
    "tiny/recon": {"layer"},
    "tiny/sft": {"layer", "block", "connector"},
}


def prepared(name, model):
    """Objective and batches (of edits, where there are any) on a model."""
    edits = ["data.edit_share=1"] if name == "tiny/sft" else []
    recipe = override(get_recipe(name), ["steps=50", *edits])
    model.requires_grad_(False)
    for parameter, _ in trained_parameters(recipe, model).values():
        parameter.requires_grad_(True)
    return make_objective(recipe, model, {}), make_batches(recipe, model.config, model.processor)


def kind(name: str) -> str:
    if "connector.layers" in name:
        return "connector"
    if "transformer_blocks" in name:
        return "block"
    return "layer"


@pytest.mark.parametrize("name", LAYERS)
def test_each_layer_is_compiled_by_itself(name, fresh_model, monkeypatch):
    model = fresh_model(parts=needed_parts(get_recipe(name).objective))
    objective, batches = prepared(name, model)
    names = {id(module): path for path, module in model.named_modules()}
    weights = list(model.state_dict())
    expected = objective.loss(batches[0], 0)[0].item()
    compiled, called = set(), set()

    def note(function):
        path = names[id(function.__self__)]
        compiled.add(path)

        def run(*args, **options):
            called.add(path)
            return function(*args, **options)

        return run

    monkeypatch.setattr(torch, "compile", note)
    compile_layers(model)
    assert objective.loss(batches[0], 0)[0].item() == expected
    assert {kind(path) for path in compiled} == LAYERS[name] and called == compiled
    assert list(model.state_dict()) == weights, "names of weights stay"


def test_only_where_the_recipe_says_so(tmp_path, monkeypatch):
    make, count = unilip.emoji.tokenizer.train_tokenizer, 0

    def note(function):
        nonlocal count
        count += 1
        return function

    monkeypatch.setattr(unilip.emoji.tokenizer, "train_tokenizer", lambda *a: make(*a, sentences=300))
    monkeypatch.setattr(torch, "compile", note)
    recipe = override(get_recipe("tiny/clip"), ["steps=1", "batch_size=2", "sample_every=9", "log_every=1"])
    run = train(recipe, tmp_path / "plain", progress=False).parent
    assert count == 0
    shutil.copytree(run / "tokenizer", tmp_path / "compiled" / "tiny" / "clip" / "tokenizer")
    again = train(override(recipe, ["compile=1"]), tmp_path / "compiled", progress=False).parent
    assert count > 0
    losses = [json.loads((one / "log.jsonl").read_text().splitlines()[0])["loss"] for one in (run, again)]
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("saving", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_have_the_same_losses_and_gradients(saving, fresh_model):
    """By inductor, on prompts of two lengths; no layer falls apart into several graphs."""
    model = fresh_model(parts=needed_parts(get_recipe("tiny/sft").objective))
    objective, batches = prepared("tiny/sft", model)
    found = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        if compiled:
            if saving:
                enable_checkpointing(model)
            compile_layers(model)
        for i in (0, 1):
            loss, _ = objective.loss(batches[i], 0)
            loss.backward()
            found.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 4 and not counters["graph_break"], counters
    for (loss, grads), (same, others) in zip(found[:2], found[2:], strict=True):
        assert same == pytest.approx(loss, rel=1e-5) and grads.keys() == others.keys()
        whole = torch.stack([g.norm() for g in grads.values()]).norm()
        for name in grads:
            assert (grads[name] - others[name]).norm() <= 1e-4 * max(grads[name].norm(), 1e-3 * whole), name


@pytest.mark.slow
def test_shards_recomputation_and_compiled_layers_together(tmp_path: Path):
    """Two processes: compiled layers with DDP, and with FSDP2, recomputed wholly or in part: the losses of one."""
    runs = checks(tmp_path / "runs", "compiled")
    for folder in ("ddp", "fsdp", "selective"):
        same_curve(log_of(runs / "one", "x/sft"), log_of(runs / folder, "x/sft"))
