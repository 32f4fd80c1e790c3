"""Trainers on environments as people write them: `get_reward`, several classes, prompts of their own, the end."""

import logging
import random
import re
from pathlib import Path

import pytest
import torch
from conformity import config, history, prompts, weights
from datasets import Dataset, IterableDataset, load_dataset
from environments_for_tests import call, follow
from tokenizers_for_tests import TOOLS, byte_tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

import trl
from trl.data.records import Rollout
from trl.environment.chat_environment import ChatEnvironment
from trl.rollout.rewards import Rewards, credit_turns

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
TOKENS = byte_tokenizer(TOOLS)
END = TOKENS.convert_tokens_to_ids("<|im_end|>")


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.WARNING)


def policy():
    torch.manual_seed(0)
    changes = {"vocab_size": len(TOKENS), "max_position_embeddings": 1024, "pad_token_id": 0, "eos_token_id": END}
    shape = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(type(config()).from_dict(config().to_dict() | changes | shape))


def make(folder, factory, rows=None, script=None, algorithm="GRPO", arguments=None, **settings):
    base = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "num_generations": 2, "max_steps": 2,
        "max_completion_length": 200, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    trainer = getattr(trl, f"{algorithm}Trainer")(
        policy(), args=getattr(trl, f"{algorithm}Config")(**{**base, **settings}), train_dataset=rows,
        processing_class=TOKENS, environment_factory=factory, **(arguments or {}),
    )  # fmt: skip
    follow(trainer, script or (lambda text, turn: call("guess", word=text[-30:][:1]) if turn == 0 else "x"))
    return trainer


def talks(*texts, **columns):
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    return Dataset.from_list([{**row, **{k: v[i] for k, v in columns.items()}} for i, row in enumerate(rows)])


class Word:
    """Wants to hear its prompt."""

    made, closed = [], []

    def __init__(self):
        self.made.append(self)

    def reset(self, goal):
        self.goal, self.said = goal, None

    def guess(self, word: str) -> str:
        """Guess.

        Args:
            word: The word.
        """
        self.said = word
        return "no"

    def get_reward(self):
        return float(self.said == self.goal)

    def close(self):
        self.closed.append(self)


@pytest.fixture(autouse=True)
def _forget():
    Word.made.clear()
    Word.closed.clear()


class Sum:
    """Adds up, and says the prompt."""

    def reset(self):
        self.reward, self.asked = 0.0, random.randint(1, 10**6)
        return f"Add {self.asked}."

    def add(self, number: int) -> str:
        """Add.

        Args:
            number: The number.
        """
        self.reward += number
        return "done"


def says_b(text, turn):
    return call("guess", word="b") if turn == 0 else "x"


# --- rewards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_get_reward_is_logged_under_its_class(algorithm, tmp_path):
    """E1"""
    trainer = make(tmp_path, Word, talks("a", "b", goal="ab"), says_b, algorithm, shuffle_dataset=False)
    trainer.train()
    assert history(trainer, "rewards/Word/mean") == history(trainer, "reward") == [0.5, 0.5]
    (rows, *_) = [load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(tmp_path))
                  for file in sorted(Path(tmp_path).glob("rollouts/*.parquet"))]  # fmt: skip
    assert rows["reward_Word"][:] == [0.0, 0.0, 1.0, 1.0]


def test_reward_functions_judge_alone_and_a_line_says_so(tmp_path, caplog):
    """E1, variant"""

    class Asked(Word):
        def get_reward(self):
            raise AssertionError

    def judge(environments):
        return [float(each.said == "b") for each in environments]

    trainer = make(tmp_path, Asked, talks("a", "b", goal="ab"), says_b, arguments={"reward_funcs": judge})
    trainer.train()
    assert history(trainer, "rewards/judge/mean") == [1.0, 1.0]
    (line,) = [record.getMessage() for record in caplog.records if "get_reward" in record.getMessage()]
    assert line.startswith("reward_funcs: they judge alone, get_reward() of Asked is not called")


