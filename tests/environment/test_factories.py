"""Objects of an `environment_factory`: rewards, tools, names, async methods, use after use, and the end."""

import asyncio
import itertools
import logging
import math
import random
import threading

import pytest
from test_chat_environment import Counter, call, chat, row
from tokenizers_for_tests import CHATML, byte_tokenizer

from trl.data.user_functions import accepted
from trl.environment.base_environment import TextEnvironment
from trl.environment.chat_environment import ChatEnvironment
from trl.environment.factories import Factories


class Word:
    """Its reward is what `get_reward` gives."""

    def reset(self, goal: str = "a"):
        self.goal, self.said = goal, []

    def guess(self, word: str) -> str:
        """Guess.

        Args:
            word: The word.
        """
        self.said.append(word)
        return "yes" if word == self.goal else "no"

    def get_reward(self):
        return 1.0 if self.goal in self.said else None if not self.said else -1.0


def guesses(*words):
    """A model that guesses these words, one a turn."""
    return lambda text, turn: call("guess", word=words[turn]) if turn < len(words) else "Done."


# --- rewards (E1, E3) ---------------------------------------------------------------------------------------------


def test_get_reward_is_the_reward_and_no_tool():
    """E1"""
    environment = ChatEnvironment(environment_factory=Word)
    assert [schema["function"]["name"] for schema in environment.schemas] == ["guess"]
    rollout, _, _ = chat(environment, guesses("b", "c"), [row(goal="c"), row(goal="d")])
    assert rollout.rewards == [1.0, -1.0]
    rollout, _, _ = chat(environment, guesses(), [row()])
    assert math.isnan(rollout.rewards[0])  # no opinion
    assert environment.reward_names == {None: "Word"}


def test_get_reward_is_not_added_to_the_attribute_of_the_same_sum():
    """E1, variant: both are there; an async one that reads the row and what was said."""

    class Both(Counter):
        async def get_reward(self, goal, completion):
            return self.reward + goal + len(completion)

    rollout, _, _ = chat(ChatEnvironment(environment_factory=Both), lambda *_: call("up"), [row(goal=2)])
    assert rollout.rewards == pytest.approx([0.2 + 2 + 4])  # two turns and their answers
    assert rollout.metadata["turn_rewards"] == [pytest.approx([0.1, 0.1])]


def test_get_reward_in_a_text_environment():
    """E1, variant: with a reward_fn besides."""

    class Says(Word):
        def guess(self, text: str) -> str:
            return super().guess(text)

    tokenizer = byte_tokenizer()
    for reward_fn, reward in ((None, 1.0), (lambda texts, **columns: [0.5] * len(texts), 1.5)):
        environment = TextEnvironment(None, tokenizer, None, reward_fn, environment_factory=Says)
        (episode,) = environment._begin([{"prompt": "p", "goal": "b"}], [0])
        assert environment.call_tool("<request><guess>b<call>", episode.own.tools) == "yes"
        assert "get_reward" not in episode.own.tools
        environment.compute_reward([episode.history])
        assert episode.history.reward == reward


