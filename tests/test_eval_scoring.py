"""From answers to scores: wording, reading, rules of counting, intervals, the authors' programs."""

import json
import sys
import textwrap

import numpy as np
import pytest

from eval_support import FakeJudge, completion, pictures_of, texts_of, write_prompts
from unilip.errors import UniLIPError
from unilip.eval import rubrics, scores, scoring
from unilip.eval.benchmarks import open_benchmark
from unilip.eval.generation import Settings, generate
from unilip.eval.scores import Rule, bootstrap, column, combine, summarise, tabulate, tell
from unilip.eval.vlm import Terms
from unilip.machine import Place


@pytest.fixture(scope="module")
def made(tiny_folder, tiny_model, tmp_path_factory):
    """Runs of all benchmarks with their pictures: f(name) -> (benchmark, folder). Scores are written into them."""
    root = tmp_path_factory.mktemp("made")
    prompts = write_prompts(root / "files")
    settings = Settings.resolve(tiny_folder, steps=1)

    def make(name, **more):
        benchmark = open_benchmark(name, **{**prompts[name], **more})
        folder = root / f"{name}-{benchmark.protocol}"
        generate(benchmark, folder, tiny_folder, settings, load=lambda: tiny_model, place=Place())
        return benchmark, folder

    make.prompts = prompts
    return make


@pytest.fixture
def judge():
    """Score a run with a judge that answers so: f(benchmark, folder, reply) -> (summary, judge)."""
    servers = []

    def score(benchmark, folder, reply, **more):
        servers.append(FakeJudge(reply))
        terms = Terms(servers[-1].url, "referee", key="k", retries=0)
        return scoring.score_by_judge(benchmark, folder, terms, **more), servers[-1]

    yield score
    for server in servers:
        server.close()


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("read", "text", "value"),
    [
        (rubrics.read_wise_verified, "Score: 1", 1.0),
        (rubrics.read_wise_verified, "**Score**: 0", 0.0),
        (rubrics.read_wise_verified, "1", 1.0),
        (rubrics.read_wise_verified, "Score: 0 or 1", None),
        (rubrics.read_wise_verified, "Score: 1\nScore: 0", None),
        (rubrics.read_wise_verified, "Score: 0.5", None),
        (rubrics.read_wise_verified, "Score: 7", None),
        (rubrics.read_wise_legacy, "Consistency: 2\nRealism: 1\nAesthetic Quality: 0",
         {"consistency": 2.0, "realism": 1.0, "aesthetic_quality": 0.0}),
        (rubrics.read_wise_legacy, "Consistency: 2\nRealism: 1", None),
        (rubrics.read_wise_legacy, "Consistency: 3\nRealism: 1\nAesthetic Quality: 0", None),
        (rubrics.read_imgedit, "Brief reasoning: fine.\nPrompt Compliance: 5\nVisual Naturalness: 4\n"
         "Physical & Detail Integrity: 3", [5.0, 4.0, 3.0]),
        (rubrics.read_imgedit, "**Style Fidelity**: 2\nPreservation: 2/5\nRendering Quality: 1.", [2.0, 2.0, 1.0]),
        (rubrics.read_imgedit, "Prompt Compliance: 5\nVisual Naturalness: 4", None),
        (rubrics.read_imgedit, "A: 6\nB: 4\nC: 3", None),
        (rubrics.read_viescore, '{"score": [7, 4], "reasoning": "x"}', 4.0),
        (rubrics.read_viescore, '```json\n{"score" : [10, 8.5],\n"reasoning" : "a"}\n```', 8.5),
        (rubrics.read_viescore, '{"score": [7, 4], "reasoning": "he said "no" to it"}', 4.0),
        (rubrics.read_viescore, '{"score": [7]}', None),
        (rubrics.read_viescore, '{"score": [11, 2]}', None),
        (rubrics.read_viescore, '{"score": "10"}', None),
        (rubrics.read_viescore, "good", None),
    ],
)  # fmt: skip
def test_answers_are_read_strictly(read, text, value):
    assert read(text) == value


# --- a judge, end to end --------------------------------------------------------------------------------------------


