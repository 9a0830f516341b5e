"""A judge behind an address, that also misbehaves: what it did not say never becomes a score."""

import time

import pytest

from eval_support import FakeJudge, completion, texts_of
from unilip.errors import UniLIPError
from unilip.eval.vlm import Question, RemoteJudge, Terms

pytest.importorskip("openai")


def read_yes_no(text):
    return {"yes": True, "no": False}.get(text.strip(".").lower())


@pytest.fixture
def serve():
    """Start a judge: f(reply) -> FakeJudge."""
    judges = []

    def start(reply):
        judges.append(FakeJudge(reply))
        return judges[-1]

    yield start
    for judge in judges:
        judge.close()


def questions(count=1, read=read_yes_no):
    return [Question(f"q{n}", (f"Is this {n}?", b"\x89PNG picture"), read) for n in range(count)]


def ask(judge, count=1, read=read_yes_no, **terms):
    given = {"retries": 2, "timeout": 5.0, "workers": 4, **terms}
    remote = RemoteJudge(Terms(judge.url, "m", key="k", **given))
    return remote.ask(questions(count, read)), remote.tally


def test_answers_come_in_order_and_cost_is_counted(serve):
    judge = serve(lambda request, n: "yes" if "Is this 1?" in texts_of(request) else "No.")
    answers, tally = ask(judge, 3)
    assert [(a.key, a.status, a.value) for a in answers] == [
        ("q0", "ok", False),
        ("q1", "ok", True),
        ("q2", "ok", False),
    ]
    assert tally.to_dict((2.0, 10.0)) == {
        "requests": 3, "from_cache": 0, "retries": 0, "tokens_in": 300, "tokens_out": 30, "cost": 0.0009,
    }  # fmt: skip
    request = judge.requests[0]
    assert request["temperature"] == 0 and request["model"] == "m"
    assert request["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("trouble", [(429, {"Retry-After": "0"}, {}), (503, {}, {}), "drop"])
def test_passing_trouble_is_tried_again(serve, trouble):
    judge = serve(lambda request, n: trouble if n == 0 else "yes")
    (answer,), tally = ask(judge)
    assert answer.status == "ok" and answer.value is True and tally["retries"] == 1


def test_half_an_answer_fails(serve):
    judge = serve(lambda request, n: "broken")
    (answer,), _ = ask(judge)
    assert (answer.status, answer.value) == ("failed", None)


def test_a_judge_that_hangs_fails_after_its_retries(serve):
    judge = serve(lambda request, n: "hang")
    (answer,), tally = ask(judge, retries=1, timeout=0.2)
    assert (answer.status, answer.value) == ("failed", None)
    assert len(judge.requests) == 2 and tally["retries"] == 1


@pytest.mark.parametrize(
    "said",
    [
        completion("", message={"refusal": "I will not."}),
        completion("yes", finish_reason="content_filter"),
        "I'm sorry, but I can't help with that.",
        (400, {}, {"error": {"message": "blocked", "code": "content_policy_violation"}}),
    ],
    ids=["refusal field", "filtered", "in words", "policy"],
)
def test_refusals_are_refusals(serve, said):
    judge = serve(lambda request, n: said)
    (answer,), _ = ask(judge)
    assert (answer.status, answer.value) == ("refused", None)
    assert len(judge.requests) <= 3


def test_nonsense_is_asked_again_and_then_unparsable(serve):
    judge = serve(lambda request, n: "purple")
    (answer,), _ = ask(judge)
    assert (answer.status, answer.value, len(judge.requests)) == ("unparsable", None, 3)
    judge = serve(lambda request, n: "purple" if n == 0 else "yes")
    assert ask(judge)[0][0].value is True


PARTS = completion("", message={"content": [{"type": "text", "text": "yes"}]})


@pytest.mark.parametrize("said", ["", *({"choices": one} for one in ([], None, 1, ["x"], [None], [{}])), [], 1, PARTS])
def test_empty_answers_and_those_of_another_form_are_unparsable(serve, said):
    judge = serve(lambda request, n: said if isinstance(said, str) else (200, {}, said))
    assert ask(judge)[0][0].status == "unparsable"


def test_what_is_no_character_is_kept_and_no_count_is_no_cost(serve, tmp_path):
    judge = serve(lambda request, n: completion("yes \ud800") | {"usage": {"prompt_tokens": "many"}})
    for _ in range(2):
        (answer,), tally = ask(judge, 1, lambda text: "yes" in text or None, cache=tmp_path)
        assert (answer.status, answer.text) == ("ok", "yes \ud800") and tally.to_dict((1.0, 1.0))["cost"] == 0


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_stops_at_once(serve, status):
    judge = serve(lambda request, n: (status, {}, {"error": {"message": "no"}}))
    with pytest.raises(UniLIPError, match="OPENAI_API_KEY"):
        ask(judge, 40, workers=2)
    assert len(judge.requests) < 10


def test_answers_are_kept_and_not_asked_again(serve, tmp_path):
    judge = serve(lambda request, n: "yes")
    ask(judge, 4, cache=tmp_path)
    answers, tally = ask(judge, 4, cache=tmp_path)
    assert len(judge.requests) == 4 and all(a.cached and a.value is True for a in answers) and tally["from_cache"] == 4
    other = RemoteJudge(Terms(judge.url, "another", key="k", cache=tmp_path))
    other.ask(questions(1))
    assert len(judge.requests) == 5  # another judge, another answer


def test_a_damaged_answer_is_asked_again(serve, tmp_path):
    judge = serve(lambda request, n: "yes")
    for text in ("", "{}", "[]", '{"text": 3}', "{"):
        ask(judge, cache=tmp_path)
        next(tmp_path.rglob("*.json")).write_text(text)
    assert ask(judge, cache=tmp_path)[0][0].status == "ok" and len(judge.requests) == 6


def test_what_had_no_score_is_asked_again(serve, tmp_path):
    judge = serve(lambda request, n: "I'm sorry, I cannot." if n == 0 else "yes")
    assert ask(judge, cache=tmp_path)[0][0].status == "refused"
    assert ask(judge, cache=tmp_path)[0][0].status == "ok"
    assert not any("sorry" in file.read_text() for file in tmp_path.rglob("*.json"))


def test_answers_before_a_stop_are_kept(serve, tmp_path):
    judge = serve(lambda request, n: "yes" if n < 3 else (401, {}, {"error": {"message": "out of credit"}}))
    with pytest.raises(UniLIPError, match="does not answer us"):
        ask(judge, 6, workers=1, cache=tmp_path)
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_workers_bound_what_is_under_way(serve):
    def reply(request, n):
        time.sleep(0.05)
        return "yes"

    judge = serve(reply)
    ask(judge, 12, workers=3)
    assert 2 <= judge.most <= 3


def test_thoughts_are_not_the_answer(serve):
    judge = serve(lambda request, n: "<think>no, no, no</think>\nyes")
    assert ask(judge)[0][0].value is True


@pytest.mark.parametrize(("url", "model"), [("localhost:8000", "m"), ("http://x/v1", " ")])
def test_terms_are_checked(url, model):
    with pytest.raises(UniLIPError, match="judge"):
        Terms(url, model)
