import math
import random
import re
import threading
import time
from unittest.mock import patch

import pytest
import torch
from tokenizers_for_tests import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trl.environment.base_environment import StringStoppingCriteria, TextEnvironment, TextHistory
from trl.environment.episodes import as_rollout

TOKENS = torch.tensor([1, 2, 3])


class EchoTool:
    def __call__(self, text: str) -> str:
        return text


def slow(text: str) -> str:
    time.sleep(float(text))
    return text


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos="<|endoftext|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **size, **ends)).eval()


@pytest.fixture
def make(model, tokenizer):
    def make_environment(tools=(), reward_fn=lambda texts: [1.0] * len(texts), kind=TextEnvironment, **kwargs):
        return kind(model, tokenizer, list(tools) if isinstance(tools, tuple) else tools, reward_fn, **kwargs)

    return make_environment


class Scripted(TextEnvironment):
    """Its model says what `script` maps the text so far to; `batches` keeps how many rows spoke together."""

    def __init__(self, *args, script, **kwargs):
        super().__init__(*args, **kwargs)
        self.script = script
        self.batches = []

    def generate(self, histories):
        self.batches.append(len(histories))
        for history in histories:
            text = self.script(history.text)
            history.append_segment(text, self._tokens(text, add_special_tokens=False), system=False)
        return histories


# --- setting up ---------------------------------------------------------------------------------------------------


def test_setup(make):
    tool = EchoTool()
    environment = make([tool], prompt="I am a prompt!\n")
    assert environment.prompt == "I am a prompt!\n"
    assert environment.tools == {"EchoTool": tool}
    assert make({"echo": tool}).tools == {"echo": tool}
    assert environment.current_device == torch.device("cpu")
    assert (environment.max_turns, environment.max_tool_response) == (4, 100)


def test_tools_must_be_named(make):
    with pytest.raises(TypeError, match="tools=None"):
        make(None)
    with pytest.raises(ValueError, match="several of one class"):
        make([EchoTool(), EchoTool()])


@pytest.mark.parametrize("setting", [{"tool_timeout": 0}, {"tool_workers": 0}, {"max_tool_reponse": 2}])
def test_wrong_settings(make, setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make(**setting)


# --- one turn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("Something <request><Tool1>Hello there!<call>", ("Tool1", "Hello there!")),
        ("<request>so <Tool>a > b\nc<call>d<call>", ("Tool", "a > b\nc")),
        ("<request><Tool><call>", ("Tool", "")),
        ("Something <Tool1>Hello there!<call>", (None, None)),
        ("Something <request><Tool1>Hello there!", (None, None)),
        ("Something <request>|Tool2|Hello there!<call>", (None, None)),
        ("<>abcdefghijklm<>nopqrstuvwxyz<>", (None, None)),
    ],
)
def test_parse_tool_call(make, text, call):
    assert make().parse_tool_call(text) == call


def broken(text: str) -> str:
    raise ZeroDivisionError("of course")


@pytest.mark.parametrize("timeout", [None, 5])
@pytest.mark.parametrize(
    ("text", "response"),
    [
        ("<request><echo>hi<call>", "hi"),
        ("<request><nope>hi<call>", "Unknown tool nope."),
        ("<request>nope<call>", "Unknown tool call: <request>nope<call>"),
        ("<request><broken>hi<call>", "Tool error: of course"),
        ("<request><echo>" + "a" * 31 + "<call>", "a" * 27 + "..."),
        ("<request><echo>" + "a" * 30 + "<call>", "a" * 30),
    ],
)
def test_step_answers(make, tokenizer, text, response, timeout):
    tools = {"echo": EchoTool(), "broken": broken}
    environment = make(tools, max_tool_reponse=30 if "echo" in text else 100, tool_timeout=timeout)
    history = environment.step(TextHistory(text, TOKENS))
    assert history.last_text_segment == response + "<response>"
    assert history.system_spans == [True, True]
    assert tokenizer.decode(history.tokens[3:]) == response + "<response>"
    assert not history.completed


def test_a_tool_that_takes_too_long_is_an_answer(make):
    history = make({"slow": slow}, tool_timeout=0.05).step(TextHistory("<request><slow>1<call>", TOKENS))
    assert history.last_text_segment == "Tool error: no answer within 0.05 s<response>"


def test_a_tool_must_answer_with_a_string(make):
    with pytest.raises(TypeError, match=r"tools\['length'\] answered with int"):
        make({"length": len}).step(TextHistory("<request><length>abc<call>", TOKENS))


def test_step_ends_an_episode(make):
    history = make().step(TextHistory("no call here", TOKENS))
    assert history.completed
    assert history.text == "no call here"


