"""Distillation from a teacher behind a vLLM server: the same numbers as from one in this process, and refusals."""

import pytest
import torch
from conformity import causal_lm, history, prompts, tokenizer, weights
from generation.fake_vllm import FakeVLLM, Fault
from peft import LoraConfig, get_peft_model
from test_self_sampling import make, rollouts_of
from test_teachers import given_rollouts, logprobs
from tokenizers_for_tests import byte_tokenizer, word_tokenizer

from trl.generation.vllm.engine import EngineError

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def loud(seed):
    """A model whose distributions are far from even."""
    model = causal_lm(seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture
def served():
    with FakeVLLM(loud(7), word_tokenizer()) as server:
        yield server


def trained(directory, teacher, algorithm="Distillation", **settings):
    trainer = make(algorithm, directory, arguments={"teacher_model": teacher}, max_steps=2, **settings)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("algorithm", "settings"), [("Distillation", {}), ("GKD", {"lmbda": 0.5, "seq_kd": True})])
def test_all_log_probabilities_make_it_the_teacher_itself(algorithm, settings, served, tmp_path):
    settings = {"temperature": 1.0, **settings}
    own = trained(tmp_path / "own", loud(7), algorithm, **settings)
    far = trained(
        tmp_path / "far", None, algorithm, teacher_model_server_url=served.url, teacher_top_logprobs=-1, **settings
    )
    if not settings.get("seq_kd"):  # the servers' random numbers are their own
        assert history(far, "loss") == pytest.approx(history(own, "loss"), rel=1e-5)
        for name, weight in weights(own).items():
            torch.testing.assert_close(weights(far)[name], weight, rtol=0, atol=1e-5)
    assert far.teacher_model is None
    assert len(history(far, "loss")) == 2


def known(directory, k, beta=1.0):
    """The mean of a divergence whose classes are the teacher's best k tokens and the rest, by hand."""
    table, found = rollouts_of(directory), []
    for prompt, ids in zip(table["prompt"], table["completion_ids"], strict=True):
        start = tokenizer()(prompt)["input_ids"]
        teacher_TV, student_TV = (logprobs(model, start, ids).exp() for model in (loud(7), causal_lm()))
        for teacher_V, student_V in zip(teacher_TV, student_TV, strict=True):
            kept = teacher_V.topk(k).indices
            p, q = (torch.cat([each[kept], 1 - each[kept].sum()[None]]) for each in (student_V, teacher_V))
            found.append((p * (p / q).log()).sum() if beta == 1.0 else (q * (q / p).log()).sum())
    return float(torch.stack(found).mean())


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_best_tokens_and_the_rest_as_one(beta, served, tmp_path):
    given = {"teacher_model": None}
    settings = {"teacher_model_server_url": served.url, "teacher_top_logprobs": 3, "beta": beta}
    trainer = make("Distillation", tmp_path, arguments=given, **settings)
    trainer.train()
    assert history(trainer, "loss")[0] == pytest.approx(known(tmp_path, 3, beta), rel=1e-4)
    asked = [body["sampling_params"] for path, body in served.calls if path == "/inference/v1/generate"]
    assert {params["prompt_logprobs"] for params in asked} == {3}
    assert 0.3 < history(trainer, "teacher_known")[0] < 1


def test_sampled_tokens_alone(served, tmp_path):
    settings = {"teacher_model_server_url": served.url, "teacher_top_logprobs": 0, "num_iterations": 2}
    trainer = make("Distillation", tmp_path, max_steps=2, **settings)
    trainer.train()
    table, found = rollouts_of(tmp_path), []
    for prompt, ids in zip(table["prompt"], table["completion_ids"], strict=True):
        start = tokenizer()(prompt)["input_ids"]
        teacher_T, student_T = (logprobs(model, start, ids)[range(len(ids)), ids] for model in (loud(7), causal_lm()))
        found += (student_T - teacher_T).tolist()
    assert history(trainer, "loss")[0] == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert history(trainer, "loss")[1] < history(trainer, "loss")[0]