@pytest.mark.parametrize(
    ("value", "error", "wrong"),
    [(math.nan, ValueError, "gave nan"), ("1,0", TypeError, "gave '1,0'"), (SystemExit(3), RuntimeError, "asked the")],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_no_reward_is_named(value, error, wrong, asynchronous):
    """E1, R4"""

    class Odd(Word):
        def get_reward(self):
            if isinstance(value, BaseException):
                raise value
            return value

    class AsyncOdd(Odd):
        async def get_reward(self):
            return super().get_reward()

    factory = AsyncOdd if asynchronous else Odd
    with pytest.raises(error, match=rf"^{factory.__name__}.get_reward\(\) {wrong}"):
        chat(ChatEnvironment(environment_factory=factory), guesses(), [row()])


def rewarded(**attributes):
    """Objects whose `reset` sets these attributes, and which have a tool."""

    class Holder:
        def reset(self):
            self.__dict__.update(attributes)

        def go(self) -> str:
            """Go."""
            return "gone"

    return Holder


@pytest.mark.parametrize("held", [None, math.nan, {"parts": 1.0}, [0.0]])
def test_an_attribute_reward_that_is_no_number(held):
    """E1: it is named, and does not matter where `get_reward` judges."""
    holder = rewarded(reward=held)
    with pytest.raises(ValueError, match=r"^Holder.reward is .*; give a finite number, the sum so far"):
        chat(ChatEnvironment(environment_factory=holder), lambda *_: "x", [row()])
    holder.get_reward = lambda self: 2.0
    assert chat(ChatEnvironment(environment_factory=holder), lambda *_: "x", [row()])[0].rewards == [2.0]


def test_methods_called_reward_and_done_are_tools():
    """E1: a method is always true, and no number; a property is what it gives."""

    class Methods(rewarded()):
        def done(self) -> bool:
            """Say that it is done."""
            return False

        def reward(self) -> float:
            """Ask for the reward."""
            return 1.0

    environment = ChatEnvironment(environment_factory=Methods)
    environment.needs_rewards = True
    with pytest.raises(ValueError, match="Methods has no get_reward"):
        chat(environment, lambda *_: "x", [row()])
    environment.needs_rewards = False
    rollout, _, _ = chat(environment, lambda text, turn: call("done") if turn < 2 else "x", [row()])
    assert rollout.metadata["tools_called"] == [2]

    class Properties(rewarded()):
        done = property(lambda self: True)
        reward = property(lambda self: 0.5)

    rollout, _, _ = chat(ChatEnvironment(environment_factory=Properties), lambda *_: call("go"), [row()])
    assert (rollout.rewards, rollout.metadata["tools_called"]) == ([0.5], [1])


def test_a_method_inherits_its_docstring():
    class Loud(Word):
        def guess(self, word: str) -> str:
            return super().guess(word).upper()

    environment = ChatEnvironment(environment_factory=Loud)
    assert environment.schemas == ChatEnvironment(environment_factory=Word).schemas
    rollout, _, _ = chat(environment, guesses("a"), [row()])
    assert rollout.metadata["completions"][0][1]["content"] == "YES"


def test_a_helper_that_cannot_be_described_is_named_with_a_way_out():
    class Helped(Word):
        def helper(self, word):
            return word

    with pytest.raises(ValueError, match=r"helper cannot be .*; a method that is no tool begins with an underscore$"):
        ChatEnvironment(environment_factory=Helped)


def test_what_reset_sets_is_there():
    """E3: the reward, and a tool."""

    class Late:
        def reset(self, step: int):
            self.reward = 0.0

            def more(by: int) -> str:
                """Add.

                Args:
                    by: How much.
                """
                self.reward += by * step
                return "done"

            self.more = more

    environment = ChatEnvironment(environment_factory=Late)
    assert environment.schemas == []
    assert environment.gives_rewards
    for step in (1, 3):  # the second episode has the same object
        rollout, _, tokenizer = chat(
            environment, lambda text, turn: call("more", by=2) if not turn else "x", [row(step=step)]
        )
        assert rollout.rewards == [2.0 * step]
        assert '"more"' in tokenizer.decode(rollout.prompts[0])


def test_an_object_without_rewards_is_named_after_its_first_reset():
    """E3, variant"""

    class Poor(Word):
        get_reward = None

    environment = ChatEnvironment(environment_factory=Poor)
    environment.needs_rewards = True
    with pytest.raises(
        ValueError, match=r"^reward_funcs: the environment gives no rewards: Poor has no get_reward\(\)"
    ):
        chat(environment, guesses(), [row()])


def test_a_class_may_have_no_tools():
    """E3, variant: with a template that knows none; what looks like a call is an answer."""

    class Asks:
        def reset(self):
            return "2 + 2?"

        def get_reward(self, completion):
            return float(completion[-1]["content"].count("4"))

    environment = ChatEnvironment(environment_factory=Asks)
    rollout, _, _ = chat(environment, lambda *_: "4" + call("x"), [{}, row()], template=CHATML)
    assert rollout.rewards == [1.0, 1.0]
    assert [len(messages) for messages in rollout.metadata["completions"]] == [1, 1]


# --- several factories (E2) ---------------------------------------------------------------------------------------

GAMES = {"word": Word, "count": Counter}


def test_a_row_names_its_environment():
    """E2: and is offered the tools of that one alone."""
    environment = ChatEnvironment(environment_factory=GAMES)
    rows = [row(environment="count", goal=1), row(environment="word", goal="b"), row(environment="count", goal=2)]

    def script(text, turn):
        return call("up") if '"up"' in text else guesses("b")(text, turn)

    rollout, _, tokenizer = chat(environment, script, rows)
    assert rollout.rewards == pytest.approx([0.1, 1.0, 0.2])
    said = [prompt[-1]["content"] for prompt in rollout.metadata["prompts"]]  # whether or not the rows have prompts
    assert said == ["hi Count to 1.", "hi", "hi Count to 2."]
    offered = [tokenizer.decode(ids) for ids in rollout.prompts]
    assert ['"up"' in text for text in offered] == [True, False, True]
    assert ['"guess"' in text for text in offered] == [False, True, False]
    assert environment.reward_names == {"word": "Word", "count": "Counter"}
    assert sorted(schema["function"]["name"] for schema in environment.schemas) == ["guess", "up"]


def test_two_names_of_one_class():
    """E2, variant: rewards are told apart by the names."""
    environment = ChatEnvironment(environment_factory={"easy": Word, "hard": lambda: Word(), "sum": Counter})
    assert environment.reward_names == {"easy": "easy", "hard": "hard", "sum": "Counter"}


@pytest.mark.parametrize(
    ("columns", "wrong"),
    [
        ({"environment": "wrod"}, "column 'environment' is 'wrod': environment_factory has 'word', 'count'"),
        ({"environment": ["word"]}, r"column 'environment' is \['word'\]: "),
        ({}, "column 'environment' is missing: give one of the names in environment_factory, 'word', 'count'"),
    ],
)
def test_a_name_that_is_not_there(columns, wrong):
    """E2"""
    with pytest.raises(ValueError, match=f"^{wrong}"):
        chat(ChatEnvironment(environment_factory=GAMES), guesses(), [row(**columns)])


def test_a_dict_of_one_needs_no_name():
    """E2, variant"""
    rollout, _, _ = chat(ChatEnvironment(environment_factory={"word": Word}), guesses("a"), [row()])
    assert rollout.rewards == [1.0]
    with pytest.raises(ValueError, match=r"^environment_factory={}: give"):
        ChatEnvironment(environment_factory={})
    with pytest.raises(ValueError, match=r"environment_factory\['a'\]: a list makes no environment"):
        ChatEnvironment(environment_factory={"a": []})


# --- prompts of the environment (E2) ------------------------------------------------------------------------------


class Draws(Word):
    """Says the prompt, drawn from Python's generator."""

    def reset(self):
        super().reset()
        return [{"role": "system", "content": "Play."}, {"role": "user", "content": f"{random.random()}"}]


def test_reset_says_the_prompt():
    """E2: rows of one seed get one prompt, and nothing else draws other numbers."""
    environment = ChatEnvironment(environment_factory=Draws)
    random.seed(1)
    rollout, _, tokenizer = chat(environment, guesses(), [{"seed": 3}, {"seed": 3}, {"seed": 4, "prompt": []}])
    assert random.random() == random.Random(1).random()
    first, second, third = rollout.metadata["prompts"]
    assert first == second != third
    assert first[1]["content"] == f"{random.Random(3).random()}"
    assert f"<|im_start|>user\n{first[1]['content']}<|im_end|>" in tokenizer.decode(rollout.prompts[0])


def test_a_text_is_the_user_s():
    """E2, variants: behind a system message; nobody says anything; prompts of the data set stay."""

    class Says(Word):
        def reset(self, said):
            super().reset()
            return said

    environment = ChatEnvironment(environment_factory=Says)
    system = {"role": "system", "content": "Play."}
    rows = [{"said": "Go!"}, {"prompt": [system], "said": "Go!"}, row("Now: ", said="Go!"), row(said=None)]
    rollout, _, _ = chat(environment, guesses(), rows)
    said = rollout.metadata["prompts"]
    user = {"role": "user", "content": "Go!"}
    assert said == [[user], [system, user], [{"role": "user", "content": "Now: Go!"}], row()["prompt"]]
    with pytest.raises(ValueError, match=r"^prompt: the row has none, and reset\(\) gave none"):
        chat(environment, guesses(), [{"said": None}])
    with pytest.raises(TypeError, match=r"^Says.reset\(\) gave int"):
        chat(environment, guesses(), [{"said": 3}])


# --- async (E9) ---------------------------------------------------------------------------------------------------


class Meeting:
    """Calls that end when so many are there at once."""

    def __init__(self, count):
        self.count, self.here, self.met, self.all = count, 0, [], asyncio.Event()

    async def __call__(self, what):
        self.here += 1
        self.met.append((what, threading.current_thread().name))
        if self.here == self.count:
            self.all.set()
            self.here, self.all = 0, asyncio.Event()
        else:
            await asyncio.wait_for(self.all.wait(), 20)


@pytest.mark.parametrize("timeout", [None, 30])
def test_async_methods_of_all_episodes_meet(timeout):
    """E9: more of them than there are threads for tools."""
    meeting, count = Meeting(20), 20

    class Remote:
        async def reset(self):
            await meeting("reset")
            return "!"

        async def look(self) -> str:
            """Look."""
            await meeting("look")
            return "seen"

        async def get_reward(self):
            await meeting("get_reward")
            return 1

        async def close(self):
            await meeting("close")

    environment = ChatEnvironment(environment_factory=Remote, tool_timeout=timeout, tool_workers=2)
    script = lambda text, turn: call("look") if not turn else "x"  # noqa: E731
    rollout, _, _ = chat(environment, script, [row()] * count)
    environment.close()
    assert [what for what, _ in meeting.met[::count]] == ["reset", "look", "get_reward", "close"]
    assert {thread for _, thread in meeting.met} == {"async functions"}
    assert rollout.rewards == [1.0] * count
    assert all(messages[1]["content"] == "seen" for messages in rollout.metadata["completions"])


@pytest.mark.parametrize("timeout", [None, 30])
def test_async_tools_of_text_environments_meet(timeout):
    """E9, variant: a tool for all rows, as an object; one semaphore for all calls."""
    meeting = Meeting(5)

    class Ask:
        gate = asyncio.Semaphore(5)

        async def __call__(self, text):
            async with self.gate:
                await meeting(text)
            return text.upper()

    environment = TextEnvironment(None, byte_tokenizer(), [Ask()], list, tool_timeout=timeout, tool_workers=1)
    for _ in range(2):
        episodes = environment._begin([{"prompt": "p"}] * 5, list(range(5)))
        for episode in episodes:
            text = "<request><Ask>a<call>"
            episode.history.append_segment(text, environment._tokens(text, add_special_tokens=False), system=False)
        from trl.environment.tool_calls import ToolCalls

        calls = ToolCalls(timeout, 1)
        for episode in episodes:
            calls.start(episode.row, environment._read_turn(episode)[0])
        answers = {}
        while len(calls):
            answers |= calls.collect(0)
        assert answers == dict.fromkeys(range(5), "A")


def test_an_async_method_past_its_time_is_cancelled_and_its_object_goes_on():
    """E9: the time limit is that of a call."""
    cancelled = []

    class Slow(Word):
        async def hang(self) -> str:
            """Hang."""
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.append(True)
            return ""

    environment = ChatEnvironment(environment_factory=Slow, tool_timeout=0.05)
    said = itertools.chain([call("hang"), call("guess", word="a")], itertools.repeat("Done."))
    rollout, _, _ = chat(environment, lambda *_: next(said), [row()])
    heard = [m["content"] for m in rollout.metadata["completions"][0] if m["role"] == "tool"]
    assert heard == ["Tool error: no answer within 0.05 s", "yes"]
    assert cancelled == [True]


def test_functions_that_give_coroutines_are_awaited_too():
    """E9, variant: `def` with a coroutine; a reset that fails cancels the others."""
    cancelled, other = threading.Event(), asyncio.Event()

    class Fails(Word):
        def reset(self, fails):
            return self._reset(fails)

        async def _reset(self, fails):
            if fails:
                await other.wait()
                raise OSError("of course")
            other.set()
            try:
                await asyncio.sleep(60)
            finally:
                cancelled.set()

    environment = ChatEnvironment(environment_factory=Fails)
    with pytest.raises(OSError, match="of course"):
        chat(environment, guesses(), [row(fails=True), row(fails=False)])
    assert cancelled.wait(20)


# --- use after use, and the end (E10) -----------------------------------------------------------------------------


def kept(cls):
    """The class, with lists of the objects made and closed, and of the resets."""
    made, closed, resets = [], [], []

    class Kept(cls):
        def __init__(self):
            super().__init__()
            made.append(self)

        def reset(self, **columns):
            resets.append(self)
            return super().reset(**accepted(super().reset, columns))

        def close(self):
            closed.append(self)

    Kept.__name__ = cls.__name__
    return Kept, made, closed, resets


def test_objects_are_used_again_and_closed_once():
    """E10"""
    factory, made, closed, resets = kept(Word)
    environment = ChatEnvironment(environment_factory=factory)
    for rows in (3, 2, 4, 4):
        rollout, _, _ = chat(environment, guesses("a"), [row()] * rows)
        assert rollout.rewards == [1.0] * rows
        assert len({id(each) for each in rollout.metadata["environments"]}) == rows
    assert len(made) == 4
    assert [resets.count(each) for each in made] == [4, 4, 3, 2]
    assert closed == []
    environment.close()
    environment.close()
    assert closed == made
    chat(environment, guesses("a"), [row()])
    assert len(made) == 5


def test_objects_that_reset_leaves_as_they_were_are_made_anew(caplog):
    """E10, variant: state of the constructor, as in `Counter`; the line comes once, and the old objects are closed."""
    factory, made, closed, _ = kept(Counter)
    environment = ChatEnvironment(environment_factory=factory)
    for _ in range(3):
        rollout, _, _ = chat(environment, lambda *_: call("up"), [row(goal=2), row(goal=1)])
        assert rollout.rewards == pytest.approx([0.2, 0.1])
    assert len(made) == 6
    (line,) = [record.getMessage() for record in caplog.records if "reset()" in record.getMessage()]
    assert line.startswith("environment_factory: Counter.reset() leaves count, done, reward as the last episode left")
    environment.close()
    assert sorted(map(id, closed)) == sorted(map(id, made))


@pytest.mark.parametrize(("reusable", "objects", "rewards"), [(True, 1, [1.0, 2.0]), (False, 2, [1.0, 1.0])])
def test_a_class_says_whether_its_objects_are_used_again(reusable, objects, rewards, caplog):
    """E10, variant"""

    class Sums:
        made = 0

        def __init__(self):
            self.total = 0.0
            type(self).made += 1

        def reset(self):
            pass

        def more(self) -> str:
            """More."""
            self.total += 1
            return ""

        def get_reward(self):
            return self.total

    Sums.reusable = reusable
    environment = ChatEnvironment(environment_factory=Sums)
    script = lambda text, turn: call("more") if not turn else "x"  # noqa: E731
    assert [chat(environment, script, [row()])[0].rewards[0] for _ in range(2)] == rewards
    assert Sums.made == objects
    assert not caplog.records


def test_an_object_with_a_late_call_is_not_used_again():
    """E10, variant"""
    release = threading.Event()

    class Hangs(Word):
        def hang(self) -> str:
            """Hang."""
            release.wait(30)
            return ""

    factory, made, closed, _ = kept(Hangs)
    environment = ChatEnvironment(environment_factory=factory, tool_timeout=0.05)
    chat(environment, lambda text, turn: call("hang") if not turn else "x", [row()])
    chat(environment, guesses("a"), [row()])
    assert len(made) == 2
    assert closed == []
    release.set()
    environment.close()
    assert sorted(map(id, closed)) == sorted(map(id, made))


@pytest.mark.parametrize("error", [OSError("no"), SystemExit(1), asyncio.CancelledError()])
def test_a_close_that_fails_is_told_and_the_others_are_closed(error, caplog):
    """E10, R4"""
    caplog.set_level(logging.WARNING)
    closed = []

    class Fails(Word):
        def close(self):
            closed.append(self)
            raise error

    class AsyncFails(Fails):
        async def close(self):
            super().close()

    factories = Factories({"a": Fails, "b": AsyncFails}, 5)
    factories.begin([{"environment": name} for name in "abab"], [None] * 4)
    factories.close()
    assert len(closed) == 4
    lines = [record.getMessage() for record in caplog.records]
    assert sum("AsyncFails.close() failed" in line for line in lines) == 2
    assert sum(" Fails.close() failed" in line for line in lines) == 2


def test_what_nobody_closes_is_closed_with_its_environment():
    """E10, variant: a trainer that was made and never trained."""
    factory, made, closed, _ = kept(Word)
    ChatEnvironment(environment_factory=factory)
    assert closed == made != []