def test_wise_verified(made, judge):
    benchmark, folder = made("wise")
    right = {"hint 1", "hint 400", "hint 401"}
    summary, server = judge(
        benchmark,
        folder,
        lambda request, n: f"Score: {int(any(f'{hint}{chr(10)}' in texts_of(request) for hint in right))}",
    )
    entry = summary["scores"][""]["wiscore"]
    assert entry["groups"] == {"culture": 1.0, "time": 0.5, "space": 0, "biology": 0, "physics": 0, "chemistry": 0}
    assert entry["value"] == pytest.approx(0.4 + 0.06)
    assert all(pictures_of(request) == 1 for request in server.requests)
    lines = tell(summary)
    assert lines[0].startswith("wise verified; judge referee, rubric unilip-1; own prompts")
    assert json.loads((folder / "scores/judge-referee-unilip-1.json").read_text())["cost"]["requests"] == 12


def test_wise_legacy_weighs_three_scores(made, judge):
    benchmark, folder = made("wise", protocol="legacy", prompts=made.prompts["wise"]["prompts"].parent / "legacy")
    summary, _ = judge(benchmark, folder, lambda request, n: "Consistency: 2\nRealism: 1\nAesthetic Quality: 0")
    assert summary["scores"][""]["wiscore"]["value"] == pytest.approx((0.7 * 2 + 0.2) / 2)


def test_open_items_are_told_and_bound_the_score_and_a_rerun_asks_them_alone(made, judge):
    benchmark, folder = made("wise")

    def reply(request, n):
        text = texts_of(request)
        if "hint 400\n" in text:
            return completion("", message={"refusal": "no"})
        if "hint 401\n" in text:
            return "who knows"
        if "hint 641\n" in text:
            return 500, {}, {}
        return "Score: 1"

    terms = {"rubric": rubrics.Rubric("another", {})}
    summary, server = judge(benchmark, folder, reply, **terms)
    assert summary["statuses"] == {"ok": 9, "refused": 1, "unparsable": 1, "failed": 1}
    entry = summary["scores"][""]["wiscore"]
    assert entry["value"] == 1.0 and entry["most"] == 1.0
    assert entry["least"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.12 + 0.5 * 0.12 + 3 * 0.12)
    assert any("NOT SCORED: 1 refused, 1 unparsable, 1 failed" in line for line in tell(summary))
    rows = [json.loads(line) for line in (folder / "scores/judge-referee-another.jsonl").read_text().splitlines()]
    refused = next(row for row in rows if row["key"] == "400")
    assert refused["scores"] is None and refused["answers"][0]["reason"] == "no"
    server.reply = lambda request, n: "Score: 0"
    server.requests.clear()
    again = scoring.score_by_judge(benchmark, folder, Terms(server.url, "referee", key="k", retries=0), **terms)
    assert len(server.requests) == 3 and again["statuses"] == {"ok": 12}


def test_a_judge_that_only_refuses_gives_no_score(made, judge):
    benchmark, folder = made("imgedit")
    with pytest.raises(UniLIPError, match="None of 2 items has a score"):
        judge(benchmark, folder, lambda request, n: "I'm sorry, I can't.")
    assert not (folder / "scores/judge-referee-unilip-1.json").exists()
    assert len((folder / "scores/judge-referee-unilip-1.jsonl").read_text().splitlines()) == 2


def test_imgedit_shows_source_and_result(made, judge):
    benchmark, folder = made("imgedit")
    summary, server = judge(
        benchmark, folder, lambda request, n: "A: 5\nB: 4\nC: 4" if "lamp" in texts_of(request) else "A: 1\nB: 1\nC: 1"
    )
    assert {pictures_of(request) for request in server.requests} == {2}
    assert summary["scores"][""]["score"]["value"] == pytest.approx((4.33 + 1) / 2)
    assert summary["scores"][""]["score"]["groups"] == {"adjust": 1.0, "add": 4.33}


def test_gedit_keeps_languages_apart(made, judge):
    benchmark, folder = made("gedit")

    def reply(request, n):
        if pictures_of(request) == 1:
            return '{"score": [4, 6]}'
        return '{"score": [9, 10]}' if "do 1" in texts_of(request) else '{"score": [1, 3]}'

    summary, server = judge(benchmark, folder, reply)
    assert summary["scores"]["en"]["overall"]["value"] == pytest.approx(2.0)
    assert summary["scores"]["cn"]["overall"]["value"] == pytest.approx(6.0)
    assert len(server.requests) == 6


@pytest.mark.parametrize("name", ["dpg", "geneval", "geneval2"])
def test_what_its_authors_program_scores_is_not_for_a_judge(name, made, judge):
    with pytest.raises(UniLIPError, match="--official"):
        judge(*made(name), lambda request, n: "yes")


