"""`unilip eval claims`: comparisons that decide what they can, verdicts from numbers, and a folder that goes on."""

import dataclasses
import json

import numpy as np
import pytest

from unilip import cli
from unilip.errors import UniLIPError
from unilip.eval import claims
from unilip.eval.claims import CLAIMS, Claim, Run, Statement, budget, check, conclude, difference, evaluate, score
from unilip.recipes.catalog import TABLE, ablations
from unilip.recipes.record import plain

RECIPES = {recipe.name: recipe for recipe in ablations()}


def run_of(variant, values, seed=0, tmp="/nowhere", **recipe):
    """A run whose measures are given: lists become items."""
    items = {m: {f"{i:03d}": float(v) for i, v in enumerate(several)} for m, several in values.items()}
    record = {"steps": 10, "batch_size": 4, "accumulate": 1, "init": [], "objective.pixel": 1.0, **recipe}
    return Run(variant, seed, claims.Path(tmp) / "ablation/tiny" / variant / f"seed{seed}" / "final", record, items)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_a_difference_is_paired():
    noise = np.random.default_rng(0).normal(0, 5, 40)  # hard and easy pictures: the same for both
    a, b = [run_of("a", {"psnr": 25 + noise})], [run_of("b", {"psnr": 24 + noise + 0.1 * noise[::-1]})]
    gap, error = difference(a, b, "psnr")
    assert gap == pytest.approx(1 - 0.1 * noise.mean()) and error == pytest.approx(
        np.std(0.1 * noise, ddof=1) / 40**0.5
    )
    assert difference(b, a, "psnr")[0] == -gap


def test_less_is_better_of_a_loss():
    a, b = [run_of("a", {"flow": [1, 1.1, 1]})], [run_of("b", {"flow": [2, 2, 2.2]})]
    assert difference(a, b, "flow")[0] > 0 > difference(b, a, "flow")[0]


def test_seeds_that_differ_make_a_difference_uncertain():
    near = [run_of("a", {"psnr": [20.0, 20.2]}, 0), run_of("a", {"psnr": [20.1, 20.1]}, 1)]
    far = [run_of("a", {"psnr": [18.0, 18.2]}, 0), run_of("a", {"psnr": [22.1, 22.1]}, 1)]
    other = [run_of("b", {"psnr": [19.0, 19.2]})]
    assert difference(near, other, "psnr")[1] < 0.1 < 1 < difference(far, other, "psnr")[1]
    assert score(far, "psnr")["spread"] == pytest.approx(4 / 2**0.5) and score(near[:1], "psnr")["spread"] is None
    assert score(far, "psnr")["mean"] == pytest.approx(20.1)
    assert claims.cell("psnr", score([run_of("a", {"psnr": [20.0]})], "psnr")) == "20.00", "one item has no error"


def test_only_common_items_count_and_one_is_not_enough():
    a, b = run_of("a", {"psnr": [1, 2, 30]}), run_of("b", {"psnr": [0, 1]})
    assert difference([a], [b], "psnr")[0] == 1
    assert difference([a], [run_of("b", {"psnr": [0]})], "psnr") is None
    assert difference([a], [], "psnr") is None and difference([a], [b], "ssim") is None


# --- verdicts ---------------------------------------------------------------------------------------------------------

BETTER, KEPT = Statement("better", "a", "b", "psnr"), Statement("kept", "a", "b", "answers", -0.05)


@pytest.mark.parametrize(
    ("statement", "a", "b", "verdict"),
    [
        (BETTER, [2, 2.1, 2], [1, 1, 1.1], "yes"),
        (BETTER, [1, 1.1, 1], [2, 2, 2.1], "no"),
        (BETTER, [1, 3, 2, 0], [1.1, 1, 2, 1.8], "undecided"),
        (KEPT, [1, 0, 1] * 40, [1, 0, 1] * 40, "yes"),  # the same
        (KEPT, [1] * 98 + [0] * 2, [1] * 100, "yes"),  # 2 points less, of 5 that may go
        (KEPT, [1] * 70 + [0] * 30, [1] * 100, "no"),
        (KEPT, [1] * 94 + [0] * 6, [1] * 100, "undecided"),
    ],
)
def test_a_statement(statement, a, b, verdict):
    runs = {"a": [run_of("a", {statement.measure: a})], "b": [run_of("b", {statement.measure: b})]}
    found = check(statement, runs)
    assert found["verdict"] == verdict
    assert found["difference"] == pytest.approx(np.mean(a) - np.mean(b), abs=1e-4)


@pytest.mark.parametrize(("right", "verdict"), [(0, "undecided"), (5, "undecided"), (6, "yes")])
def test_two_that_can_do_nothing_are_not_called_equal(right, verdict):
    results = {name: [run_of(name, {"edits": [1] * right + [0] * (100 - right)})] for name in ("a", "b")}
    assert check(Statement("not 5 points fewer", "a", "b", "edits", -0.05), results)["verdict"] == verdict