def test_the_documented_environment_runs_as_it_stands(tmp_path):
    """E3"""
    text = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    (block,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Guess" in each]
    names = {"model": policy(), "tokenizer": TOKENS, "rows": talks("Find it.", "Again.", number=[3, 5])}
    settings = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 300, "max_steps": 1}
    names["config"] = trl.GRPOConfig(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True, **settings)

    class Follows(trl.GRPOTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            follow(self, lambda text, turn: call("guess", n=3 if turn == 0 else 5))
            names["trainer"] = self

    exec(compile(block, "environments.md", "exec"), names | {"GRPOTrainer": Follows})
    names["trainer"].train()
    assert names["trainer"].state.log_history[-1]["train_loss"] is not None
    rollout = names["trainer"].source.draw([dict(row) for row in names["trainer"].train_dataset], 1, 0)
    assert rollout.rewards == [1.0, 1.0]
    assert [len(rewards) for rewards in rollout.metadata["turn_rewards"]] == [1, 2]


def test_a_factory_without_rewards_is_refused_at_its_first_reset(tmp_path):
    """E3, variant: and its objects are closed."""

    class Poor(Word):
        get_reward = None

    with pytest.raises(ValueError, match=r"^reward_funcs: the environment gives no rewards: Poor has no"):
        make(tmp_path, Poor, talks("a", "b", goal="ab")).train()
    assert Word.closed == Word.made != []


# --- several classes ----------------------------------------------------------------------------------------------

BOTH = {"word": Word, "sum": Sum}


def both(text, turn):
    return "x" if turn else call("add", number=2) if '"add"' in text else call("guess", word="b")


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_rewards_of_several_classes_are_logged_apart(algorithm, tmp_path):
    """E2"""
    rows = talks("a", "b", "c", "d", environment=["word", "sum", "sum", "word"], goal="bbbb")
    trainer = make(tmp_path, BOTH, rows, both, algorithm, shuffle_dataset=False, reward_weights=[1.0, 10.0])
    trainer.train()
    assert history(trainer, "rewards/Word/mean") == [1.0, 1.0]
    assert history(trainer, "rewards/Sum/mean") == [2.0, 2.0]
    assert history(trainer, "reward") == [10.5, 10.5]
    assert [len(made) for made in trainer.environment.factories._made.values()] == [0, 0]


@pytest.mark.parametrize("kind", [Dataset.from_list, list])
def test_a_wrong_name_is_told_with_its_row(kind, tmp_path):
    """E2: when the trainer is made."""
    rows = [dict(row) for row in talks("a", "b", "c", environment=["word", "sum", "smu"], goal="abc")]
    with pytest.raises(ValueError, match=r"^row 2 of the train data set: column 'environment' is 'smu': .*'sum'"):
        make(tmp_path, BOTH, kind(rows))
    with pytest.raises(ValueError, match=r"^row 0 of the train data set: column 'environment' is missing"):
        make(tmp_path, BOTH, kind([{"prompt": row["prompt"]} for row in rows]))


def test_a_wrong_name_in_a_stream_is_told_when_it_comes(tmp_path):
    """E2, variant"""
    rows = talks("a", "b", environment=["word", "smu"], goal="ab").to_iterable_dataset()
    with pytest.raises(ValueError, match=r"column 'environment' is 'smu': environment_factory has 'word', 'sum'"):
        make(tmp_path, BOTH, rows).train()


def test_turns_are_credited_in_the_column_of_their_class():
    """E2, variant: two groups of two classes; without a baseline a turn is credited with the rewards from it on."""
    rollout = Rollout(
        [[1]] * 2, [[5] * 4] * 2, [[0.0] * 4] * 2, [[1] * 4] * 2,
        metadata={"turn_ends": [[2, 4]] * 2, "turn_rewards": [[1.0, 2.0], [3.0, 4.0]]},
    )  # fmt: skip
    nan = float("nan")
    rewards = Rewards(["A", "B"], torch.tensor([[3.0, nan], [nan, 7.0]]), torch.tensor([1.0, 2.0]), [None, None])
    credited = credit_turns(rewards, rollout, lambda given: given.total_B(), 1)
    assert credited == [[3.0, 3.0, 2.0, 2.0], [14.0, 14.0, 8.0, 8.0]]


# --- prompts of the environment -----------------------------------------------------------------------------------


def adds(text, turn):
    return "x" if turn else call("add", number=int(re.findall(r"Add (\d+)", text)[-1]) % 7)


def drawn(trainer):
    """The prompts of each rollout of a run."""
    seen, draw = [], trainer.source.draw
    trainer.source.draw = lambda *args: seen.append(draw(*args)) or seen[-1]
    trainer.train()
    return [[said[0]["content"] for said in rollout.metadata["prompts"]] for rollout in seen]


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO"])
def test_without_a_data_set_the_environment_says_the_prompts(algorithm, tmp_path):
    """E2: a group has one prompt, no two groups have the same; files and reward functions show them."""
    trainer = make(tmp_path, Sum, None, adds, algorithm)
    state = random.getstate()
    said = drawn(trainer)
    assert [rows[0] == rows[1] != rows[2] == rows[3] for rows in said] == [True, True]
    assert len({text for rows in said for text in rows}) == 4
    numbers = [int(text[4:-1]) % 7 for rows in said for text in rows]
    assert history(trainer, "reward") == [sum(numbers[:4]) / 4, sum(numbers[4:]) / 4]
    files = sorted(map(str, Path(tmp_path).glob("rollouts/*.parquet")))
    written = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path))["prompt"][:]
    assert [text in row for text, row in zip([t for rows in said for t in rows], written, strict=True)] == [True] * 8
    assert drawn(make(tmp_path / "again", Sum, None, adds, algorithm)) == said
    assert drawn(make(tmp_path / "other", Sum, None, adds, algorithm, data_seed=5)) != said
    random.setstate(state)