def test_missing_and_foreign_pictures_are_not_scored(made, judge, tmp_path):
    benchmark, folder = made("imgedit")
    other, _ = made("wise")
    with pytest.raises(UniLIPError, match=r"no folder of a run"):
        judge(benchmark, tmp_path, lambda request, n: "yes")
    with pytest.raises(UniLIPError, match=r"another run: task \(imgedit there, wise here\), .* prompts: sha256 \("):
        judge(other, folder, lambda request, n: "yes")
    kept = (folder / "images/97.png").read_bytes()
    (folder / "images/97.png").unlink()
    try:
        with pytest.raises(UniLIPError, match="1 of 2 pictures are missing"):
            judge(benchmark, folder, lambda request, n: "yes")
    finally:
        (folder / "images/97.png").write_bytes(kept)


# --- the authors' wording -------------------------------------------------------------------------------------------

WISE_FILE = '''
def build_evaluation_messages(prompt_data, image):
    return [
        {"role": "system", "content": [{"type": "text", "text": "You are an auditor."}]},
        {"role": "user", "content": [{"type": "text", "text": f"""Judge {{this}}.
PROMPT: "{prompt_data['Prompt']}" EXPLANATION: "{prompt_data['Explanation']}" """}]},
    ]
raise SystemExit("this file is never run")
'''
VIE_FILE = """
_context_no_delimit = "CONTEXT"
_prompts_0shot_two_image_edit_rule = "RULE"
_prompts_0shot_tie_rule_SC = "Editing instruction: <instruction>"
_prompts_0shot_rule_PQ = "QUALITY"
"""


def test_wording_is_read_and_not_run(tmp_path):
    (tmp_path / "vllm_eval.py").write_text(WISE_FILE)
    rubric = rubrics.read_rubric("wise", "verified", tmp_path)
    assert rubric.texts["system"] == "You are an auditor." and rubric.name.startswith("file ")
    assert rubric.texts["question"].startswith('Judge {this}.\nPROMPT: "{Prompt}" EXPLANATION')
    (tmp_path / "vie_prompts.py").write_text(VIE_FILE)
    rubric = rubrics.read_rubric("gedit", "fullset", tmp_path / "vie_prompts.py")
    assert rubric.texts == {
        "semantics": "CONTEXT\nRULE\nEditing instruction: <instruction>",
        "quality": "CONTEXT\nQUALITY",
    }


def test_the_wording_is_what_is_asked_and_part_of_the_name(made, judge, tmp_path):
    benchmark, folder = made("imgedit")
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"adjust": "ADJUST <edit_prompt>!", "add": "ADD <edit_prompt>!"}))
    rubric = rubrics.read_rubric("imgedit", "singleturn", file)
    summary, server = judge(benchmark, folder, lambda request, n: "A: 1\nB: 1\nC: 1", rubric=rubric)
    assert {texts_of(request) for request in server.requests} == {"ADJUST Make the shell smooth.!", "ADD Add a lamp.!"}
    assert f"rubric {rubric.name}" in column(summary)


@pytest.mark.parametrize("text", ["def other(): pass", "not python (", "x = 1"])
def test_a_file_without_wording_is_refused(text, tmp_path):
    file = tmp_path / "file.py"
    file.write_text(text)
    for name, protocol in (("wise", "verified"), ("gedit", "fullset")):
        with pytest.raises((UniLIPError), match="wording is not found"):
            rubrics.read_rubric(name, protocol, file)
    with pytest.raises(UniLIPError, match="has no rubric file"):
        rubrics.read_rubric("dpg", "1065x4", file)


# --- the authors' programs ------------------------------------------------------------------------------------------


def write_program(folder, name, text):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))


def test_the_official_geneval_program_is_run_on_the_pictures(made, tmp_path):
    benchmark, folder = made("geneval")
    write_program(tmp_path, "evaluation/evaluate_images.py", """
        import json, os, sys
        root, out = sys.argv[1], sys.argv[sys.argv.index("--outfile") + 1]
        assert sys.argv[-2:] == ["--model-path", "w"]
        with open(out, "w") as stream:
            for name in sorted(os.listdir(root)):
                tag = json.load(open(os.path.join(root, name, "metadata.jsonl")))["tag"]
                for sample in os.listdir(os.path.join(root, name, "samples")):
                    row = {"filename": os.path.join(root, name, "samples", sample), "tag": tag,
                           "correct": tag == "counting", "prompt": "", "reason": ""}
                    stream.write(json.dumps(row) + "\\n")
    """)  # fmt: skip
    summary = scoring.score_officially(benchmark, folder, tmp_path, prompts="", arguments="--model-path w")
    assert summary["scores"][""]["correct"]["value"] == pytest.approx(1 / 3)
    assert column(summary).startswith("geneval 553x4; official evaluation/evaluate_images.py")


