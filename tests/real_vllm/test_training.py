"""Trainers with a real vLLM: they learn from its tokens what they would learn from the same tokens of anybody."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from servers import ANSWER, CALL, SETTINGS, save, saying, tiny_llama, tokenizer

import trl
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sampler import VLLMSampler
from trl.generation.vllm.sync import make_sync, new_stamp

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def prompts():
    return Dataset.from_dict({"prompt": ["a b c", "sky", "one two", "cat sat on"] * 2})


def early(completion_ids, **columns):
    """More for tokens with small numbers."""
    return [-sum(ids) / len(ids) / 50 for ids in completion_ids]


def grpo(directory, model, server=None, algorithm="GRPO", rows=None, **more):
    arguments = {key: more.pop(key) for key in list(more) if key in ("peft_config", "rollout_func", "environment")}
    engine = {} if server is None else {"use_vllm": True, "vllm_server_base_url": server.url, "vllm_mode": "server"}
    settings = {
        "output_dir": str(directory), "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3,
        "max_completion_length": 12, "learning_rate": 0.3, "optim": "sgd", "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "vllm_server_timeout": 5.0, **engine,
    }  # fmt: skip
    if server is None:
        del settings["vllm_server_timeout"]
    config = getattr(trl, f"{algorithm}Config")(**{**settings, **more})
    trainer_class = getattr(trl, f"{algorithm}Trainer")
    reward = None if "environment" in arguments else early
    return trainer_class(model, reward, config, rows or prompts(), processing_class=tokenizer(), **arguments)


def rollouts_of(directory):
    files = sorted(str(path) for path in Path(directory).glob("rollouts/*.parquet"))
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(directory))


def replayed(directory, table, model, **more):
    """The same run, whose completions are those of a table."""
    steps = iter(range(1, 100))

    def say(prompts, trainer):
        step = next(steps)
        ids = [row["completion_ids"] for row in table if row["step"] == step]
        return {"prompt_ids": [tokenizer()(each)["input_ids"] for each in prompts], "completion_ids": ids}

    trainer = grpo(directory, model, rollout_func=say, **more)
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def same(one, other):
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, rtol=0, atol=2e-5)


LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.mark.parametrize("kind", ["whole", "adapter", "tied"])
def test_grpo_learns_what_the_same_tokens_teach(kind, server, tied, tmp_path):
    more, is_tied = {"peft_config": LORA} if kind == "adapter" else {}, kind != "whole"
    torch.manual_seed(0)
    trainer = grpo(tmp_path / "far", tiny_llama(is_tied), tied if is_tied else server, **more)
    before = weights(trainer)
    trainer.train()
    table = rollouts_of(tmp_path / "far")
    assert sorted(set(table["step"])) == [1, 2, 3]
    assert trainer.sampler.version == 2
    assert trainer.sampler.sync.adapter == ("policy" if kind == "adapter" else None)
    torch.manual_seed(0)
    again = replayed(tmp_path / "again", table, tiny_llama(is_tied), **more)
    same(weights(again), weights(trainer))
    assert max((weight - before[name]).abs().max() for name, weight in weights(trainer).items()) > 1e-3
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-5


def test_rloo_on_a_tied_model_with_an_adapter(tied, tmp_path):
    torch.manual_seed(0)
    trainer = grpo(tmp_path / "far", tiny_llama(tied=True), tied, "RLOO", peft_config=LORA)
    trainer.train()
    torch.manual_seed(0)
    again = replayed(
        tmp_path / "again", rollouts_of(tmp_path / "far"), tiny_llama(tied=True), algorithm="RLOO", peft_config=LORA
    )
    same(weights(again), weights(trainer))


@pytest.mark.filterwarnings("ignore:No dataset is provided:UserWarning")
def test_ppo(server, tmp_path):
    names = tokenizer()
    model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(save(tiny_llama(), tmp_path / "model"))
    sampler = VLLMSampler(
        ServerEngine(server.url), make_sync(model), names, model=model, stamp=new_stamp()
    )  # fmt: skip
    config = trl.PPOConfig(
        batch_size=8, mini_batch_size=4, ppo_epochs=1, learning_rate=1e-2, seed=0, remove_unused_columns=False
    )  # fmt: skip
    trainer = trl.PPOTrainer(config, model, tokenizer=names, sampler=sampler)
    queries = [torch.tensor(names(text)["input_ids"]) for text in prompts()["prompt"]]
    for step in range(3):
        responses = trainer.generate(
            queries, return_prompt=False, max_new_tokens=10, do_sample=True, top_k=0, pad_token_id=0
        )  # fmt: skip
        assert sampler.version == step + 1
        for query, response in zip(queries, responses, strict=True):
            row = [*query.tolist(), *response.tolist()]
            (entries,) = sampler.engine.prompt_logprobs([row])  # the engine has the weights of now
            with torch.no_grad():
                own_TV = model.pretrained_model(torch.tensor([row])).logits[0].log_softmax(-1)
            for entry, token, own_V in zip(entries, row[1:], own_TV, strict=False):
                assert entry[token] == pytest.approx(float(own_V[token]), abs=1e-5)
        before = model.pretrained_model.lm_head.weight.detach().clone()
        trainer.step(queries, responses, [torch.tensor(early([ids.tolist()])[0]) for ids in responses])
        assert (model.pretrained_model.lm_head.weight - before).abs().max() > 1e-3
    sampler.close()


def double(text):
    return {"two": "four"}[text.strip()]


def test_a_tool_is_called_in_the_midst_of_an_episode(server, tmp_path):
    """Turns end by stop strings, which the server finds; the second turn continues the first one's tokens."""
    policy = saying("sky", CALL, "<eos>")
    with torch.no_grad():  # behind the answer of the tool
        names = tokenizer()
        after, end = names.convert_tokens_to_ids([ANSWER, "<submit>"])
        policy.lm_head.weight[end, after] = 3.0
    environment = trl.TextEnvironment(
        tools={"double": double}, reward_fn=lambda texts: [float(i) for i in range(len(texts))], tokenizer=names,
        max_turns=3,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["sky"] * 8})
    trainer = grpo(tmp_path, policy, server, rows=rows, environment=environment, learning_rate=1e-4, max_steps=2)
    trainer.train()
    table = rollouts_of(tmp_path)
    episode = names.convert_tokens_to_ids([CALL, ANSWER, "<submit>"])
    assert table["completion_ids"] == [episode] * 16


