"""The client of vLLM's servers and the sampler over it, against a fake server that fails on order."""

import logging
import random
import re
import threading

import pytest
import torch
from fake_vllm import FakeVLLM, Fault
from tiny_models import tiny_model
from tokenizers_for_tests import word_tokenizer

from trl.generation import SamplingParams
from trl.generation.vllm.client import ServerEngine, is_loopback, server_urls
from trl.generation.vllm.engine import About, EngineError, Request
from trl.generation.vllm.sampler import VLLMSampler, check_release, engine_params

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 5, 9, 12]]
PARAMS = SamplingParams(max_new_tokens=6, seed=3, stop_token_ids=(2,))


@pytest.fixture(scope="module")
def served():
    with FakeVLLM(tiny_model("llama", vocab_size=100), word_tokenizer()) as server:
        yield server


@pytest.fixture
def server(served):
    return served.begin_anew()


@pytest.fixture
def engine(server):
    made = ServerEngine(server.url, wait=0.5, timeout=5.0)
    yield made
    made.close()


def texts(groups):
    return [[one.ids for one in group] for group in groups]


# --- answers --------------------------------------------------------------------------------------


def test_an_engine_says_who_it_is(engine, server):
    assert engine.about() == About("0.32.0", "folder/of/the/model", 64)
    assert engine.versions() == ["default"]