@pytest.mark.parametrize(
    ("text", "model_turn", "ended"),
    [
        ("<request><tool>x<call>", True, False),
        ("answer<response>", False, False),
        ("neither", True, True),
        ("<request> alone", True, True),
        ("done<submit>", True, True),
        ("done<submit>", False, True),
        ("<request><tool>x<call> <|endoftext|>", True, True),
    ],
)
def test_task_end_check(make, text, model_turn, ended):
    environment = make()
    assert environment.task_end_check(TextHistory(text, TOKENS), model_turn=model_turn) == (False, ended)
    history = environment.tasks_end_check([TextHistory(text, TOKENS)], model_turn=model_turn)[0]
    assert history.completed is ended
    assert not history.truncated


def test_max_length_counts_the_tokens_of_the_history(make):
    call = TextHistory("<request><tool>x<call>", TOKENS)
    assert make(max_length=3).task_end_check(call) == (False, False)
    assert make(max_length=2).task_end_check(call) == (True, True)
    call.complete()
    assert make(max_length=2).task_end_check(call) == (False, False)


# --- whole episodes -----------------------------------------------------------------------------------------------


def always_call(histories):
    for history in histories:
        history.append_segment("<request><EchoTool>test<call>", TOKENS, system=False)
    return histories


@pytest.mark.parametrize("turns", [0, 1, 2, 4])
def test_max_turns(make, turns):
    environment = make([EchoTool()], prompt="I am a prompt!\n")
    environment.max_turns = turns
    with patch.object(TextEnvironment, "generate", side_effect=always_call):
        histories = environment.run(["test"])[-1]
    assert histories[0].text == "I am a prompt!\ntest" + "<request><EchoTool>test<call>test<response>" * turns
    assert not histories[0].completed


def test_run_returns_what_was_sampled_and_by_whom(make, tokenizer):
    environment = make([EchoTool()], lambda texts, bonus: [len(text) + bonus for text in texts], max_turns=2)
    with patch.object(TextEnvironment, "generate", side_effect=always_call):
        queries, responses, masks, rewards, histories = environment.run(["Hi!", "Hi! Kenobi!"], bonus=1)
    assert [tokenizer.decode(query) for query in queries] == ["Hi!", "Hi! Kenobi!"]
    answer = tokenizer("test<response>").input_ids
    for response, mask in zip(responses, masks, strict=True):
        assert response.tolist() == [1, 2, 3, *answer] * 2
        assert mask.tolist() == ([1] * 3 + [0] * len(answer)) * 2
    assert rewards == [len("test<response>") + 1] * 2
    assert [history.reward for history in histories] == rewards
    for history in histories:
        assert torch.equal(history.tokens, torch.cat(history.split_query_response_tokens()[:2]))


def test_rewards(make):
    histories = [TextHistory("text", TOKENS) for _ in range(8)]
    environment = make(reward_fn=lambda texts: [torch.tensor(i) for i, _ in enumerate(texts)])
    assert [history.reward for history in environment.compute_reward(histories)] == list(range(8))
    with pytest.raises(ValueError, match="1 rewards for 8 episodes"):
        make(reward_fn=lambda texts: [1.0]).compute_reward(histories)

    async def later(texts):
        return [None] + [2.0] * (len(texts) - 1)

    make(reward_fn=later).compute_reward(histories)
    assert math.isnan(histories[0].reward)  # no opinion
    assert {history.reward for history in histories[1:]} <= {2.0}
    with pytest.raises(ValueError, match="reward_fn gave None; give a list"):
        make(reward_fn=lambda texts: None).compute_reward(histories)
    with pytest.raises(ValueError, match="reward_fn=None"):
        make(reward_fn=None).compute_reward(histories)


def test_nothing_to_run(make):
    assert make(reward_fn=lambda texts: []).run([]) == ([], [], [], [], [])


def test_special_tokens_stand_only_before_the_query(model):
    tokenizer = byte_tokenizer(bos="<s>", eos="</s>", add_bos=True)
    environment = Scripted(
        model, tokenizer, [EchoTool()], lambda texts: [0.0], script=lambda text: "<request><EchoTool>x<call>"
    )
    history = environment.run(["q"])[-1][0]
    assert history.tokens.tolist().count(tokenizer.bos_token_id) == 1
    assert history.tokens[0] == tokenizer.bos_token_id


def test_episodes_of_different_lengths(make):
    def script(text: str) -> str:
        asked, limit = text.count("<call>"), int(text[0])
        return "<request><EchoTool>more<call>" if asked < limit else "enough<submit>"

    environment = make([EchoTool()], kind=Scripted, script=script)
    histories = environment.run(["0", "3", "1"])[-1]
    assert [history.text.count("<response>") for history in histories] == [0, 3, 1]
    assert all(history.completed and history.last_text_segment == "enough<submit>" for history in histories)
    assert environment.batches == [3, 2, 1, 1]


