"""Rollouts that are drawn ahead of the updates: by which weights, in which order, and what becomes of them."""

import copy
import random
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
import transformers as t
from datasets import Dataset
from environments_for_tests import talkative
from fake_vllm import FakeVLLM
from tokenizers_for_tests import word_tokenizer

from trl import GRPOConfig, GRPOTrainer
from trl.data.records import Completion, Rollout, VersionSpan
from trl.generation.local import LocalSampler
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sampler import VLLMSampler
from trl.rewards.panel import RewardError
from trl.rollout.collector import Ahead, Begun, Waiting, divided_waiting
from trl.rollout.report import ages_of
from trl.trainer.rollout_trainer import RolloutTrainer

ROWS = [{"prompt": text} for text in ("a b", "c", "d e f", "g h", "i j k", "l", "m n")]
BASE = {
    "max_completion_length": 5, "num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 5,
    "learning_rate": 0.5, "optim": "sgd", "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "save_rollouts": False,
}  # fmt: skip


def model():
    torch.manual_seed(0)
    config = t.LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return t.AutoModelForCausalLM.from_config(config)


def letters(completion_ids, **columns):
    """Rewards that differ within a group, whatever is sampled."""
    return [sum(ids) % 7 + place / 10 for place, ids in enumerate(completion_ids)]


def print_of(weights):
    return float(sum(p.detach().double().abs().sum() for p in weights.parameters()))


class Beside:
    """An engine beside the trainer: a copy of its model, which answers late."""

    exact = True  # the same code and numbers, at the same weights

    def __init__(self, policy, delays=None):
        self.policy, self.own, self.delays = policy, copy.deepcopy(policy).eval(), delays
        self.sampler = LocalSampler(self.own, word_tokenizer())
        self.calls, self.followed, self.threads = [], [], set()
        self.fails = 0

    def follow(self, version):
        self.own.load_state_dict(copy.deepcopy(self.policy.state_dict()))
        self.followed.append(version)

    def sample(self, prompts, params, n=1):
        self.threads.add(threading.current_thread().name)
        if self.delays is not None:
            time.sleep(self.delays.uniform(0, 0.02))
        if self.fails and len(self.calls) >= self.fails:
            raise ConnectionError("the engine is gone")
        groups = self.sampler.sample(prompts, params, n=n)
        self.calls.append((self.followed[-1], print_of(self.own), [one.ids for group in groups for one in group]))
        return groups

    def close(self):
        pass


class Watched(LocalSampler):
    """The trainer's own sampler, which notes by which weights it samples."""

    def __init__(self, *given):
        super().__init__(*given)
        self.calls = []

    def sample(self, prompts, params, n=1):
        groups = super().sample(prompts, params, n=n)
        self.calls.append((None, print_of(self.model), [one.ids for group in groups for one in group]))
        return groups


class Steps(t.TrainerCallback):
    """Notes the weights from which each step starts."""

    def __init__(self):
        self.prints = {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.prints[state.global_step] = print_of(model)


def build(folder, beside=False, delays=None, rewards=letters, rows=ROWS, **settings):
    policy, given = model(), {name: settings.pop(name, None) for name in ("eval_dataset", "environment")}
    sampler = Beside(policy, delays) if beside else Watched(policy, word_tokenizer())
    if settings.get("use_vllm"):
        sampler = None
    config = GRPOConfig(**{**BASE, "output_dir": str(folder), **settings})
    trainer = GRPOTrainer(
        policy, rewards, config, Dataset.from_list(rows), processing_class=word_tokenizer(), sampler=sampler, **given
    )
    trainer.steps = Steps()
    trainer.add_callback(trainer.steps)
    return trainer


def end_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def tokens(trainer):
    return [ids for _, _, ids in trainer.sampler.calls]


def ages(trainer):
    """The oldest token of each rollout."""
    return [row["sampling/staleness/max"] for row in trainer.state.log_history if "sampling/staleness/max" in row]


def ran(trainer, *given):
    trainer.train(*given)
    return trainer


def threads():
    return [each for each in threading.enumerate() if each.name == "rollouts" and each.is_alive()]


@pytest.mark.parametrize(("staleness", "settings"), [(1, {}), (3, {}), (2, {"num_iterations": 2, "max_steps": 8})])
def test_rollout_n_is_sampled_by_the_weights_of_rollout_n_minus_k(tmp_path, staleness, settings):
    trainer = ran(build(tmp_path, max_staleness=staleness, **settings))
    each = settings.get("num_iterations", 1)
    rollouts = BASE["max_steps"] if each == 1 else 4
    assert len(trainer.sampler.calls) == rollouts + staleness
    starts = [trainer.steps.prints[n * each] for n in range(rollouts)]
    assert len(set(starts)) == rollouts
    assert [call[1] for call in trainer.sampler.calls] == [
        starts[max(0, n - staleness)] for n in range(len(trainer.sampler.calls))
    ]
    means = [row["sampling/staleness/mean"] for row in trainer.state.log_history if "sampling/staleness/mean" in row]
    assert means == [each * min(n, staleness) for n in range(rollouts)]


def test_in_step_is_as_without_the_setting(tmp_path):
    zero, none = ran(build(tmp_path, max_staleness=0)), ran(build(tmp_path))
    assert torch.equal(end_of(zero), end_of(none))
    assert not any("staleness" in key for row in zero.state.log_history for key in row)


KINDS = {
    "plain": {"num_iterations": 2},
    "several rollouts a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "dynamic sampling": {
        "dynamic_sampling": True,
        "rewards": lambda completion_ids, **c: [float(ids[0] % 2) for ids in completion_ids],
    },
}