def test_logprobs_are_those_of_the_model(engine, server):
    groups = VLLMSampler(engine).sample(PROMPTS, PARAMS, n=3)
    assert [len(group) for group in groups] == [3, 3, 3]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for one in group:
            ids = torch.tensor([prompt + one.ids])
            logprobs = server.first(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            wanted = logprobs.gather(1, ids[0, len(prompt) :, None]).flatten()
            torch.testing.assert_close(torch.tensor(one.logprobs), wanted, atol=1e-5, rtol=0)
            assert one.raw_logprobs == one.logprobs
            assert one.finish_reason == ("stop" if one.ids[-1] == 2 else "length")
            assert [tuple(span) for span in one.versions] == [("default", 0, len(one.ids))]


def test_prompts_are_scored(engine, server):
    row = [1, 5, 9, 12, 7]
    server.first.requires_grad_(False)
    (plain,), (best,) = engine.prompt_logprobs([row]), engine.prompt_logprobs([row], top=3)
    logprobs = server.first(torch.tensor([row])).logits[0].log_softmax(-1)
    assert [list(entry) for entry in plain] == [[5], [9], [12], [7]]
    assert [entry[t] for entry, t in zip(plain, row[1:], strict=True)] == pytest.approx(
        [float(logprobs[i, t]) for i, t in enumerate(row[1:])], abs=1e-5
    )
    assert set(logprobs[2].topk(3).indices.tolist()) <= set(best[2])


def test_a_row_depends_on_nothing_beside_it(engine, server):
    """Nor on the other prompts, the number of copies, the order of arrival, or the number of servers."""
    sampler = VLLMSampler(engine)
    whole = texts(sampler.sample(PROMPTS, PARAMS, n=3))
    alone = [texts(sampler.sample([prompt], PARAMS, n=2))[0] for prompt in PROMPTS[:2]]
    assert alone == [group[:2] for group in whole[:2]]
    assert whole[0] != whole[2]  # the same prompt once more: other copies
    server.delays = random.Random(1)
    assert texts(sampler.sample(PROMPTS, PARAMS, n=3)) == whole
    with FakeVLLM(server.first) as second:
        two = ServerEngine([server.url, second.url], wait=0.5)
        assert texts(VLLMSampler(two).sample(PROMPTS, PARAMS, n=3)) == whole
        assert [len(body["token_ids"]) for path, body in second.calls if path.startswith("/inf")] == [2]


def test_many_copies_are_asked_in_parts(engine, server):
    sampler = VLLMSampler(engine)
    (group,) = sampler.sample([PROMPTS[0]], PARAMS, n=18)
    asked = [body["sampling_params"] for path, body in server.calls if path.startswith("/inf")]
    assert sorted(each["n"] for each in asked) == [2, 16]
    assert len({each["seed"] for each in asked}) == 2
    assert len(group) == 18
    assert len({tuple(one.ids) for one in group}) > 9


def test_nobody_waits_at_the_end_of_python_for_an_answer(engine):
    """Requests are in threads of which the interpreter waits for none; the first error in their order is raised."""
    assert engine._together(lambda place: (place, threading.current_thread().daemon), 100) == [
        (place, True) for place in range(100)
    ]
    asked = []

    def ask(place):
        asked.append(place)
        return 1 // (place - 3)

    engine.at_once = 1
    with pytest.raises(ZeroDivisionError):
        engine._together(ask, 50)
    assert asked[:4] == [0, 1, 2, 3]


def test_every_setting_is_said_in_vllms_words(engine):
    params = SamplingParams(
        max_new_tokens=9, temperature=0.7, top_k=5, top_p=0.8, min_p=0.05, repetition_penalty=1.2, stop_strings=("b c",)
    )
    asked = engine_params(params, (2, 3), {"structured_outputs": {"regex": "a+"}})
    assert asked == {
        "temperature": 0.7, "top_k": 5, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "logprobs": 0,
        "ignore_eos": True, "stop_token_ids": [2, 3], "detokenize": True, "stop": ["b c"],
        "include_stop_str_in_output": True, "skip_special_tokens": False, "structured_outputs": {"regex": "a+"},
    }  # fmt: skip
    assert engine_params(SamplingParams(4), (), {})["top_k"] == -1


def test_a_completion_ends_where_it_is_asked_to(engine, server):
    sampler = VLLMSampler(engine, tokenizer=word_tokenizer(), model=server.first)
    (greedy,) = sampler.sample([PROMPTS[0]], SamplingParams(8, temperature=0, stop_token_ids=()))[0]
    assert (len(greedy.ids), greedy.finish_reason, set(greedy.logprobs)) == (8, "length", {0.0})
    (twice,) = sampler.sample([PROMPTS[0]], SamplingParams(8, temperature=0, stop_token_ids=()), n=2)
    assert twice == [greedy, greedy]
    text = word_tokenizer().decode(greedy.ids[1:3])
    stopped = SamplingParams(8, temperature=0, stop_token_ids=(), stop_strings=(text,))
    (cut,) = sampler.sample([PROMPTS[0]], stopped)[0]
    assert (cut.ids, cut.finish_reason) == (greedy.ids[:3], "stop")
    (at_token,) = sampler.sample([PROMPTS[0]], SamplingParams(8, temperature=0, stop_token_ids=(greedy.ids[2], 10**5)))[
        0
    ]
    assert at_token.ids == greedy.ids[: greedy.ids.index(greedy.ids[2]) + 1]
    (full,) = sampler.sample([[1] * 60], SamplingParams(8, seed=1, stop_token_ids=()))[0]
    assert (len(full.ids), full.finish_reason) == (4, "length")  # the context is full
    with pytest.raises(ValueError, match="give the sampler a tokenizer"):
        VLLMSampler(engine).sample([PROMPTS[0]], stopped)


def test_filters_leave_the_models_own_numbers_unknown(engine):
    (one,) = VLLMSampler(engine).sample([PROMPTS[0]], SamplingParams(4, top_k=3, seed=1, stop_token_ids=()))[0]
    assert all(number < 0 for number in one.logprobs)
    assert all(number != number for number in one.raw_logprobs)


# --- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["refuse", "500", "503", "half", "short", "nan", "missing", "abort"])
def test_what_goes_wrong_once_is_asked_again(kind, engine, server, caplog):
    sampler = VLLMSampler(engine)
    whole = texts(sampler.sample(PROMPTS, PARAMS, n=2))
    server.faults.append(Fault(kind, after=1))
    assert texts(sampler.sample(PROMPTS, PARAMS, n=2)) == whole
    assert len(caplog.records) == 1
    assert server.url in caplog.text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("refuse", "broke off in /inference/v1/generate"),
        ("500", "answered /inference/v1/generate with status 500: EngineCore encountered an issue., 3 times"),
        ("503", "answers with status 503: Service Unavailable, for 0.5 s: start it with `trl vllm-serve"),
        ("half", "answered /inference/v1/generate with what is no whole answer"),
        ("short", "answered /inference/v1/generate with 5 log-probabilities for 6 tokens, 3 times"),
        ("nan", "with a log-probability that is not finite, 3 times"),
        ("missing", "with 1 completions for 2, 3 times"),
        ("abort", "with a completion that ended by 'abort', not by itself, 3 times"),
        ("oom", "is out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.): start it with a smaller"),
        ("404", "has no /inference/v1/generate: start vLLM with `trl vllm-serve`"),
        ("stranger", "sampled the token 1000000, and the policy knows 0 to 99: it serves another model"),
    ],
)
def test_what_stays_wrong_ends_with_its_name(kind, said, engine, server):
    sampler = VLLMSampler(engine, model=server.first)
    server.faults.append(Fault(kind, times=10**6))
    with pytest.raises(EngineError) as error:
        sampler.sample([PROMPTS[0]], SamplingParams(6, seed=3, stop_token_ids=()), n=2)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_slow_server_is_named(server):
    engine = ServerEngine(server.url, wait=0.5, timeout=0.05)
    server.faults.append(Fault("slow", times=3, seconds=0.2))
    with pytest.raises(EngineError, match=r"gave no answer to /inference/v1/generate within 0\.05 s, 3 times: raise"):
        VLLMSampler(engine).sample([PROMPTS[0]], PARAMS)