def test_truncation_after_a_tools_answer(make):
    environment = make(
        [EchoTool()], kind=Scripted, script=lambda text: "<request><EchoTool>long answer<call>", max_length=50
    )
    history = environment.run(["q"])[-1][0]
    assert (history.completed, history.truncated) == (True, True)
    assert history.last_text_segment == "long answer<response>"
    assert len(history.tokens) > 50


def test_a_policy_lends_its_tokenizer(make, tokenizer):
    environment = TextEnvironment(tools=[])
    ready = environment.for_policy(tokenizer, [])
    assert (ready.tokenizer, environment.tokenizer) == (tokenizer, None)
    assert ready.for_policy(byte_tokenizer(), []) is ready
    with pytest.raises(ValueError, match="tokenizer=None: an environment needs one"):
        environment.run(["q"])


# --- rows are independent -----------------------------------------------------------------------------------------


def count_up(text: str) -> str:
    asked = text.count("<call>")
    return f"<request><slow>{text[0]}.{asked}<call>" if asked < 3 else "end<submit>"


def test_a_slow_tool_does_not_hold_the_batch(make):
    release, order = threading.Event(), []

    def tool(text: str) -> str:
        if text.startswith("0"):
            release.wait(20)
        elif text == "1.2":
            release.set()  # the others are through before the slow row gets its first answer
        order.append(text)
        return text

    environment = make({"slow": tool}, kind=Scripted, script=count_up)
    histories = environment.run(["0", "1", "2"])[-1]
    assert order.index("1.1") < order.index("0.0")
    assert [history.text.count("<response>") for history in histories] == [3, 3, 3]


def test_rollouts_do_not_depend_on_the_timing_of_tools(make):
    rollouts = []
    for trial in range(4):
        delays = random.Random(trial)

        def tool(text: str, delays=delays) -> str:
            time.sleep(delays.random() * 0.02)
            return text[::-1]

        environment = make({"slow": tool}, kind=Scripted, script=count_up)
        rollouts.append([history.tokens.tolist() for history in environment.run([str(i) for i in range(6)])[-1]])
    assert all(rollout == rollouts[0] for rollout in rollouts)


# --- the model ----------------------------------------------------------------------------------------------------

GREEDY = {"do_sample": False, "max_new_tokens": 6}
SAMPLED = {"do_sample": True, "top_k": 0, "max_new_tokens": 6}
ONLY_GENERATE = {"renormalize_logits": True}
PATHS = {"sampler": {}, "generate": ONLY_GENERATE}


@pytest.mark.parametrize("path", PATHS)
def test_batched_and_single_generation_agree(make, tokenizer, path):
    environment = make(generation_kwargs=GREEDY | PATHS[path])
    queries = [tokenizer(text, return_tensors="pt").input_ids[0] for text in ("this is a test", "another, longer test")]
    batched = environment._generate_batched(queries, batch_size=2)
    single = [environment._generate_batched([query], batch_size=1)[0] for query in queries]
    assert [ids.tolist() for ids in batched] == [ids.tolist() for ids in single]
    padded = environment._generate_batched(queries, pad_to_multiple_of=16)
    assert [ids.tolist() for ids in padded] == [ids.tolist() for ids in single]
    assert tokenizer.padding_side == "right"
    assert environment.generation_kwargs == GREEDY | PATHS[path]


def test_both_ways_to_generate_agree(make, tokenizer):
    queries = [tokenizer(text, return_tensors="pt").input_ids[0] for text in ("one", "number two", "3")]
    ways = [make(generation_kwargs=GREEDY | PATHS[path])._generate_batched(queries) for path in PATHS]
    assert [ids.tolist() for ids in ways[0]] == [ids.tolist() for ids in ways[1]]


@pytest.mark.parametrize("path", PATHS)
def test_a_turn_ends_with_the_end_token(make, tokenizer, model, path):
    query = tokenizer("this", return_tensors="pt").input_ids[0]
    said = make(generation_kwargs=GREEDY | PATHS[path])._generate_batched([query, query[:2]])[0]
    ended = make(generation_kwargs=GREEDY | PATHS[path] | {"eos_token_id": [int(said[2])]})
    assert ended._generate_batched([query, query[:2]])[0].tolist() == said[: said.tolist().index(said[2]) + 1].tolist()


@pytest.mark.parametrize("path", PATHS)
def test_a_turn_ends_with_a_stop_string(make, tokenizer, path):
    environment = make(generation_kwargs=GREEDY | PATHS[path])
    queries = [tokenizer(text, return_tensors="pt").input_ids[0] for text in ("one", "number two")]
    said = environment._generate_batched(queries)
    stop = environment.submit_token = tokenizer.decode(said[1][:3])[-2:]
    for before, cut in zip(said, environment._generate_batched(queries), strict=True):
        ends = [end for end in range(1, len(before)) if stop in tokenizer.decode(before[:end])]
        assert cut.tolist() == before[: ends[0] if ends else None].tolist()