def test_a_tools_tokens_are_left_out(served, tmp_path):
    given = {"rollout_func": given_rollouts}
    settings = {"teacher_model_server_url": served.url, "teacher_top_logprobs": -1}
    far = make("Distillation", tmp_path / "far", arguments=given, **settings)
    far.train()
    own = make("Distillation", tmp_path / "own", arguments={**given, "teacher_model": loud(7)})
    own.train()
    assert history(far, "loss") == pytest.approx(history(own, "loss"), rel=1e-5)


def test_an_adapter_of_the_server_is_the_teacher(served, tmp_path):
    torch.manual_seed(3)
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(loud(7), adapter).save_pretrained(tmp_path / "adapter")
    served._load_adapter({"lora_name": "strict", "lora_path": str(tmp_path / "adapter")})
    settings = {"teacher_model_server_url": served.url, "teacher_model_name_or_path": "strict"}
    trainer = make("GKD", tmp_path, max_steps=1, lmbda=0.0, seq_kd=True, **settings)
    trainer.train()
    asked = [body for path, body in served.calls if path == "/inference/v1/generate"]
    assert {body["model"] for body in asked} == {"strict"}
    assert {body["sampling_params"].get("prompt_logprobs") for body in asked} == {None, 20}
    with pytest.raises(EngineError, match=r"^teacher_model: the server at .* has no 'kind'; it has .*, strict$"):
        make("Distillation", tmp_path, **{**settings, "teacher_model_name_or_path": "kind"})


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (
            byte_tokenizer,
            r"^teacher_model: of a text of \d+ tokens its tokenizer reads \d+ where the student's reads \d",
        ),
        (
            lambda: word_tokenizer(["other", "words"]),
            r"^teacher_model: of a text of \d+ tokens its tokenizer reads 3 wh",
        ),
    ],
)
def test_a_teacher_that_reads_other_tokens_is_refused(tokens, message, tmp_path):
    with FakeVLLM(loud(7), tokens()) as server, pytest.raises(ValueError, match=message):
        make("Distillation", tmp_path, teacher_model_server_url=server.url)


def test_a_server_that_says_nothing_of_its_tokens_is_taken_with_a_word(tmp_path, caplog):
    with FakeVLLM(loud(7)) as server:
        caplog.set_level("WARNING")
        make("Distillation", tmp_path, teacher_model_server_url=server.url)
    assert "teacher_model: its server has no tokenizer" in caplog.text