@pytest.mark.parametrize(
    ("psnr", "answers", "verdict"),
    [
        ([2, 2.1, 2], [1, 1, 1, 0], "reproduced"),
        ([0, 0, 0.1], [1, 1, 1, 0], "not reproduced"),
        ([2, 0.1, 0.9], [1, 1, 1, 0], "undecided within the spread"),
        ([2, 0.1, 0.9], [0, 0, 0, 0], "not reproduced"),
    ],
)
def test_a_claim_holds_where_all_its_statements_do(psnr, answers, verdict):
    claim = Claim("x", "words", ("a", "b"), (BETTER, KEPT))
    runs = {
        "a": [run_of("a", {"psnr": psnr, "answers": answers})],
        "b": [run_of("b", {"psnr": [1, 1, 1.1], "answers": [1, 1, 1, 0]})],
    }
    assert conclude(claim, runs)["verdict"] == f"{verdict}, in one training run"
    assert conclude(claim, {"a": runs["a"]})["verdict"] == "not measured"
    runs["b"][0].recipe["steps"] = 20
    assert conclude(claim, runs)["verdict"].startswith("not comparable: the budgets differ")
    runs["b"][0].recipe["steps"] = 10
    twice = {name: [several[0], dataclasses.replace(several[0], seed=1)] for name, several in runs.items()}
    assert conclude(claim, twice)["verdict"] == verdict
    twice["b"][1] = dataclasses.replace(twice["b"][1], recipe={**twice["b"][1].recipe, "steps": 20})
    assert conclude(claim, twice)["verdict"] == "not comparable: the budgets differ"


def test_a_budget_has_the_first_stage_in_it():
    first = run_of("recon", {}, steps=3)
    second = run_of("recon_distill", {}, steps=7, init=["encoder,latent_head=ablation/tiny/recon/seed0"])
    assert budget(second, {"recon": [first]}) == 4 * (3 + 7)


# --- what there is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", TABLE["ablation"]["sizes"])
def test_claims_and_recipes_name_the_same(size):
    original = TABLE["ablation"]["sizes"][size]["names"]
    assert claims.ORIGINALS[size] == (original["encoder"], original["llm"])
    names = {name.split("/")[-1] for name in RECIPES if name.startswith(f"ablation/{size}/")}
    assert set(claims.wanted()) <= names
    swept = {name for name in names if name.startswith("sweep_")}
    assert swept and all(any(n.startswith(f"sweep_{field}_") for field in claims.SWEEPS) for n in swept)
    assert all(
        s.a in claim.variants and s.b in (*claim.variants, claims.ORIGINAL)
        for claim in CLAIMS
        for s in claim.statements
    )


@pytest.fixture(scope="module")
def runs(fresh_model, tmp_path_factory):
    """Untrained models in the places of finished ablations."""
    folder = tmp_path_factory.mktemp("runs")
    fresh_model().save_pretrained(folder / "tiny/instruct/final")
    for variant, seeds in {"recon": (0,), "recon_distill": (0, 1), "recon_free": (0,), "gen_dual": (0,)}.items():
        for seed in seeds:
            recipe = RECIPES[f"ablation/tiny/{variant}"]
            run = folder / f"ablation/tiny/{variant}/seed{seed}"
            fresh_model(seed + len(variant)).save_pretrained(run / "final")
            (run / "final/recipe.json").write_text(json.dumps(plain(recipe) | {"seed": seed}))
    return folder


def test_runs_are_found_with_their_seeds(runs):
    found = claims.find_runs(runs, "tiny")
    assert {name: [run.seed for run in several] for name, several in found.items()} == {
        "gen_dual": [0], "recon": [0], "recon_distill": [0, 1], "recon_free": [0],
    }  # fmt: skip
    assert found["recon_distill"][0].is_tokenizer and not found["gen_dual"][0].is_tokenizer