def test_the_environments_of_a_dict_take_turns(tmp_path):
    """E2, variant: their reset takes the seed; reward functions get what was said."""
    seen = []

    class Seeded(Sum):
        def reset(self, seed, environment):
            super().reset()
            return [{"role": "user", "content": f"Add {seed}. {environment}"}]

    def judge(prompts, environments, seed):
        said = [prompt[0]["content"] for prompt in prompts]
        seen.extend((text[-1], type(each).__name__) for text, each in zip(said, environments, strict=True))
        assert [f"Add {number}" in text for number, text in zip(seed, said, strict=True)] == [True] * 4
        return [0.0] * len(prompts)

    class Other(Seeded):
        pass

    make(tmp_path, {"a": Seeded, "b": Other}, None, adds, arguments={"reward_funcs": judge}).train()
    assert seen == [("a", "Seeded"), ("a", "Seeded"), ("b", "Other"), ("b", "Other")] * 2


@pytest.mark.parametrize(
    "rows",
    [[{"level": 1}, {"level": 2}], Dataset.from_dict({"level": [1, 2]}),
     [{"level": 1, "prompt": [{"role": "user", "content": "Add 1."}]}, {"level": 2, "prompt": None}],
     IterableDataset.from_generator(lambda: iter([{"level": 1}, {"level": 2}]))],
)  # fmt: skip
def test_rows_without_a_prompt(rows, tmp_path):
    """E2, variants: the data set has the tasks, the environment says them; one row has a prompt."""

    class Level(Sum):
        def reset(self, level, prompt=None):
            said = super().reset()
            return None if prompt else f"{said} Level {level}."

    said = drawn(make(tmp_path, Level, rows, adds, shuffle_dataset=False))
    levels = [[text.rpartition(" ")[2] for text in of_rollout] for of_rollout in said]
    assert levels == [["1.", "1.", "2.", "2."]] * 2
    assert said[0][0] == said[0][1]


def test_what_has_no_end_needs_steps(tmp_path):
    """E2, variant"""
    with pytest.raises(ValueError, match=r"^max_steps=-1: without a train_dataset the environment says the prompts"):
        make(tmp_path, Sum, None, adds, max_steps=-1)
    with pytest.raises(ValueError, match=r"^train_dataset: on-policy training needs prompts; .* whose `reset\(\)`"):
        make(tmp_path, None, None, adds, arguments={"reward_funcs": lambda completions: [0.0]})