def test_a_served_teacher_gives_the_same_numbers_as_one_here(server, tmp_path):
    def distilled(name, **teacher):
        settings = {
            "output_dir": str(tmp_path / name), "per_device_train_batch_size": 4, "max_completion_length": 10,
            "max_steps": 2, "logging_steps": 1, "learning_rate": 0.3, "optim": "sgd", "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, **teacher,
        }  # fmt: skip
        model = settings.pop("teacher_model", None)
        trainer = trl.DistillationTrainer(
            tiny_llama(seed=5), model, trl.DistillationConfig(**settings), prompts(),
            processing_class=tokenizer(),
        )  # fmt: skip
        trainer.train()
        return trainer

    here = distilled("here", teacher_model=tiny_llama())
    served = {"teacher_model_server_url": server.url, "vllm_server_timeout": 5.0}
    far = distilled("far", **served, teacher_top_logprobs=-1)
    same(weights(here), weights(far))
    assert logged(far, "loss") == pytest.approx(logged(here, "loss"), rel=1e-5)
    some = distilled("some", **served, teacher_top_logprobs=30)
    assert 0.5 * logged(here, "loss")[0] < logged(some, "loss")[0] < logged(here, "loss")[0]
    assert 0.5 < logged(some, "teacher_known")[0] < 1
    alone = distilled("alone", **served, teacher_top_logprobs=0)
    assert logged(alone, "loss")[0] == pytest.approx(logged(here, "loss")[0], rel=1.0)


def test_a_server_that_is_killed_in_the_midst(tied, tmp_path):
    """Found and named, with a checkpoint; started again, the run goes on to where it would have come."""
    settings = {
        "peft_config": LORA,
        "max_steps": 4,
        "max_completion_length": 40,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = grpo(tmp_path / "whole", tiny_llama(tied=True), tied, **settings)
    whole.train()
    killed = grpo(tmp_path / "killed", tiny_llama(tied=True), tied, **settings, vllm_server_timeout=3.0)
    judge, calls = killed.rewards.panel.functions[0], []

    def deadly(completion_ids, **columns):
        calls.append(1)
        if len(calls) == 2:
            threading.Timer(0.05, tied.kill).start()
        return judge(completion_ids)

    killed.rewards.panel.functions[0] = deadly
    with pytest.raises(EngineError, match=r"^step 3: the vLLM server at .* for 3 s.*checkpoint-2 is saved: go on with"):
        killed.train()
    tied.start().wait()
    resumed = grpo(tmp_path / "killed", tiny_llama(tied=True), tied, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    same(weights(whole), weights(resumed))


def test_the_engine_in_this_process(tmp_path):
    """In a process of its own, which vLLM may fill with what it likes."""
    program = Path(__file__).with_name("colocated.py")
    path = os.pathsep.join(filter(None, sys.path))
    ended = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], env={**os.environ, **SETTINGS, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-6000:]
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["version"] == 1
    assert found["difference"] < 1e-5
    assert found["moved"] > 1e-3