def test_evidence_is_written_and_goes_on(runs, tmp_path, monkeypatch, fresh_model):
    results = evaluate(runs, tmp_path / "out", parts=["tokenizer"], count=1, progress=False)
    record = results["sizes"]["tiny"]
    untrained = record["missing"]
    assert untrained["gen_queries"] == "unilip train ablation/tiny/gen_queries" and "recon_free" not in untrained
    row = record["variants"]["recon_distill"]
    assert row["seeds"] == [0, 1] and row["psnr"]["spread"] is not None and row["samples"] == 2 * (2 + 2)
    assert "psnr" not in record["variants"]["original"] and "answers" in record["variants"]["original"]
    verdicts = {claim["claim"]: claim["verdict"] for claim in record["claims"]}
    assert verdicts["1"] == verdicts["3a"] == "not measured"  # recon_frozen and the generators are missing
    page = (tmp_path / "out/results.md").read_text()
    assert "unilip train ablation/tiny/recon_frozen" in page and "| 2c. Is distillation" in page and "±" in page
    assert json.loads((tmp_path / "out/results.json").read_text()) == results

    def measured_again(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(claims.Lab, "distance", measured_again)
    again = evaluate(runs, tmp_path / "out", parts=["tokenizer"], count=1, progress=False)
    assert again["sizes"] == results["sizes"]
    with pytest.raises(AssertionError, match="measured again"):  # another number of items
        evaluate(runs, tmp_path / "out", parts=["tokenizer"], count=2, progress=False)
    original = claims.emoji.fingerprint
    monkeypatch.setattr(claims.emoji, "fingerprint", lambda model: "other" + original(model))
    with pytest.raises(AssertionError, match="measured again"):  # other weights
        evaluate(runs, tmp_path / "out", parts=["tokenizer"], count=1, progress=False)


@pytest.mark.slow
def test_generators_are_judged(runs, tmp_path):
    results = evaluate(runs, tmp_path / "out", parts=["generation"], count=1, seeds=1, progress=False)
    row = results["sizes"]["tiny"]["variants"]["gen_dual"]
    assert {"generation", "edits", "psnr_outside", "riddles", "flow", "flow_edit"} <= set(row)
    assert row["flow"]["mean"] > 0 and row["num_queries"] == 8


def test_a_flow_loss_is_that_of_training(runs, fresh_model):
    lab = claims.Lab("tiny", 1, 1, "cpu", None, 2)
    model = fresh_model()
    found = lab.flow_loss(model)
    assert len(found["flow"]) == len(found["flow_edit"]) == claims.emoji.CHEAP and found == lab.flow_loss(model)
    assert 0.5 < np.mean(list(found["flow"].values())) / np.mean(list(found["flow_edit"].values())) < 2


def test_judged_items_are_averaged_over_the_pictures_of_a_prompt(tmp_path):
    rows = [
        {"key": f"gen/single, seen/0000/{s}", "part": "gen", "group": "single, seen", "index": 0, "ok": s == 0}
        for s in range(3)
    ]
    rows.append({"key": "gen/no guidance/x/0", "part": "gen", "group": "no guidance", "index": 0, "ok": True})
    rows.append({"key": "gen/single, seen/0007/0", "part": "gen", "group": "single, seen", "index": 7, "ok": True})
    edit = {"part": "edit", "group": "add, seen", "index": 0, "ok": False, "psnr_outside": 20.0}
    rows.append({"key": "edit/add, seen/0000/0", **edit})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = {"gen": {"single, seen": {"prompts": 1, "items": 2}}, "edit": {"add, seen": {"prompts": 1, "items": 1}}}
    results = {"seeds": 2, **{f"emoji-{part}": {"groups": own} for part, own in groups.items()}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    found = claims.judged(tmp_path)
    assert found["generation"] == {"single, seen/0000": 0.5}  # not the control, nor what an earlier run asked besides
    assert found["edits"] == {"add, seen/0000": 0.0} and found["psnr_outside"] == {"add, seen/0000": 20.0}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parts": ["tokeniser"]}, "allowed: tokenizer, generation"),
        ({"size": "1b"}, "allowed: tiny, pico, nano"),
        ({"size": "nano"}, "unilip train ablation/nano/recon"),
        ({"runs": "nowhere"}, "There is no folder nowhere"),
        ({"count": 0}, "at least 1"),
    ],
)
def test_bad_input_is_explained(runs, tmp_path, given, message):
    given = {"runs": runs, "output": tmp_path / "out", **given}
    with pytest.raises(UniLIPError, match=message):
        evaluate(**given, progress=False)


def test_an_original_that_is_missing_is_named(runs, tmp_path):
    other = tmp_path / "runs"
    other.mkdir()
    (other / "ablation").symlink_to(runs / "ablation")
    with pytest.raises(UniLIPError, match="unilip train tiny/instruct"):
        evaluate(other, tmp_path / "out", parts=["tokenizer"], count=1, progress=False)


def test_the_command_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", "claims", str(tmp_path / "nothing")]) == 2
    assert "There is no folder" in capsys.readouterr().err
    monkeypatch.setattr(claims.Lab, "judge", lambda *_: {"psnr": {"0": 20.0, "1": 21.0}})
    given = ["--output", "e", "--parts", "tokenizer", "--count", "1", "--device", "cpu", "--json"]
    assert cli.main(["eval", "claims", str(runs), *given]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["results"]["sizes"]["tiny"]["missing"]["gen_hidden"] == "unilip train ablation/tiny/gen_hidden"
    assert (tmp_path / "e/results.md").is_file()
