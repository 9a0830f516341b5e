"""The verbs of evaluation from words to files, on the tiny model, with a judge on this machine."""

import json

import pytest

from eval_support import FakeJudge, paint, texts_of, write_prompts
from unilip import cli

QUICK = ["--steps", "1", "--no-progress", "--device", "cpu"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(tmp_path_factory.mktemp("prompts") / "files")


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run a verb on the tiny model in an empty folder: f("eval wise", ...) -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call(verb, *words):
        model = ["--model", str(tiny_folder)] if "--model" in cli.VERBS[verb].options else []
        code = cli.main([*verb.split(), *map(str, words), *model])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def judge():
    server = FakeJudge(lambda request, n: "Score: 1")
    yield server
    server.close()


def words(prompts, name):
    given = prompts[name]
    sources = ["--sources", given["sources"]] if "sources" in given else []
    return ["--prompts", given["prompts"], "--own-prompts", *sources, *QUICK]


def test_a_run_is_drawn_then_judged_then_compared(run, prompts, judge, tmp_path):
    given = [*words(prompts, "wise"), "--count", "2", "--output", "a"]
    code, out, err = run("eval wise", *given)
    assert code == 0 and out.split() == ["a"] and "2 files made" in err
    judging = [
        "--judge",
        judge.url,
        "--judge-model",
        "referee",
        "--judge-set",
        "prices=1,10",
        "--judge-set",
        "workers=2",
    ]
    code, out, _ = run("eval wise", *given, *judging)
    assert code == 0 and out.startswith("wise verified; judge referee, rubric unilip-1; own prompts")
    assert "cost 0.0004" in out and "wiscore" in out
    assert "seconds" not in out
    run("eval wise", *given[:-1], "b", "--seed", "1", *judging)
    code, out, _ = run("eval compare", "a", "b", "--output", "both", "--pictures", "1")
    assert code == 0 and "| a | " in out and (tmp_path / "both/pictures-1.png").is_file()


def test_scores_as_json_and_open_items_as_code_1(run, prompts, judge):
    judge.reply = lambda request, n: "I'm sorry, no." if "lamp" in texts_of(request) else "A: 2\nB: 2\nC: 2"
    judging = ["--judge", judge.url, "--judge-model", "m", "--judge-set", "retries=0", "--judge-set", "timeout=5"]
    code, out, err = run("eval imgedit", *words(prompts, "imgedit"), *judging, "--json", "--output", "run")
    found = json.loads(out)
    assert code == 1 and found["open"] == 1 and found["made"] == 2
    assert found["scores"][0]["scores"][""]["score"]["value"] == 2.0
    assert found["scores"][0]["statuses"] == {"ok": 1, "refused": 1}
    assert "run the command again" in err
    judge.reply = lambda request, n: "A: 4\nB: 4\nC: 4"
    code, out, _ = run("eval imgedit", *words(prompts, "imgedit"), *judging, "--no-generate", "--output", "run")
    assert code == 0 and "3.0000" in out  # the first answer was kept, only the open one was asked


def test_fit_changes_an_edit(run, prompts, tmp_path):
    for fit in ("resize", "pad"):
        assert run("eval imgedit", *words(prompts, "imgedit"), "--fit", fit, "--output", fit)[0] == 0
    assert (tmp_path / "pad/images/97.png").read_bytes() != (tmp_path / "resize/images/97.png").read_bytes()


def test_recon(run, tmp_path):
    for n in range(3):
        paint(tmp_path / "photos" / f"{n}.png", n, (60, 60))
    code, out, _ = run(
        "eval recon", "photos", "--protocol", "native", "--measures", "psnr,rfid", "--features", "encoder",
        "--count", "2", "--device", "cpu", "--output", "r",
    )  # fmt: skip
    assert code == 0 and "psnr" in out and "fd[encoder]" in out and "ssim" not in out


def test_understand(run, tmp_path):
    paint(tmp_path / "photos" / "0.png", 0, (60, 60))
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Is it?", "image": "0.png", "answer": "yes"}))
    given = ["q.jsonl", "--images", "photos", "--device", "cpu", "--max-new-tokens", "2", "--output", "u"]
    code, out, _ = run("eval understand", *given)
    assert code == 0 and out.startswith("u/answers.jsonl\nunderstand q questions; exact match")


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("eval wise", [], "needs --prompts"),
        ("eval wise", ["--prompts", "nothing"], "no prompt file nothing"),
        ("eval wise", ["--judge-model", "m"], "needs --judge"),
        ("eval wise", ["--judge", "http://x/v1"], "--judge-model"),
        ("eval wise", ["--judge", "x", "--judge-model", "m"], "address of an API"),
        ("eval wise", ["--protocol", "new"], "legacy"),
        ("eval understand", ["nothing"], "no questions at nothing"),
        ("eval recon", ["nothing"], "Give a folder of pictures"),
        ("eval recon", [".", "--protocol", "300"], "invalid choice"),
        ("eval compare", ["nothing"], "no folder nothing"),
        ("eval compare", [".", "--output", __file__], "is a file"),
        ("eval recon", ["a" * 300], "give a shorter one"),
        ("eval wise", ["--output", "no/such/folder"], "no folder"),
        ("eval wise", ["--judge", "http://x/v1", "--judge-model", "m", "--judge-set", "prices=1"], "two prices"),
        ("eval wise", ["--judge", "http://x/v1", "--judge-model", "m", "--judge-set", "wait=1"], "workers, retries"),
    ],
)
def test_bad_input_is_one_line_and_code_2(verb, given, message, run):
    code, out, err = run(verb, *given)
    assert code == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_scoring_without_pictures_is_refused(run, prompts, judge):
    code, _, err = run(
        "eval wise", *words(prompts, "wise"), "--no-generate", "--judge", judge.url, "--judge-model", "m"
    )
    assert code == 2 and "run.json is missing" in err and judge.requests == []


def test_every_verb_has_its_own_options():
    assert "--official" not in cli.VERBS["eval imgedit"].options
    assert len(cli.VERBS["eval geneval"].options) < 25  # of about a hundred