def test_the_official_geneval2_program_finds_its_pictures(made, tmp_path):
    benchmark, folder = made("geneval2")
    write_program(tmp_path, "evaluation.py", """
        import json, sys
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        rows = [json.loads(line) for line in open(given["--benchmark_data"])]
        places = json.load(open(given["--image_filepath_data"]))
        for row in rows:
            open(places[row["prompt"]], "rb").close()
        json.dump([[0.25] * len(row["vqa_list"]) for row in rows], open(given["--output_file"], "w"))
    """)  # fmt: skip
    summary = scoring.score_officially(benchmark, folder, tmp_path, prompts=made.prompts["geneval2"]["prompts"])
    assert summary["scores"][""]["soft_tifa_gm"]["value"] == pytest.approx(0.25)


def test_the_official_dpg_program_is_run(made, tmp_path):
    benchmark, folder = made("dpg")
    write_program(tmp_path, "dpg_bench/compute_dpg_bench.py", """
        import os, sys
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        assert given["--resolution"] == "56" and given["--pic-num"] == "4"
        with open(given["--res-path"], "w") as stream:
            for name in os.listdir(given["--image-root-path"]):
                stream.write(os.path.join(given["--image-root-path"], name) + ", 1.0, 0.5, 0.5, 0.0, 0.5\\n")
            stream.write("DPG-Bench score: 50.0\\n")
    """)  # fmt: skip
    assert scoring.score_officially(benchmark, folder, tmp_path, prompts="")["scores"][""]["dpg"]["value"] == 0.5


def test_the_official_wise_program_gets_its_key_but_no_list_of_processes_shows_it(made, tmp_path):
    benchmark, folder = made("wise")
    write_program(tmp_path, "vllm_eval.py", """
        import json, sys
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        assert given["--api_key"] == "a secret" and b"secret" not in open("/proc/self/cmdline", "rb").read()
        rows = json.load(open(given["--json_path"]))[:SOME]
        with open(given["--output_dir"] + "/" + given["--result_scores"], "w") as stream:
            for row in rows:
                stream.write(json.dumps({"prompt_id": row["prompt_id"], "score": 1}) + "\\n")
    """.replace("SOME", "None"))  # fmt: skip
    terms = Terms("http://127.0.0.1:9/v1", "referee", key="a secret")
    given = {"prompts": made.prompts["wise"]["prompts"], "terms": terms}
    summary = scoring.score_officially(benchmark, folder, tmp_path, **given)
    assert summary["scores"][""]["wiscore"]["value"] == 1.0 and summary["statuses"] == {"ok": 12}
    program = tmp_path / "vllm_eval.py"
    program.write_text(program.read_text().replace("[:None]", "[:4]").replace('"score": 1', '"score": SCORE'))
    program.write_text(program.read_text().replace("SCORE", "1 if row is not rows[0] else None"))
    summary = scoring.score_officially(benchmark, folder, tmp_path, **given)
    assert summary["statuses"] == {"ok": 3, "failed": 9}, "scores of the earlier call were counted"


def test_a_program_that_fails_or_is_missing_is_told(made, tmp_path):
    benchmark, folder = made("geneval")
    with pytest.raises(UniLIPError, match=r"no evaluation/evaluate_images\.py"):
        scoring.score_officially(benchmark, folder, tmp_path, prompts="")
    write_program(tmp_path, "evaluation/evaluate_images.py", "import mmdet_that_is_missing")
    with pytest.raises(UniLIPError, match=r"mmdet_that_is_missing.*--official-python"):
        scoring.score_officially(benchmark, folder, tmp_path, prompts="", python=sys.executable)
    for given, told in (({"python": "no/python"}, "no program no/python"), ({"arguments": "'a"}, "close its quotes")):
        with pytest.raises(UniLIPError, match=told):
            scoring.find_program(benchmark, tmp_path, **given)
    for text in ("import sys; sys.stdout.buffer.write(b'\\xff'); sys.exit(3)", "open(sys.argv[3], 'w').write('{}')"):
        write_program(tmp_path, "evaluation/evaluate_images.py", f"import sys; {text}")
        with pytest.raises(UniLIPError, match=r"log\.txt"):
            scoring.score_officially(benchmark, folder, tmp_path, prompts="")
    edits, edited = made("imgedit")
    with pytest.raises(UniLIPError, match="--rubric"):
        scoring.score_officially(edits, edited, tmp_path, prompts="")