def test_episodes_are_played_in_the_engine_thread(tmp_path):
    """The objects of an episode are judged before the next rollout uses them again."""
    settings = {"max_staleness": 2, "rewards": None, "max_completion_length": 20, "num_iterations": 2, "max_steps": 6}
    alone = ran(build(tmp_path, environment=talkative(), **settings))
    beside = ran(build(tmp_path, True, random.Random(4), environment=talkative(), **settings))
    assert tokens(beside) == tokens(alone)
    assert torch.equal(end_of(beside), end_of(alone))
    assert beside.sampler.threads == {"rollouts"}
    assert len({row["reward"] for row in beside.state.log_history if "reward" in row}) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_beside_the_trainer_gives_the_rollouts_of_the_local_sampler(tmp_path, kind):
    """Whatever its delays: token for token, weight for weight, and in the order of the rollouts."""
    alone = ran(build(tmp_path, max_staleness=2, **KINDS[kind]))
    for seed in (1, 2):
        beside = ran(build(tmp_path, beside=True, delays=random.Random(seed), max_staleness=2, **KINDS[kind]))
        assert tokens(beside) == tokens(alone)
        assert torch.equal(end_of(beside), end_of(alone))
        assert beside.sampler.threads == {"rollouts"}
        assert [call[1] for call in beside.sampler.calls] == [call[1] for call in alone.sampler.calls]
    assert not threads()


SAVES = {"save_strategy": "steps", "save_steps": 1, "max_staleness": 2, "num_iterations": 2, "max_steps": 8}