def test_a_server_that_is_not_there(server):
    server.stop()
    engine = ServerEngine(server.url, wait=0.2)
    with pytest.raises(EngineError, match=re.escape("for 0.2 s: start it with `trl vllm-serve --model ...`")):
        engine.about()


def test_a_server_that_is_away_is_waited_for_once(server, monkeypatch):
    """How it was started is asked first, and that it did not say is not taken for an answer."""
    server.stop()
    engine = ServerEngine(server.url, wait=0.2)
    with pytest.raises(EngineError, match=r"for 0\.2 s: start it with"):
        engine.settings()
    server.start()
    assert engine.settings().dtype == "torch.float32"


def test_what_is_tidied_up_after_a_server_is_gone_waits_no_more(server, monkeypatch):
    engine = ServerEngine(server.url, wait=0.5)
    tries, once = [], engine._once
    monkeypatch.setattr(engine, "_once", lambda url, path, *more: (tries.append(path), once(url, path, *more))[1])
    server.stop()
    for ask in (engine.pause, engine.resume, engine.about):
        with pytest.raises(EngineError, match=r"for 0\.5 s: start it with"):
            ask()
    assert tries.count("/pause?mode=wait&clear_cache=true") > 2
    assert tries[-2:] == ["/resume", "/version"]
    assert tries.count("/resume") == tries.count("/version") == 1
    monkeypatch.setattr("trl.generation.vllm.client._GONE", 0.0)  # later it is waited for again
    with pytest.raises(EngineError):
        engine.resume()
    assert tries.count("/resume") > 2


@pytest.mark.parametrize("ask", [lambda e: e.about(), lambda e: e.versions(), lambda e: e.generate([Request([1], {})])])
def test_a_server_of_something_else(ask, engine, server, monkeypatch):
    """One that answers every path with a page, and no JSON."""
    monkeypatch.setattr(server, "answer", lambda *asked: (200, "<html>welcome</html>"))
    with pytest.raises(EngineError, match=r"^the vLLM server at .* answered /.* what is no whole answer .*3 times"):
        ask(engine)


def test_a_server_that_dies_in_the_midst_and_comes_back(engine, server, caplog):
    """It has its first weights then; the rows come out as if nothing had been."""
    engine.wait = 20.0
    sampler = VLLMSampler(engine, _Sync(), stamp="run")
    sampler.follow(4)
    whole = texts(sampler.sample(PROMPTS, PARAMS, n=2))
    server.faults.append(Fault("die", after=1))
    back = _Back(server)
    with caplog.at_level(logging.WARNING, "trl"):
        assert texts(sampler.sample(PROMPTS, PARAMS, n=2)) == whole
    back.join()
    assert sampler.sync.made == [("push", "run-4"), ("again", "run-4")]
    assert "it is waited for, 20 s at most" in caplog.text
    assert "vLLM was started anew (it sampled by the weights 'default', not by 'run-4')" in caplog.text


def test_first_weights_after_a_restart_are_not_sampled_from(engine, server):
    sampler = VLLMSampler(engine, _Sync(), stamp="run")
    sampler.follow(1)
    server.faults.append(Fault("restart", after=1))
    groups = sampler.sample(PROMPTS, PARAMS, n=2)
    assert {span.version for group in groups for one in group for span in one.versions} == {"run-1"}


def test_another_run_on_the_same_engine_is_found(engine, server):
    sampler = VLLMSampler(engine, _Sync(), stamp="run")
    sampler.follow(1)
    server.faults.append(Fault("other-version", times=10**6))
    with pytest.raises(EngineError, match="samples by the weights 'other', not by 'run-1', though it got them twice"):
        sampler.sample(PROMPTS, PARAMS)


def test_weights_go_once_for_each_version(engine):
    sampler = VLLMSampler(engine, _Sync(), stamp="run")
    for version in (0, 0, 1, 1):
        sampler.follow(version)
        sampler.sample([PROMPTS[0]], PARAMS)
    assert sampler.sync.made == [("push", "run-0"), ("push", "run-1")]