def test_the_scorers_python_may_be_given_from_here(made, tmp_path, monkeypatch):
    benchmark, folder = made("dpg")
    write_program(tmp_path, "dpg_bench/compute_dpg_bench.py", """
        import os, sys
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        with open(given["--res-path"], "w") as stream:
            for name in os.listdir(given["--image-root-path"]):
                stream.write(name + ", 1.0, 0.5, 0.5, 0.0, 0.5\\n")
    """)  # fmt: skip
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    assert scoring.score_officially(benchmark, folder, ".", prompts="", python="env/python")["statuses"]["ok"]


# --- averages and intervals -----------------------------------------------------------------------------------------


def rows_of(values, group="g", split="", start=0):
    return [
        {"key": f"{group}{start + n}", "cluster": f"{group}{start + n}", "group": group, "split": split, "status": "ok",
         "scores": {"m": v}}
        for n, v in enumerate(values)
    ]  # fmt: skip


def test_rules_of_averaging():
    table = tabulate([*rows_of([1, 1, 1], "a"), *rows_of([0], "b")], "m")
    assert combine(table, Rule()) == 0.75
    assert combine(table, Rule("groups")) == 0.5
    assert combine(table, Rule("groups", {"a": 3.0, "b": 1.0})) == 0.75


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(5, 2, 400)
    entry = summarise(rows_of(values.tolist()), Rule())[""]["m"]
    half = 1.96 * 2 / np.sqrt(400)
    assert entry["value"] == pytest.approx(values.mean())
    assert entry["low"] == pytest.approx(values.mean() - half, abs=0.03)
    assert entry["high"] == pytest.approx(values.mean() + half, abs=0.03)


def test_one_prompt_has_no_interval():
    one = rows_of([1.0])
    several = [{**row, "cluster": "p"} for row in rows_of([0.0, 1.0])]  # pictures of it
    for rows, rule, spread in (
        (one, Rule(), False), (several, Rule(), False), (one + rows_of([0.0], "h"), Rule("groups"), False),
        (one + rows_of([0.0], "h"), Rule(), True), (one + rows_of([0.0, 1.0], "h"), Rule("groups"), True),
    ):  # fmt: skip
        entry = summarise(rows, rule)[""]["m"]
        assert [entry[bound] is not None for bound in ("low", "high")] == [spread, spread]
    about = {"task": "t", "protocol": "p", "scorer": "s", "statuses": {}, "parts": {}}
    assert "1.0000  no interval of one prompt, 1 items" in tell({**about, "scores": summarise(one, Rule())})[1]


def test_pictures_of_one_prompt_are_not_independent():
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 2, 50)
    rows = [
        {"key": f"{p}/{s}", "cluster": str(p), "group": "g", "split": "", "status": "ok", "scores": {"m": float(value)}}
        for p, value in enumerate(prompts)
        for s in range(4)
    ]
    wide = np.ptp(np.percentile(bootstrap(tabulate(rows, "m"), Rule()), [2.5, 97.5]))
    alone = [{**row, "cluster": row["key"]} for row in rows]
    narrow = np.ptp(np.percentile(bootstrap(tabulate(alone, "m"), Rule()), [2.5, 97.5]))
    assert wide > 1.6 * narrow


def test_columns_differ_where_scores_are_not_comparable():
    base = {"task": "wise", "protocol": "verified", "scorer": "judge a", "prompts": {"published": True, "count": 10},
            "prompts_scored": 10}  # fmt: skip
    others = [
        {"protocol": "legacy"}, {"scorer": "judge b"}, {"prompts_scored": 5},
        {"prompts": {"published": False, "sha256": "abc", "count": 10}},
    ]  # fmt: skip
    columns = [column(base), *(column({**base, **other}) for other in others)]
    assert len(set(columns)) == len(columns)
    assert scores.FOLDER == "scores"