@pytest.mark.parametrize("kind", ["plain", "dynamic sampling"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_resumed_run_goes_on_bit_by_bit(tmp_path, kind, beside):
    """In the midst of a rollout (5) and at its end (4): what waits is in the checkpoint, with the rest in flight."""
    settings = {**SAVES, **KINDS[kind]}
    delays = random.Random(3) if beside else None
    whole = ran(build(tmp_path / "whole", beside=beside, delays=delays, **settings))
    for step in (4, 5):
        again = build(tmp_path / f"{step}", beside=beside, delays=delays, **settings)
        again.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(end_of(again), end_of(whole))
        assert tokens(again) == tokens(whole)[-len(tokens(again)) :]
        assert len(tokens(again)) < len(tokens(whole))


def test_a_run_that_draws_another_number_ahead_drops_what_waits(tmp_path, caplog):
    """Its prompts come again: no prompt of the first rollouts is missing."""
    seen = []

    def noted(completion_ids, prompts, **columns):
        seen.extend(prompts[::2])
        return letters(completion_ids)

    for settings in ({"max_staleness": 3, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}, {"max_steps": 4}):
        trainer = build(tmp_path, rewards=noted, **settings)
        ran(trainer, *([True] if "max_staleness" not in settings else []))
    said = "the 3 rollouts that 1 process had drawn ahead are dropped, as this run has 1 process, max_staleness=0 or"
    assert said in caplog.text
    stream = trainer.collector.prompts.take(0, 8)
    assert seen == [row["prompt"] for row in stream]


@pytest.mark.parametrize("kind", ["plain", "dynamic sampling"])
def test_another_number_of_processes_divides_what_waits_anew(tmp_path, kind):
    """One process's groups as those of two, the second one first; and back."""
    settings = {"max_staleness": 2, **KINDS[kind], "num_iterations": 1}
    trainer = ran(build(tmp_path, **settings))
    state = trainer.extra_state()
    (one,) = state["rollouts"]
    parts = [[divided_waiting([each], [place], 2) for each in one["waiting"]] for place in (1, 0)]
    assert [len(each["rollout"]["completions"]) for each in parts[0]] == [2, 2]
    two = [{**one, "waiting": part, "shape": {**one["shape"], "per_device_train_batch_size": 2}} for part in parts]
    again = build(tmp_path, **settings)
    again.load_extra_state({**state, "rollouts": two})
    for mine, theirs in zip(again.ahead.plain_state(), one["waiting"], strict=True):
        assert str(mine) == str(theirs)
    assert again.rollouts.state.position == one["position"]


def test_what_cannot_be_divided_is_drawn_again(tmp_path, caplog):
    trainer = ran(build(tmp_path, max_staleness=2))
    state = trainer.extra_state()
    (one,) = state["rollouts"]
    again = build(tmp_path, max_staleness=2, per_device_train_batch_size=8)
    again.load_extra_state(state)
    assert "the 2 rollouts that 1 process had drawn ahead are dropped, as this run has 1 process" in caplog.text
    assert not again.ahead.waiting
    assert (again.rollouts.state.position, again.rollouts.state.rollouts) == (one["position"] - 2 * 2, 5)


def test_two_runs_by_a_server_agree_whatever_its_delays(tmp_path):
    """Token for token and weight for weight; each rollout by the weights of two rollouts before."""
    first = t.set_seed(5) or model()
    made = []
    for seed in (1, 2):
        with FakeVLLM(first, word_tokenizer(), delays=random.Random(seed)) as server:
            settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
            trainer = ran(build(tmp_path / str(seed), max_staleness=2, save_rollouts=True, **settings))
            stamps = [body["new_version"] for path, body in server.calls if path == "/update_weight_version"]
        files = sorted((tmp_path / str(seed) / "rollouts").iterdir())
        made.append((end_of(trainer), [pq.read_table(file)["completion_ids"].to_pylist() for file in files]))
        done = [int(stamp.rsplit("-", 1)[1]) for stamp in stamps if not stamp.endswith("-unfinished")]
        assert done == [0, 1, 2, 3, 4]
        assert ages(trainer) == [0, 1, 2, 2, 2]
    assert made[0][1] == made[1][1]
    assert torch.equal(made[0][0], made[1][0])


# -- what goes wrong -----------------------------------------------------------------------------


def test_an_error_in_the_thread_ends_the_run_as_it_is(tmp_path):
    """The engine is gone after 4 rollouts, which is found before it gets other weights; no thread stays.

    A further `train` goes on with what waits, and draws the prompts of the others again.
    """
    trainer = build(tmp_path, beside=True, max_staleness=2)
    trainer.sampler.fails = 4
    with pytest.raises(ConnectionError, match="the engine is gone"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert len(trainer.sampler.calls) == 4
    assert [each.begun.number for each in trainer.ahead.waiting] == [3]
    assert trainer.rollouts.state.position == 4 * 2
    assert not threads()
    trainer.sampler.fails = 0
    trainer.train()
    alone = ran(build(tmp_path, max_staleness=2))
    assert tokens(trainer)[:4] == tokens(alone)[:4]
    assert len(tokens(trainer)) == 4 + 5 + 1  # 5 steps from rollout 3 on, and 2 ahead
    assert not threads()


def test_a_server_that_is_lost_leaves_a_checkpoint(tmp_path):
    """Found at the next push or the next answer; what had been drawn ahead is learned after the resume."""

    class Kill(t.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                server.stop()

    with FakeVLLM(t.set_seed(5) or model(), word_tokenizer()) as server:
        settings = {
            "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, "vllm_server_timeout": 0.3,
            "max_staleness": 2, "save_strategy": "steps", "save_steps": 4,
        }  # fmt: skip
        trainer = build(tmp_path, **settings)
        trainer.add_callback(Kill())
        with pytest.raises(EngineError, match="checkpoint-2 is saved: go on with train"):
            trainer.train()
        waited = [each.begun.number for each in trainer.ahead.waiting]
        assert waited[0] == 2
        assert not threads()
        server.start()
        again = build(tmp_path, **settings)
        again.train(True)
    assert again.state.global_step == 5
    assert again.rollouts.state.position == 7 * 2


class Blocked(Beside):
    """Answers when it is told to."""

    def __init__(self, policy):
        super().__init__(policy)
        self.may_answer = threading.Event()
        self.asked = threading.Event()

    def sample(self, prompts, params, n=1):
        if len(self.calls) >= 3:
            self.asked.set()
            assert self.may_answer.wait(60)
        return super().sample(prompts, params, n)


def test_ctrl_c_does_not_wait_for_what_is_in_flight(tmp_path):
    trainer = build(tmp_path, beside=True, max_staleness=2)
    trainer.sampler = trainer.source.sampler = Blocked(trainer.model)

    class Stop(t.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                assert trainer.sampler.asked.wait(60)
                raise KeyboardInterrupt

    trainer.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(trainer.sampler.calls) == 3
    assert len(trainer.ahead.waiting) == 1  # rollout 2 of the three; that in flight is left
    assert trainer.rollouts.state.position == 3 * 2
    (left,) = threads()
    trainer.sampler.may_answer.set()
    left.join(60)
    assert not left.is_alive()


def test_a_checkpoint_is_written_while_the_engine_is_gone(tmp_path, caplog):
    """What was in flight is dropped, which one line says; the error comes where its rollout is drawn again."""
    trainer = build(tmp_path, beside=True, max_staleness=1, save_strategy="steps", save_steps=1)
    trainer.sampler.fails = 3
    with pytest.raises(ConnectionError, match="the engine is gone"):
        trainer.train()
    assert (
        "a rollout that was drawn ahead is dropped, and drawn again when it is due: the engine is gone" in caplog.text
    )
    again = build(tmp_path, beside=True, max_staleness=1, save_strategy="steps", save_steps=1)
    again.train(True)
    assert again.state.global_step == 5
    assert again.rollouts.state.position == 12


def test_an_evaluation_is_by_the_weights_of_now_and_changes_nothing(tmp_path):
    rows = Dataset.from_list(ROWS[:2])
    plain = ran(build(tmp_path, beside=True, delays=random.Random(1), max_staleness=2))
    trainer = build(
        tmp_path,
        beside=True,
        delays=random.Random(2),
        max_staleness=2,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=2,
        eval_dataset=rows,
    )
    trainer.train()
    assert torch.equal(end_of(trainer), end_of(plain))
    drawn = [call for call in trainer.sampler.calls if call[2] in tokens(plain)]
    evaluated = [call for call in trainer.sampler.calls if call not in drawn]
    starts = trainer.steps.prints
    assert [call[1] for call in evaluated] == [starts[2], starts[4], print_of(trainer.model)]


def test_other_settings_and_other_rows_drop_what_waits(tmp_path):
    trainer = ran(build(tmp_path, max_staleness=2))
    assert len(trainer.ahead.waiting) == 2
    before = trainer.rollouts.state.position
    trainer.temperature = 0.5
    assert not trainer.ahead.waiting
    assert trainer.rollouts.state.position == before - 2 * 2


def test_settings_that_do_not_go_together(tmp_path):
    for settings, said in (
        ({"max_staleness": -1}, "max_staleness=-1: give a whole number >= 0; 0 is in step"),
        ({"sync_in_flight": True}, "sync_in_flight=True: no effect with max_staleness=0"),
        (
            {"sync_in_flight": True, "max_staleness": 1},
            "sync_in_flight=True: only an engine beside the trainer, such as a vLLM server",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            build(tmp_path, **settings)


def test_in_flight_over_a_sync_nobody_waits(tmp_path):
    """The engine gets new weights while it samples; a token is behind by the staleness at most."""
    trainer = build(tmp_path, beside=True, max_staleness=2, sync_in_flight=True, delays=random.Random(1))
    trainer.train()
    assert trainer.state.global_step == 5
    assert len(trainer.sampler.calls) == 7
    assert max(ages(trainer)) <= 2


def test_a_server_goes_on_over_a_sync(tmp_path):
    """It pauses and keeps what is in flight; tokens of earlier weights of this run are no strangers."""
    with FakeVLLM(t.set_seed(5) or model(), word_tokenizer(), delays=random.Random(1)) as server:
        settings = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url}
        trainer = ran(build(tmp_path, max_staleness=2, sync_in_flight=True, **settings))
    assert trainer.sampler.sync.mode == "keep"
    assert len(ages(trainer)) == 5
    assert max(ages(trainer)) <= 2
    spans = [
        VersionSpan(stamp, 0, 1) for stamp in ("policy-1", "policy-2", "policy-2-unfinished", "default", "other-1")
    ]
    sampler = VLLMSampler.__new__(VLLMSampler)
    sampler.sync, sampler.stamp, sampler.version, sampler.keeps = object(), "policy", 2, True
    strays = sampler._strays([Completion([1], [0.0], [0.0], "stop", tuple(spans))])
    assert [span.version for span in strays] == ["policy-2-unfinished", "default", "other-1"]


def test_who_gains_no_time_is_told(tmp_path, caplog):
    """The local sampler draws in the trainer's thread, an engine beside it does not."""
    with caplog.at_level("WARNING", "trl"):
        build(tmp_path, beside=True, max_staleness=2)
        assert not caplog.messages
        build(tmp_path, max_staleness=2)
    (line,) = caplog.messages
    assert line == (
        "max_staleness=2: rollouts are drawn ahead by older weights, and no time is gained, for no engine beside the "
        "trainer, such as a vLLM server, samples them; 0 draws them in step"
    )


def test_an_engine_in_this_process_draws_without_a_thread(tmp_path):
    alone = ran(build(tmp_path, max_staleness=2))
    trainer = build(tmp_path, beside=True, max_staleness=2)
    trainer.sampler.beside = False
    ran(trainer)
    assert trainer.sampler.threads == {"MainThread"}
    assert torch.equal(end_of(trainer), end_of(alone))


def test_the_local_sampler_that_goes_on_is_not_in_a_thread():
    class Falls:
        exact = False

        def follow(self, version):
            self.exact = True

    trainer = SimpleNamespace(
        sampler=Falls(), state=SimpleNamespace(global_step=0), collector=SimpleNamespace(source=None, worker=1),
        make_source=lambda: "local", _replaced=False, _followed=-1, _moved=0,
    )  # fmt: skip
    RolloutTrainer._follow(trainer)
    assert (trainer.source, trainer.collector.source, trainer.collector.worker) == ("local", "local", None)


def test_a_judge_that_fails_on_one_rank_leaves_none_waiting_for_it():
    """What ranks do together comes before what one of them may fail in; then all drop the same rollouts."""
    said = []

    @contextmanager
    def together():
        said.append("together")
        yield

    def judged(*given):
        said.append("judged")
        raise RewardError("no opinion")

    ranks = {"gather": lambda mine: [*mine, 2], "weights": together, "judged": judged, "rounds": 1}
    ahead, state = Ahead(SimpleNamespace(**ranks), 2), SimpleNamespace(position=9)
    for number in range(2):
        future = Future()
        future.set_result((Rollout([[1]], [[2]], [], [[1]], metadata={"live": [object()]}), 0.0))
        ahead.waiting.append(Waiting(Begun(number, 0, [], [], []), 0, 4 * number, sampling=future))
    ahead.rest(state, None)
    assert said == ["together", "together", "judged"]
    assert (len(ahead.waiting), state.position) == (0, 0)


def test_the_age_of_each_token_is_that_of_its_weights():
    rollout = Rollout([[1]] * 2, [[5, 6, 7], [8]], [], [[1, 1, 1], [1]])
    assert ages_of(rollout, 3, 5) == [[2, 2, 2], [2]]
    rollout.metadata["versions"] = [[("run-3", 0, 2), ("run-4", 2, 3)], [("default", 0, 1)]]
    assert ages_of(rollout, 3, 5, spans=True) == [[2, 2, 1], [2]]
    rollout.masks[0][1] = 0  # a tool's
    assert ages_of(rollout, 3, 5, spans=True) == [[2, 1], [2]]
    rollout.metadata["versions"][0][-1] = (*rollout.metadata["versions"][0][-1][:2], 9)  # the completion was cut since
    assert ages_of(rollout, 3, 5, spans=True) == [[2, 1], [2]]