def test_one_of_several_servers_that_serves_another_model(server):
    with FakeVLLM(server.first, name="another") as second:
        engine = ServerEngine([server.url, second.url], wait=0.5)
        with pytest.raises(EngineError, match=r"servers differ: .* serves folder/of/the/model by 0\.32\.0, .* another"):
            engine.about()


# --- weights ----------------------------------------------------------------------------------------


def test_a_folder_of_weights_is_loaded(engine, server, tmp_path):
    other = tiny_model("llama", vocab_size=100)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    other.save_pretrained(tmp_path)
    engine.pause()
    engine.reload_weights(str(tmp_path))
    engine.set_version("run-1")
    engine.resume()
    row = [1, 5, 9]
    other.requires_grad_(False)
    (scored,) = engine.prompt_logprobs([row])
    assert scored[1][9] == pytest.approx(float(other(torch.tensor([row])).logits[0, 1].log_softmax(-1)[9]), abs=1e-5)
    assert [path for path, _ in server.calls][:5] == [
        "/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"
    ]  # fmt: skip
    assert engine.versions() == ["run-1"]


def test_a_folder_that_is_not_there_is_an_error(engine, tmp_path):
    with pytest.raises(EngineError, match="Cannot find any model weights"):
        engine.reload_weights(str(tmp_path))
    with pytest.raises(EngineError, match=r"refused /v1/load_lora_adapter \(status 404\): Loading lora policy failed"):
        engine.load_adapter("policy", str(tmp_path))


def test_a_server_without_the_routes_for_training(engine, server, monkeypatch):
    monkeypatch.setattr(server, "routes_for_training", False)
    with pytest.raises(EngineError, match="has no /pause: start vLLM with `trl vllm-serve`"):
        engine.pause()


def test_a_key(server, monkeypatch):
    monkeypatch.setattr(server, "api_key", "secret")
    assert ServerEngine(server.url, api_key="secret").about().release == "0.32.0"
    with pytest.raises(EngineError, match="asks for a key: give its --api-key in VLLM_API_KEY"):
        ServerEngine(server.url).about()


# --- addresses and releases -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("http://a:8000/", ("http://a:8000",)),
        ("a:8000, b:8001", ("http://a:8000", "http://b:8001")),
        (["http://0.0.0.0:8000/v1", "https://b"], ("http://127.0.0.1:8000", "https://b")),
    ],
)
def test_addresses(given, urls):
    assert server_urls(given) == urls


@pytest.mark.parametrize("wrong", ["", "ftp://a", "http://"])
def test_what_is_no_address(wrong):
    with pytest.raises(ValueError, match="is no server's address: give one such as"):
        server_urls(wrong)


def test_what_stays_on_this_machine():
    hosts = ["http://127.0.0.1:1", "http://localhost", "http://[::1]:2", "http://10.0.0.1"]
    assert [is_loopback(host) for host in hosts] == [True, True, True, False]


@pytest.mark.parametrize(
    ("release", "line"),
    [("0.32.0", ""), ("0.32.4", ""), ("0.32.1+cpu", ""), ("0.33.0", "0.33.0 is not tested: releases >=0.32.0,<0.33.0"),
     ("0.30.1", "0.30.1 is not tested"), ("dev", "calls itself 'dev'")],
)  # fmt: skip
def test_releases(release, line, caplog):
    check_release(About(release, "m", None))
    assert line in caplog.text
    assert bool(caplog.text) == bool(line)


def test_a_release_that_is_too_old():
    with pytest.raises(EngineError, match=r"vLLM 0\.10\.2 is too old: take 0\.32\.0, which is tested"):
        check_release(About("0.10.2", "m", None))


def test_requests_carry_their_adapter(engine):
    with pytest.raises(EngineError, match="The model `policy` does not exist"):
        engine.generate([Request([1, 2], {"max_tokens": 1, "temperature": 1.0, "logprobs": 0}, "policy")])


class _Sync:
    """Stamps the weights that are there."""

    adapter = None

    def __init__(self):
        self.made = []

    def push(self, engine, version):
        engine.set_version(version)
        self.made.append(("push", version))

    def again(self, engine, version):
        engine.set_version(version)
        self.made.append(("again", version))


class _Back:
    """Starts a server that has died anew, as a supervisor does."""

    def __init__(self, server):
        import threading

        self.server = server
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        import time

        while self.server.http is not None:
            time.sleep(0.01)
        time.sleep(0.1)
        self.server.start()

    def join(self):
        self.thread.join()