@pytest.mark.parametrize("path", PATHS)
def test_prompt_model_and_tool_tokens_are_what_the_model_saw(make, tokenizer, path):
    history = make(generation_kwargs=SAMPLED | PATHS[path], prompt="P").run(["q"])[-1][0]
    assert history.completed
    pieces = [history.tokens[start:end] for start, end in history.token_spans]
    assert torch.equal(torch.cat(pieces), history.tokens)
    assert tokenizer.decode(pieces[0]) == "Pq"
    assert history.token_masks.tolist() == [0, 0] + [1] * len(pieces[1])
    assert 1 <= len(pieces[1]) <= 6


class Talker(TextEnvironment):
    """Takes whatever its random model says for a call of the only tool, and keeps what the model was given."""

    given: list

    def _own_turns(self):
        turns = super()._own_turns()
        speak = turns.speak
        turns.speak = lambda texts, *rest: self.given.extend(text.tolist() for text in texts) or speak(texts, *rest)
        return turns

    def task_end_check(self, history, model_turn=True):
        return False, False

    def parse_tool_call(self, text):
        return "tool", text


def talk(make, tool, rows=5, **settings):
    environment = make({"tool": tool}, kind=Talker, max_turns=3, generation_kwargs=SAMPLED, **settings)
    environment.given = []
    torch.manual_seed(3)
    return environment.run([f"row {i % 2}" for i in range(rows)]), environment.given


def test_every_turn_is_given_the_tokens_so_far(make, model):
    (queries, responses, masks, _, histories), given = talk(make, len_and_back)
    for history, query, response, mask in zip(histories, queries, responses, masks, strict=True):
        whole = torch.cat([query, response]).tolist()
        spans = zip(history.token_spans, history.system_spans, strict=True)
        starts = [start for (start, _), system in spans if not system]
        assert len(starts) == 3
        assert all(whole[:start] in given for start in starts)
        logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(whole)[1:, None])
        sampled = mask.bool()
        expected = logprobs.squeeze(1)[len(query) - 1 :][sampled]
        torch.testing.assert_close(history.token_logprobs[len(query) :][sampled], expected.detach(), atol=1e-4, rtol=0)


def len_and_back(text: str) -> str:
    return f"[{len(text)}]"


def test_rollouts_of_a_model_do_not_depend_on_the_timing_of_tools(make):
    rollouts = []
    for trial in range(5):
        delays = random.Random(trial)

        def tool(text: str, delays=delays) -> str:
            time.sleep(0.05 * delays.random() ** 4)
            return len_and_back(text)

        settings = {"tool_timeout": None} if trial == 0 else {}
        rollouts.append([history.tokens.tolist() for history in talk(make, tool, **settings)[0][-1]])
    assert all(rollout == rollouts[0] for rollout in rollouts)
    assert len({tuple(row) for row in rollouts[0]}) == 5  # rows with the same query differ


def test_a_full_context_truncates(make, model):
    history = TextHistory("x", torch.full((512,), 20))
    assert make().generate([history])[0].truncated
    assert len(history.tokens) == 512


def test_rollout_records(make):
    (queries, responses, masks, rewards, histories), _ = talk(make, len_and_back)
    rollout = as_rollout(histories)
    assert rollout.prompts == [query.tolist() for query in queries]
    assert rollout.completions == [response.tolist() for response in responses]
    assert rollout.masks == [mask.tolist() for mask in masks]
    assert rollout.rewards == rewards
    assert rollout.metadata["completed"] == rollout.metadata["truncated"] == [False] * 5
    assert rollout.metadata["histories"] == histories
    assert rollout.metadata["turn_rewards"] == [[0.0] * 3] * 5
    for ends, mask in zip(rollout.metadata["turn_ends"], rollout.masks, strict=True):
        assert ends == [i + 1 for i in range(len(mask)) if mask[i] and mask[i + 1 : i + 2] != [1]]
    for logprobs, mask in zip(rollout.logprobs, rollout.masks, strict=True):
        assert [logprob < 0 for logprob in logprobs] == [m == 1 for m in mask]
    by_generate = make(generation_kwargs=SAMPLED | ONLY_GENERATE).run(["q"])[-1]
    with pytest.raises(ValueError, match=r"histories\[0\]: log-probabilities of sampled tokens are unknown"):
        as_rollout(by_generate)


def test_exports():
    assert StringStoppingCriteria.__module__ == "trl.generation.stopping"
    assert re.match("trl.environment", TextEnvironment.__module__)