def test_a_row_that_the_server_has_no_room_for_is_named(tmp_path):
    with FakeVLLM(loud(7), word_tokenizer(), max_model_len=5) as server:
        given = {"rollout_func": given_rollouts}
        trainer = make("Distillation", tmp_path, arguments=given, teacher_model_server_url=server.url)
        with pytest.raises(
            ValueError, match=r"^teacher_model: its context holds 4 tokens, and a prompt with its compl"
        ):
            trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_top_logprobs": 5}, "^teacher_top_logprobs=5: a teacher in this process gives all"),
        ({"teacher_top_logprobs": -2}, r"^teacher_top_logprobs=-2: give -1 \(all\), 0 \(the sampled one\), or more"),
        ({"teacher_model_server_url": "http://h", "teacher_top_logprobs": 0, "beta": 0.5},
         "^beta=0.5: with teacher_top_logprobs=0 give 1"),
        ({"teacher_model_server_url": "http://h", "teacher_top_logprobs": 0, "top_k": 5},
         "^top_k=5: with teacher_top_logprobs=0 leave it out: it samples from another distribution"),
        ({"teacher_model_server_url": "http://h", "teacher_model_revision": "v1"},
         "^teacher_model_revision='v1': the server has loaded its teacher; leave it out"),
        ({"teacher_model_server_url": "http://h"}, "^teacher_model: a server has the teacher"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make("Distillation", tmp_path, prompts(), arguments={"teacher_model": loud(7)}, **settings)


def test_a_run_whose_teacher_failed_goes_on_where_it_stopped(served, tmp_path):
    """The rollout that it did not score is drawn once more."""
    settings = {
        "teacher_model_server_url": served.url, "teacher_top_logprobs": -1, "max_steps": 3, "optim": "sgd",
        "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant",
    }  # fmt: skip
    whole = make("Distillation", tmp_path / "whole", **settings)
    whole.train()
    asked = sum(path == "/inference/v1/generate" for path, _ in served.calls)
    failed = make("Distillation", tmp_path / "failed", **settings)
    served.faults.append(Fault("500", after=asked // 3, times=100))
    with pytest.raises(EngineError, match=r"^step 2: the vLLM server at .*checkpoint-1 is saved: go on with"):
        failed.train()
    served.faults.clear()
    resumed = make("Distillation", tmp_path / "failed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), rel=1e-5)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=1e-6)


def test_a_teacher_that_dies_in_the_midst_is_named(served, tmp_path):
    trainer = make(
        "Distillation", tmp_path, max_steps=3, teacher_model_server_url=served.url, vllm_server_timeout=0.3
    )  # fmt: skip
    trainer.served.engine.wait = 0.3
    served.stop()
    with pytest.raises(EngineError, match=r"^the vLLM server at .* does not answer"):
        trainer.train()


def test_an_error_of_one_process_is_one_of_all(served, tmp_path, monkeypatch):
    """As if there were a second process whose request failed; in an evaluation too, where this one may have no rows."""
    settings = {"teacher_model_server_url": served.url, "teacher_top_logprobs": -1}
    trainer = make("Distillation", tmp_path, arguments={"teacher_model": None}, **settings)
    monkeypatch.setattr("trl.generation.vllm.sync.on_all", lambda said: [said, "the server refused"])
    with pytest.raises(EngineError, match=r"^rank 1 could not ask the teacher: the server refused$"):
        trainer.train()
    trainer.eval_dataset = trainer.train_dataset
    for repeats in (False, True):
        trainer.only_repeats = repeats
        with pytest.raises(EngineError, match=r"^rank 1 could not ask the teacher: the server refused$"):
            trainer.evaluate()


def test_a_teacher_that_fails_in_an_evaluation_leaves_a_checkpoint(served, tmp_path):
    settings = {
        "teacher_model_server_url": served.url, "teacher_top_logprobs": -1, "max_steps": 3, "eval_strategy": "steps",
        "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
    }  # fmt: skip
    trainer = make("Distillation", tmp_path, arguments={"teacher_model": None, "eval_dataset": prompts()}, **settings)
    own, asked = trainer.served.logprobs, []

    def logprobs(*given):
        asked.append(trainer.state.global_step)
        if len(asked) == 2:  # of the evaluation after the first step
            raise EngineError("the teacher is gone")
        return own(*given)

    trainer.served.logprobs = logprobs
    with pytest.raises(EngineError, match=r"^step 2: the teacher is gone; checkpoint-1 is saved: go on with"):
        trainer.train()
    assert asked == [0, 1]


@pytest.mark.parametrize(
    ("teacher_rows", "settings", "apart"),
    [(130, {}, True), (100, {"lmbda": 0.5, "seq_kd": True}, False), (100, {"lmbda": 0.5}, False)],
)
def test_rollouts_ahead_of_a_student(teacher_rows, settings, apart, tmp_path, caplog):
    """An engine draws them in its thread, where only a padded head is between; else one line says that nobody gains."""
    from conformity import answered
    from test_staleness import Beside
    from test_teachers import of_size

    student, teacher = of_size(100), of_size(teacher_rows)
    beside = Beside(student)
    given = {"teacher_model": teacher, "sampler": beside}
    settings = {"lmbda": 1.0, "max_staleness": 1, "max_steps": 2, **settings}
    with caplog.at_level("WARNING", "trl"):
        trainer = make("GKD", tmp_path, answered(), student, given, **settings)
    trainer.train()
    assert beside.threads == ({"rollouts"} if apart else {"MainThread"})
    said = [text for text in caplog.messages if text.startswith("max_staleness=1:")]
    expected = [] if apart else [
        "max_staleness=1: rollouts are drawn ahead by older weights, and no time is gained, for they are drawn in the "
        "trainer's thread, with its models or functions; 0 draws them in step"
    ]  # fmt: skip
    assert said == expected