def test_other_prompts_in_a_group_are_told(tmp_path):
    """E2, variant: drawn from nothing that a seed holds."""
    numbers = iter(range(100))

    class Counts(Sum):
        def reset(self):
            super().reset()
            return f"Add {next(numbers)}."

    trainer = make(tmp_path, Counts, None, adds)
    with pytest.raises(ValueError, match=r"^environment_factory: reset\(\) said different prompts to the 2 episodes"):
        trainer.train()


def test_a_run_without_a_data_set_resumes_bit_for_bit(tmp_path):
    """E2: in the midst of a rollout."""
    settings = {"max_steps": 4, "steps_per_generation": 2, "num_iterations": 1, "loss_type": "grpo"}
    whole = make(tmp_path / "whole", Sum, None, adds, **settings)
    said = drawn(whole)
    saving = {**settings, "save_strategy": "steps", "save_steps": 1}
    make(tmp_path / "parts", Sum, None, adds, **saving).train()
    resumed = make(tmp_path / "parts", Sum, None, adds, **saving)
    seen, draw = [], resumed.source.draw
    resumed.source.draw = lambda *args: seen.append(draw(*args)) or seen[-1]
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1"))  # a rollout is half used
    assert [[each[0]["content"] for each in rollout.metadata["prompts"]] for rollout in seen] == said[1:]
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_evaluation_rows_may_lack_prompts_too(tmp_path):
    """E2, variant: twice the same; the objects are closed behind it."""
    trainer = make(tmp_path, {"word": Word, "sum": Sum}, talks("b", goal="b", environment=["word"]), both,
                   arguments={"eval_dataset": [{"environment": "sum"}] * 3})  # fmt: skip
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_rewards/Sum/mean"] == second["eval_reward"] == 2.0
    assert Word.closed == Word.made != []


# --- the end ------------------------------------------------------------------------------------------------------


def test_objects_live_as_long_as_the_run(tmp_path):
    """E10: four episodes at once, whatever the number of steps."""
    make(tmp_path, Word, talks("a", "b", goal="ab"), says_b, max_steps=3).train()
    assert len(Word.made) == 4
    assert sorted(map(id, Word.closed)) == sorted(map(id, Word.made))


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), SystemExit(3)])
def test_objects_are_closed_where_a_run_ends_by_an_exception(error, tmp_path):
    """E10, variant"""

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise error

    trainer = make(tmp_path, Word, talks("a", "b", goal="ab"), says_b, arguments={"callbacks": [Fails()]})
    with pytest.raises(type(error)):
        trainer.train()
    assert sorted(map(id, Word.closed)) == sorted(map(id, Word.made))
    assert len(Word.made) == 4


def test_a_reset_that_fails_ends_the_run_and_closes_all(tmp_path):
    """E10, variant: in the second rollout."""
    count = []

    class Fails(Word):
        async def reset(self, goal):
            count.append(goal)
            if len(count) == 6:
                raise ConnectionError("server is gone")
            super().reset(goal)

    with pytest.raises(ConnectionError, match="server is gone"):
        make(tmp_path, Fails, talks("a", "b", goal="ab"), says_b).train()
    assert sorted(map(id, Word.closed)) == sorted(map(id, Word.made))


def test_the_objects_of_a_given_environment_are_closed_too(tmp_path):
    """E10, variant: it can play again."""
    environment = ChatEnvironment(environment_factory=Word)
    for runs in (1, 2):
        folder = tmp_path / str(runs)
        trainer = make(folder, None, talks("a", "b", goal="ab"), says_b, arguments={"environment": environment})
        trainer.train()
        assert len(Word.made) == len(Word.closed) == 4 * runs


def test_plain_prompts_are_as_before(tmp_path):
    """A factory in a trainer of texts: tools need conversations."""
    with pytest.raises(ValueError, match="tools need conversations"):
        make(tmp_path, Sum, prompts()).train()
