"""A judge behind a server: what it is asked, how its words are read, what becomes of one that fails."""

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trl.rewards import RewardError, RewardPanel, ServedJudge
from trl.rewards.named import reward_named
from trl.rewards.served_judge import score_of


class Asked(ThreadingHTTPServer):
    """Answers by `say(question, number of the request)`: a text, a status, (status, headers), or bytes as they are."""

    daemon_threads = True

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), Answer)
        self.say, self.bodies, self.keys, self.busy, self.most = say, [], [], 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def questions(self):
        return [body["messages"][-1]["content"] for body in self.bodies]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(200, {"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
            server.busy += 1
            server.most, number = max(server.most, server.busy), len(server.bodies)
        said = server.say(body["messages"][-1]["content"], number)
        with server.lock:
            server.busy -= 1
        status, headers = said if isinstance(said, tuple) else (said if isinstance(said, int) else 200, {})
        if status != 200:
            self.reply(status, {"error": {"message": "so it is"}}, **headers)
        elif isinstance(said, bytes):
            self.reply(200, said)
        else:
            self.reply(200, {"choices": [{"message": {"role": "assistant", "content": said}}]})

    def reply(self, status, content, **headers):
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *said):
        pass


@contextmanager
def served(say) -> Iterator[Asked]:
    server = Asked(say)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def of_length(question, number):
    """The letters of the answer."""
    answer = question.split("<answer>\n")[1].split("\n</answer>")[0]
    return f"It has some letters.\nScore: {len(answer)}"


def judged(judge, completions, prompts=None, **columns):
    prompts = ["p"] * len(completions) if prompts is None else prompts
    verdict = RewardPanel([judge], columns.pop("timeout", None))(
        len(completions), {"completions": completions, "prompts": prompts, **columns}
    )
    return [None if score != score else score for score in verdict.scores[0]], verdict


# -- what is asked -----------------------------------------------------------------------------


def test_every_completion_is_scored_in_its_place():
    with served(of_length) as server:
        judge = ServedJudge(server.url)
        talk = [{"role": "user", "content": "and?"}]
        said = [[{"role": "assistant", "content": "x" * size}] for size in (3, 1)]
        scores, verdict = judged(judge, said, [talk, talk])
        assert scores == [3.0, 1.0]
        assert verdict.logs.metrics == {"judge_unscored": [0.0]}
        assert verdict.logs.extra == {"judge_answer": [f"It has some letters.\nScore: {size}" for size in (3, 1)]}
        body = server.bodies[0]
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("first", 0, 512)
        assert "<question>\nUser: and?\n</question>" in server.questions[0]
        assert 'Score: N", where N is a number from 0 to 10.' in server.questions[0]


def test_a_template_with_columns_and_a_request_of_ones_own():
    with served(lambda question, number: '{"score": 4}') as server:
        judge = ServedJudge(
            server.url, "mine", template="{{1}} {completion} = {solution}? {low}-{high}", system="Be strict.",
            scale=(1, 5), request={"max_tokens": None, "max_completion_tokens": 9}, name="solved",
        )  # fmt: skip
        scores, verdict = judged(judge, ["a", "b{x}"], solution=["c", "d"], number=[1, 2])
        assert scores == [4.0, 4.0]
        assert sorted(server.questions) == ["{1} a = c? 1-5", "{1} b{x} = d? 1-5"]
        body = server.bodies[0]
        assert body["messages"][0] == {"role": "system", "content": "Be strict."}
        assert (body["model"], body["max_completion_tokens"], "max_tokens" in body) == ("mine", 9, False)
        assert list(verdict.logs.metrics) == ["solved_unscored"]


def test_a_place_without_a_column_is_named():
    judge = ServedJudge("http://127.0.0.1:9/v1", template="{completion} {answer}")
    with pytest.raises(RewardError, match=r"'judge' failed: .*the place {answer}, and there are the columns completio"):
        judged(judge, ["a"])


def test_equal_questions_are_asked_once():
    with served(of_length) as server:
        judge = ServedJudge(server.url)
        assert judged(judge, ["a", "bb", "a"])[0] == [1.0, 2.0, 1.0]
        assert judged(judge, ["bb", "ccc"])[0] == [2.0, 3.0]
        assert len(server.bodies) == 3
        assert judged(ServedJudge(server.url, cache=False), ["a", "a"])[0] == [1.0, 1.0]
        assert len(server.bodies) == 5


def test_no_more_requests_than_allowed_are_in_flight():
    together = threading.Barrier(3, timeout=20)

    def say(question, number):
        together.wait()
        return "Score: 5"

    with served(say) as server:
        assert judged(ServedJudge(server.url, at_once=3), list("abcdef"))[0] == [5.0] * 6
        assert server.most == 3


def test_the_key_is_of_the_environment_and_is_written_nowhere(monkeypatch, caplog):
    with served(lambda question, number: 401 if number == 1 else "Score: 1") as server:
        monkeypatch.delenv("TRL_JUDGE_API_KEY", raising=False)
        with pytest.raises(
            RewardError, match=r"refused /chat/completions \(status 401\): give its key in the environm"
        ):
            judged(ServedJudge(server.url), ["a"])
        monkeypatch.setenv("MY_KEY", "hush-hush")
        judge = ServedJudge(server.url, api_key_env="MY_KEY")
        with caplog.at_level(logging.DEBUG):
            assert judged(judge, ["a"])[0] == [1.0]
        assert server.keys == [None, "Bearer hush-hush"]
        assert "hush-hush" not in caplog.text + repr(judge) + repr(vars(judge))


# -- failures ----------------------------------------------------------------------------------


def test_what_may_be_asked_again_is(caplog):
    said = {1: 503, 2: (429, {"Retry_After": "0.01"}), 3: b"<html>", 4: "Score: 7"}
    with served(lambda question, number: said[number]) as server:
        judge = ServedJudge(server.url, tries=4, timeout=1.0)
        assert judged(judge, ["a"])[0] == [7.0]
        assert len(server.bodies) == 4
        assert not caplog.messages


def test_rows_that_fail_have_no_score_and_are_counted(caplog):
    def say(question, number):
        answer = question.split("<answer>\n")[1][0]
        return {"a": "Score: 3", "b": 500, "c": "I would rather not.", "d": 400, "e": "Score: 11"}[answer]

    with served(say) as server, caplog.at_level(logging.WARNING, "trl"):
        judge = ServedJudge(server.url, tries=2, timeout=1.0)
        scores, verdict = judged(judge, list("abcde"))
        assert scores == [3.0, None, None, None, None]
        assert verdict.logs.metrics == {"judge_unscored": [0.8]}
        (line,) = caplog.messages
        assert line.startswith(f"judge at {server.url}: no score for 4 of 5 completions: ")
        assert "1 x status 500" in line
        assert verdict.logs.extra["judge_answer"][2:4] == [
            "no number from 0 to 10 in 'I would rather not.'", 'status 400: {"error": {"message": "so it is"}}',
        ]  # fmt: skip
        asked = len(server.bodies)
        judged(judge, ["a", "c"])  # what failed is asked anew, what did not is known
        assert len(server.bodies) == asked + 1


def test_a_slow_judge_costs_its_row_and_a_slower_one_its_time_out():
    release = threading.Event()

    def say(question, number):
        if "slow" in question:
            release.wait(20)
        return "Score: 2"

    with served(say) as server:
        scores, verdict = judged(ServedJudge(server.url, timeout=0.3, tries=1), ["fast", "slow"])
        assert scores == [2.0, None]
        assert verdict.logs.extra["judge_answer"][1] == "no answer within 0.3 s"
        scores, verdict = judged(ServedJudge(server.url, timeout=20), ["fast", "slow"], timeout=0.3)
        assert (scores, verdict.timed_out) == ([None, None], [True])
        release.set()


def test_any_text_can_be_judged():
    with served(of_length) as server:
        assert judged(ServedJudge(server.url), ["\ud800", "{completion}", ""])[0] == [6.0, None, 0.0]


def test_a_judge_that_is_away_gives_no_score():
    with served(of_length) as server:
        url = server.url
    scores, verdict = judged(ServedJudge(url, "m", tries=2, timeout=0.5), ["a"])
    assert scores == [None]
    assert verdict.logs.extra["judge_answer"] == ["no connection (ConnectError)"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"url": "127.0.0.1:8000"}, r"^url='127\.0\.0\.1:8000': give one such as http://127\.0\.0\.1:8000/v1"),
        ({"url": "http://me:secret@host/v1"}, r"^url: it holds a name or password; give the key in an environment"),
        ({"template": "Is it good?"}, r"^template='Is it good\?': give a text with the place {completion}"),
        ({"scale": (5, 1)}, r"^scale=\(5, 1\): give the lowest and the highest score"),
        ({"at_once": 0}, "^at_once=0: give 1 or more"),
    ],
)
def test_wrong_settings_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        ServedJudge(**{"url": "http://h/v1", **given})


def test_a_url_among_the_rewards_is_a_judge_and_it_runs_on_any_loop():
    with served(of_length) as server:
        judge = reward_named(server.url + "/")
        assert isinstance(judge, ServedJudge)
        for _ in range(2):
            assert asyncio.run(judge(["four"], ["p"])) == [4.0]


# -- its words ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 7), ("**Score:** 8/10", 8), ("score = 6.5", 6.5), ("Final rating is 9 out of 10.", 9),
        ('{"reason": "2 errors", "score": 3}', 3), ("Score: **4**\n", 4), ("[[5]] as said", 5), ("10", 10), ("8/10", 8),
        ("First I thought Score: 2, but score: 6", 6), ("<think>Score: 1</think>\nScore: 9", 9), ("Score: 7,5", 7.5),
        ("Score: \\boxed{3}", 3), ("I give it a 6.", 6), ("Score: 0", 0),
        ("Score: 11", None), ("Score: -1", None), ("Score: 4/5", None), ("", None), ("Good!", None),
        ("It has 3 errors in 7 lines", None), ("<think>Score: 4", None), ("4 out of 5", None), ("Score: high", None),
    ],
)  # fmt: skip
def test_the_score_of_a_judges_words(text, score):
    assert score_of(text) == score
