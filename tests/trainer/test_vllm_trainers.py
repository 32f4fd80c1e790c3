"""Every trainer that samples, by a server of vLLM (a fake one) and by samplers of users; how a run ends without one."""

import logging
import sys
import warnings
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conformity import CASES, build, causal_lm, early_letters, history, prompts, tokenizer, weights
from datasets import Dataset
from environments_for_tests import letters
from fake_vllm import FakeVLLM, Fault
from tokenizers_for_tests import byte_tokenizer

import trl
from trl.data.records import Completion
from trl.extras.best_of_n_sampler import BestOfNSampler
from trl.generation import make_sampler
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sampler import VLLMSampler
from trl.generation.vllm.sync import make_sync
from trl.generation.vllm.verify import MismatchError
from trl.trainer.checkpoints import checkpoints
from trl.trainer.engines import check_served
from trl.trainer.rollout_trainer import RolloutConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def served():
    """A server whose first weights are not the policy's."""
    with FakeVLLM(causal_lm(9), tokenizer()) as server:
        yield server


@pytest.fixture
def server(served):
    return served.begin_anew()


def by(server, **settings):
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url,
            "vllm_server_timeout": 0.3, **settings}  # fmt: skip


def pushes(server):
    return [body["new_version"] for path, body in server.calls if path == "/update_weight_version"]


def bodies(server):
    """Of the requests for completions, without the probes at the start."""
    asked = [body for path, body in server.calls if path.startswith("/inference")]
    return [body for body in asked if "min_tokens" in body["sampling_params"] and len(body["token_ids"]) > 1]


# --- trainers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["grpo", "rloo", "online-dpo", "raft", "distillation"])
def test_a_trainer_samples_by_a_server(case, server, tmp_path):
    """Each rollout by the weights of its step: what the trainer says of the tokens is what the server said."""
    trainer = build(case, tmp_path, **by(server, num_iterations=1))
    assert not trainer.sampler.exact
    trainer.train()
    stamp = trainer.sampler.stamp
    drawn = range(0, 2, trainer.rollouts.shape.passes // trainer.args.gradient_accumulation_steps or 1)
    finished = [version for version in pushes(server) if not version.endswith("-unfinished")]
    assert finished == [f"{stamp}-{step}" for step in drawn]
    prompts_asked = {tuple(body["token_ids"]) for body in bodies(server)}
    assert prompts_asked == {tuple(ids) for ids in trainer.train_dataset["prompt_ids"]} & prompts_asked
    differences = history(trainer, "sampling/sampling_logp_difference/max")
    assert all(difference < 1e-5 for difference in differences)
    assert bool(differences) == (case in ("grpo", "rloo"))
    assert all(ratio == pytest.approx(1, abs=1e-6) for ratio in history(trainer, "ratio"))


def test_an_evaluation_samples_by_the_weights_of_now(server, tmp_path):
    trainer = build("grpo", tmp_path, **by(server))
    trainer.train()
    before = len(pushes(server))
    trainer.evaluate()
    assert pushes(server)[before:] == [f"{trainer.sampler.stamp}-2-unfinished", f"{trainer.sampler.stamp}-2"]
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()  # by hand
    trainer.evaluate()
    assert torch.equal(server.model.lm_head.weight, trainer.model.lm_head.weight)


def test_an_adapter_goes_alone(server, tmp_path):
    server.first, own = causal_lm(), server.first
    try:
        server._forget()
        trainer = build("grpo", tmp_path, lora=True, **by(server))
        trainer.train()
    finally:
        server.first = own
    assert [body["lora_name"] for path, body in server.calls if path == "/v1/load_lora_adapter"] == ["policy"] * 2
    assert {body["model"] for body in bodies(server)} == {"policy"}
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 1e-5


def test_weights_that_do_not_arrive_are_found(server, tmp_path):
    """The run stops before it learns of such tokens, or goes on with the local sampler."""
    server.faults.append(Fault("stale", path="/collective_rpc", times=10))
    trainer = build("grpo", tmp_path, **by(server))
    with pytest.raises(MismatchError, match=r"vLLM does not sample by the policy's weights: .*vllm_weight_sync"):
        trainer.train()
    assert trainer.state.global_step == 0
    goes_on = build("grpo", tmp_path / "local", **by(server, vllm_on_mismatch="local"))
    goes_on.train()
    assert goes_on.state.global_step == 2
    assert goes_on.sampler.exact
    loose = build("grpo", tmp_path / "loose", **by(server, vllm_verify_tolerance=9.0, max_steps=1))
    loose.train()


def test_turns_of_an_environment(server, tmp_path):
    """Rows are independent, and the prefix of a row is asked again with what was added to it."""
    trainer = trl.GRPOTrainer(
        causal_lm(),
        args=trl.GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=20, max_steps=1,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1, learning_rate=1e-2, **by(server),
        ),
        train_dataset=prompts(), processing_class=tokenizer(), environment=letters(),
    )  # fmt: skip
    trainer.train()
    rows = [body["token_ids"] for body in bodies(server)]
    first = rows[0]
    assert len(rows) > 4
    assert all(body["sampling_params"]["n"] == 1 for body in bodies(server))
    assert len({body["sampling_params"]["seed"] for body in bodies(server)[:4]}) == 4
    assert any(len(row) > len(first) and row[: len(first)] == first for row in rows)


def test_completions_that_a_callback_logs(server, tmp_path):
    trainer = build("grpo", tmp_path, max_steps=1, **by(server))
    callback = trl.LogCompletionsCallback(trainer, freq=1)
    trainer.add_callback(callback)
    trainer.train()
    asked = [tuple(ids) for ids in trainer.eval_dataset["prompt_ids"]]
    last = [tuple(body["token_ids"]) for body in bodies(server)][-3:]
    assert sorted(last) == sorted(asked)  # they arrive in any order
    assert len(callback.table) == 3
    assert server.version == f"{trainer.sampler.stamp}-1"


def ppo(folder, sampler=None, min_length=0, **fields):
    from test_ppo_run import PROMPTS, causal

    model = causal()
    if min_length:
        fields["generation_kwargs"] = {"eos_token_id": -1}  # all are as long as they may be
    config = trl.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-2, ppo_epochs=2, steps=8,
                           max_new_tokens=4, output_dir=str(folder), save_steps=100, **fields)  # fmt: skip
    return trl.PPOTrainer(
        config, model, tokenizer=tokenizer(), dataset=Dataset.from_list(PROMPTS), data_collator=list,
        reward_funcs=early_letters, sampler=None if sampler is None else sampler(model),
    )  # fmt: skip


def of(server, model):
    engine = ServerEngine(server.url, wait=0.3)
    return VLLMSampler(engine, make_sync(model, urls=engine.urls), tokenizer(), model=model)


def test_ppo(server, tmp_path):
    """What is served is the policy without its value head."""
    trainer = ppo(tmp_path, lambda model: of(server, model))
    gaps = []
    trainer.train(callback=lambda step, stats, batch: gaps.append(stats["sampling/sampling_logp_difference/mean"]))
    assert [one for one in pushes(server) if "unfin" not in one] == ["policy-1", "policy-2"]
    assert max(gaps) < 1e-5
    query = torch.tensor([1, 5, 9])
    trainer.generate(query, max_new_tokens=3, do_sample=True)
    assert pushes(server)[-1] == "policy-3"
    before = len(bodies(server))
    trainer.generate([query], max_new_tokens=3, do_sample=True, generate_ref_response=True)
    assert len(bodies(server)) == before + 1  # the reference is not served
    assert pushes(server)[-1] == "policy-3"


@pytest.mark.parametrize("others", [lambda r: [x[:-1] for x in r], lambda r: r[::-1]], ids=["shorter", "in turn"])
def test_a_step_that_is_given_other_responses_is_not_weighed_by_the_wrong_ones(others, server, tmp_path, caplog):
    """Of one shape or not: the engine's log-probabilities belong to the responses that it drew."""

    def with_others(trainer):
        step = trainer.step
        trainer.step = lambda queries, responses, scores, masks=None: step(queries, others(responses), scores, masks)
        return trainer

    with pytest.raises(ValueError, match=r"^vllm_importance_sampling_correction=True: `step` was given other respo"):
        with_others(ppo(tmp_path / "weighed", lambda model: of(server, model), min_length=2)).train()
    loose = {"vllm_importance_sampling_correction": False, "min_length": 2}
    with caplog.at_level("WARNING", "trl"):
        stats = with_others(ppo(tmp_path, lambda model: of(server, model), **loose)).train()
    assert not [name for name in stats if name.startswith("sampling/")]
    assert sum("nothing is logged under sampling/" in text for text in caplog.messages) == 1


def test_best_of_n(server):
    from test_ppo_run import causal

    model = causal()
    best = BestOfNSampler(
        model, tokenizer(), queries_to_scores=lambda texts: list(map(len, texts)), length_sampler=lambda: 5,
        sample_size=3, sampler=of(server, model),
    )  # fmt: skip
    torch.manual_seed(0)
    texts = best.generate([[1, 5, 9], [1, 7]], do_sample=True)
    assert [len(each) for each in texts] == [1, 1]
    best.generate([[1, 5, 9]], do_sample=True)
    assert [one for one in pushes(server) if "unfin" not in one] == ["policy-0"]
    assert [body["sampling_params"]["n"] for body in bodies(server)] == [3, 3, 3]


# --- a sampler of the user --------------------------------------------------------------------------


class Loud:
    """Another sampler: it says its log-probabilities a little wrong."""

    def __init__(self, model, tokenizer):
        self.inner, self.followed = make_sampler(model, tokenizer), []

    def follow(self, version):
        self.followed.append(version)

    def sample(self, prompts, params, n=1):
        groups = self.inner.sample(prompts, params, n)
        wrong = lambda c: [each - 0.01 for each in c.logprobs]  # noqa: E731
        return [[Completion(c.ids, wrong(c), wrong(c), c.finish_reason) for c in group] for group in groups]


def test_a_users_sampler_is_not_believed(tmp_path):
    """The old log-probabilities are the trainer's own, so that the run is that of the local sampler."""
    model = causal_lm()
    own = Loud(model, tokenizer())
    case = CASES["grpo"]
    with pytest.MonkeyPatch.context() as patch:
        given = {**case.arguments(), "model": model, "sampler": own}
        patch.setitem(CASES, "grpo", replace(case, arguments=lambda: dict(given)))
        trainer = build("grpo", tmp_path / "own", num_iterations=1)
    trainer.train()
    assert own.followed == [0, 1]
    assert history(trainer, "sampling/sampling_logp_difference/mean")[0] == pytest.approx(0.01, abs=1e-5)
    local = build("grpo", tmp_path / "local", num_iterations=1)
    local.train()
    for name, value in weights(local).items():
        torch.testing.assert_close(weights(trainer)[name], value, atol=1e-4, rtol=0)


def test_what_is_no_sampler(tmp_path):
    arguments = {"model": causal_lm(), "reward_funcs": early_letters, "train_dataset": prompts(),
                 "processing_class": tokenizer()}  # fmt: skip
    config = trl.GRPOConfig(str(tmp_path), report_to="none", per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="sampler: a dict has no `sample"):
        trl.GRPOTrainer(**arguments, args=config, sampler={})
    config = trl.GRPOConfig(str(tmp_path), report_to="none", per_device_train_batch_size=8, use_vllm=True,
                            vllm_mode="server")  # fmt: skip
    with pytest.raises(ValueError, match="sampler: use_vllm=True makes one too"):
        trl.GRPOTrainer(**arguments, args=config, sampler=Loud(causal_lm(), None))


# --- settings ---------------------------------------------------------------------------------------


def test_settings_of_a_server_reach_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server.api_key = "secret"
    host, port = server.url.removeprefix("http://").split(":")
    given = by(server, vllm_server_base_url=None, vllm_server_host=host, vllm_server_port=int(port))
    trainer = build(
        "grpo", tmp_path, **given, vllm_structured_outputs_regex="a+", vllm_request_timeout=7.0,
        vllm_sync_folder=str(tmp_path / "sync"), vllm_weight_sync="folder", vllm_group_port=1234, max_steps=1,
    )  # fmt: skip
    engine = trainer.sampler.engine
    assert (engine.urls, engine.wait, engine.timeout) == ((server.url,), 0.3, 7.0)
    trainer.train()
    assert bodies(server)[0]["sampling_params"]["structured_outputs"] == {"regex": "a+"}
    (folder,) = {body["kwargs"]["weights_path"] for path, body in server.calls if path == "/collective_rpc"}
    assert folder.startswith(str(tmp_path / "sync"))


def test_a_server_that_is_named_is_meant(tmp_path, caplog):
    made = trl.GRPOConfig(str(tmp_path), report_to="none", use_vllm=True, vllm_server_host="10.0.0.1")
    assert (made.vllm_mode, made.vllm_urls()) == ("server", ("http://10.0.0.1:8000",))
    assert caplog.messages == ["vllm_server_host='10.0.0.1' names a server: vllm_mode='server'"]


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"vllm_dtype": "float32"}, "vllm_dtype='float32': has no effect without use_vllm=True"),
        ({"use_vllm": True, "vllm_mode": "server", "vllm_dtype": "float32"}, "has no effect on a server: say it to"),
        ({"use_vllm": True, "vllm_mode": "server", "sampling_max_rows": 4}, "sampling_max_rows=4: has no effect with"),
        ({"vllm_device": "cuda:1"}, "vllm_device='cuda:1': has no effect: vLLM runs on the trainer's device"),
    ],
)
def test_a_setting_without_effect_says_so(given, line, tmp_path, caplog):
    trl.RLOOConfig(str(tmp_path), report_to="none", **given)
    (said,) = caplog.messages
    assert line in said


@pytest.fixture
def vllm(monkeypatch):
    """A module in the place of vLLM's, whose engine is a tiny model's."""
    module = ModuleType("vllm")
    module.__version__ = "0.32.0"
    module.made = []

    def engine(**settings):
        module.made.append(FakeLLM(settings))
        return module.made[-1]

    module.LLM, module.SamplingParams = engine, lambda **asked: asked
    params, lora = ModuleType("vllm.sampling_params"), ModuleType("vllm.lora.request")
    params.StructuredOutputsParams = lambda **given: ("structured", given)
    lora.LoRARequest = lambda **given: SimpleNamespace(**given)
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: True)
    for part in (params, lora, platforms):
        monkeypatch.setitem(sys.modules, part.__name__, part)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


class FakeLLM:
    """vLLM's offline engine, as far as it is asked here."""

    def __init__(self, settings):
        self.settings, self.calls, self.asleep = settings, [], False
        self.server = FakeVLLM(causal_lm(), tokenizer())
        config = SimpleNamespace(model=settings["model"], max_model_len=settings["max_model_len"])
        self.llm_engine = SimpleNamespace(model_config=config, add_lora=self._add_lora)

    def _add_lora(self, request):
        body = {"lora_name": request.lora_name, "lora_path": request.lora_path, "load_inplace": request.load_inplace}
        self.server._load_adapter(body)
        self.calls.append("lora")

    def generate(self, rows, params, use_tqdm, lora_request):
        assert not self.asleep
        adapters = lora_request if isinstance(lora_request, list) else [lora_request] * len(rows)
        return [self._answer(*each) for each in zip(rows, params, adapters, strict=True)]

    def _answer(self, row, asked, adapter):
        body = {"token_ids": row["prompt_token_ids"], "sampling_params": asked}
        answer = self.server._generate(body | ({} if adapter is None else {"model": adapter.lora_name}))
        entries = answer["prompt_logprobs"]
        scores = entries and [
            entry and {int(token): SimpleNamespace(**one) for token, one in entry.items()} for entry in entries
        ]
        return SimpleNamespace(outputs=list(map(self._output, answer["choices"])), prompt_logprobs=scores)

    @staticmethod
    def _output(choice):
        content = (choice["logprobs"] or {"content": []})["content"]
        logprobs = [{entry["token_id"]: SimpleNamespace(logprob=entry["logprob"])} for entry in content]
        spans = [SimpleNamespace(**span) for span in choice["weight_versions"]]
        return SimpleNamespace(
            token_ids=choice["token_ids"], logprobs=logprobs, finish_reason=choice["finish_reason"],
            weight_versions=spans, sampling_mask=None, routed_experts=None,
        )  # fmt: skip

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        self.server.model.load_state_dict(dict(kwargs["weights_iterator"]))
        self.calls.append("reload")

    def update_weight_version(self, version):
        self.server.version = version

    def reset_prefix_cache(self):
        self.calls.append("reset")

    def get_tokenizer(self):
        return self.server.tokenizer

    def sleep(self, level):
        self.asleep = True
        self.calls.append("sleep")

    def wake_up(self):
        self.asleep = False
        self.calls.append("wake")


def test_settings_of_an_engine_in_this_process_reach_it(vllm, tmp_path):
    trainer = build(
        "grpo", tmp_path, use_vllm=True, vllm_dtype="bfloat16", vllm_gpu_memory_utilization=0.4,
        vllm_max_model_length=48, vllm_model_impl="transformers", vllm_enable_prefix_caching=True,
        vllm_enable_sleep_mode=True, vllm_tensor_parallel_size=1,
    )  # fmt: skip
    (llm,) = vllm.made
    settings = dict(llm.settings)
    assert settings.pop("model") == settings.pop("tokenizer")  # a folder that is gone by now
    assert settings == {
        "dtype": "bfloat16", "gpu_memory_utilization": 0.4, "max_model_len": 48, "model_impl": "transformers",
        "enable_prefix_caching": True, "enable_sleep_mode": True, "tensor_parallel_size": 1, "seed": 3,
        "trust_remote_code": False, "logprobs_mode": "processed_logprobs", "enable_chunked_prefill": False,
    }  # fmt: skip
    trainer.train()
    assert llm.calls.count("reload") == 2
    assert llm.asleep
    assert llm.calls.count("wake") == llm.calls.count("sleep") - 1
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 1e-5
    assert trainer.sampler.context == 48


def test_an_engine_that_the_local_sampler_replaces_gives_its_memory_back(vllm, tmp_path, monkeypatch):
    """Before the local sampler is made, which asks how much there is."""
    order = []
    monkeypatch.setattr(FakeLLM, "collective_rpc", lambda self, method, kwargs: list(kwargs["weights_iterator"]))
    trainer = build("grpo", tmp_path, use_vllm=True, vllm_on_mismatch="local")
    (llm,) = vllm.made
    llm.llm_engine.engine_core = SimpleNamespace(shutdown=lambda: order.append("shutdown"))
    otherwise = trainer.sampler.otherwise
    trainer.sampler.otherwise = lambda: order.append("local") or otherwise()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(-3)  # the engine keeps the weights that it began with
    trainer.train()
    assert trainer.sampler.exact
    assert order == ["shutdown", "local"]
    assert trainer.sampler.engine.llm is None


def test_an_adapter_in_this_process(vllm, tmp_path):
    trainer = build("rloo", tmp_path, lora=True, max_steps=1, use_vllm=True)
    (llm,) = vllm.made
    assert (llm.settings["enable_lora"], llm.settings["max_lora_rank"]) == (True, 8)
    assert llm.settings["dtype"] == "float32"
    trainer.train()
    assert llm.calls.count("lora") == 1


def test_memory_that_is_too_short(vllm, tmp_path, monkeypatch):
    def engine(**settings):
        raise ValueError("Free memory on device is less than desired GPU memory utilization")

    monkeypatch.setattr(vllm, "LLM", engine)
    with pytest.raises(EngineError, match=r"could not start in this process .* lower vllm_gpu_memory_utilization"):
        build("grpo", tmp_path, use_vllm=True)


# --- a server that does not serve the policy ----------------------------------------------------------


def test_nobody_answers(server, tmp_path):
    server.stop()
    with pytest.raises(EngineError, match=r"does not answer .*for 0\.3 s: start it with `trl vllm-serve --model"):
        build("grpo", tmp_path, **by(server))


def served_by(server, model=None):
    model = causal_lm() if model is None else model
    sampler = VLLMSampler(ServerEngine(server.url, wait=0.3), None, tokenizer(), model=model)
    return sampler, model


def test_another_tokenizer(server):
    sampler, model = served_by(server)
    with pytest.raises(EngineError, match=r"serves folder/of/the/model, whose tokenizer makes \[.*: serve the policy"):
        check_served(sampler, model, byte_tokenizer())


def test_a_smaller_vocabulary(server):
    sampler, model = served_by(server)
    model.resize_token_embeddings(104)
    with pytest.raises(EngineError, match="does not know the policy's token 103: serve the policy's own folder"):
        check_served(sampler, model, tokenizer())


def test_a_network_of_another_shape(server, tmp_path, monkeypatch):
    from conformity import config

    config(num_hidden_layers=3).save_pretrained(tmp_path)
    monkeypatch.setattr(server, "name", str(tmp_path))
    sampler, model = served_by(server)
    with pytest.raises(EngineError, match=r"whose num_hidden_layers is 3, and that of the policy 2: serve"):
        check_served(sampler, model, tokenizer())


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b'{"vocab_size": 100,', r"it is not JSON \(line 1: .*\)"),
        (b"[]", "it holds no JSON object"),
        (b"\xff\xfe{", "it is not UTF-8"),
    ],
)
def test_a_config_that_cannot_be_read(content, wrong, server, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_bytes(content)
    monkeypatch.setattr(server, "name", str(tmp_path))
    sampler, model = served_by(server)
    said = rf"^vLLM serves {tmp_path}, and whether that is the policy is not known: .*config\.json: {wrong}; mend it"
    with pytest.raises(EngineError, match=said):
        check_served(sampler, model, tokenizer())


def test_logprobs_without_filters(server):
    server.processed = False
    sampler, model = served_by(server)
    with pytest.raises(EngineError, match="start it with --logprobs-mode processed_logprobs, as `trl vllm-serve` does"):
        check_served(sampler, model, tokenizer())


def test_a_shorter_context_is_said(server, caplog):
    server.max_model_len = 32
    sampler, model = served_by(server)
    with caplog.at_level(logging.WARNING, "trl"):
        check_served(sampler, model, tokenizer())
    assert "vLLM serves 32 tokens of prompt and completion together, the policy 64" in caplog.text
    assert sampler.context == 32


# --- a server that is lost in the midst ---------------------------------------------------------------


def saving(server, **settings):
    settings = {"save_strategy": "steps", "save_steps": 100, "vllm_verify_every": 0, **settings}
    return by(server, num_iterations=1, max_steps=4, **settings)


def test_a_server_that_dies_leaves_a_checkpoint(server, tmp_path):
    """Whoever resumes goes on as if nothing had been."""
    whole = build("grpo", tmp_path / "whole", **saving(server))
    whole.train()
    broken = build("grpo", tmp_path / "broken", **saving(server))
    server.faults.append(Fault("die", after=2))  # amid the third rollout
    said = r"step 3: the vLLM server at .* does not answer .*; checkpoint-2 is saved: go on with train\("
    with pytest.raises(EngineError, match=said):
        broken.train()
    assert [folder.name for folder in checkpoints(tmp_path / "broken")] == ["checkpoint-2"]
    server.start()
    again = build("grpo", tmp_path / "broken", **saving(server))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], value, atol=1e-6, rtol=0)


def test_a_server_that_dies_before_the_first_step(server, tmp_path):
    trainer = build("grpo", tmp_path, **saving(server))
    server.stop()
    with pytest.raises(EngineError, match=r"^the vLLM server at .* does not answer"):
        trainer.train()
    assert checkpoints(tmp_path) == []
    with pytest.raises(EngineError, match=r"^the vLLM server at .* does not answer"):
        trainer.evaluate()


def test_a_server_that_dies_in_an_evaluation(server, tmp_path):
    given = saving(server, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=1)
    trainer = build("grpo", tmp_path, **given)
    fault = Fault("oom", after=2, times=10)
    server.faults.append(fault)
    with pytest.raises(EngineError, match=r"step 3: .* is out of memory .*; checkpoint-2 is saved"):
        trainer.train()
    assert len(trainer.get_eval_dataloader()) > 1
    assert fault.times == 9  # one batch asked, the others did not
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-2"]
    with pytest.raises(EngineError, match="is out of memory"):
        trainer.evaluate()


def test_without_checkpoints_the_error_says_so(server, tmp_path):
    trainer = build("rloo", tmp_path, **saving(server, save_strategy="no"))
    server.faults.append(Fault("oom", after=2, times=10))
    with pytest.raises(EngineError, match=r"step 2: .*; save_strategy='no' keeps no checkpoint"):
        trainer.train()


def test_ppo_leaves_a_checkpoint(server, tmp_path):
    trainer = ppo(tmp_path, lambda model: of(server, model))
    server.faults.append(Fault("oom", after=8, times=10))
    with pytest.raises(EngineError, match=r"step 2: .* is out of memory .*; checkpoint-1 is saved: go on with train"):
        trainer.train()
    server.faults.clear()
    again = ppo(tmp_path, lambda model: of(server, model))
    again.train(resume_from_checkpoint=True)
    assert again.data_position == 2


def test_ppo_leaves_a_checkpoint_where_an_evaluation_fails(server, tmp_path):
    """The step before it is learned and saved."""
    trainer = ppo(tmp_path, lambda model: of(server, model))

    def report(stats, batch):
        raise EngineError("the engine is gone")

    trainer._report = report
    with pytest.raises(EngineError, match=r"^step 2: the engine is gone; checkpoint-1 is saved: go on with train"):
        trainer.train()
    again = ppo(tmp_path, lambda model: of(server, model))
    again.train(resume_from_checkpoint=True)
    assert again.data_position == 2


def test_a_restart_in_the_midst_is_made_good(server, tmp_path, caplog):
    whole = build("grpo", tmp_path / "whole", **saving(server))
    whole.train()
    trainer = build("grpo", tmp_path / "again", **saving(server))
    server.faults.append(Fault("restart", after=3))
    with caplog.at_level(logging.WARNING, "trl"):
        trainer.train()
    assert "vLLM was started anew" in caplog.text
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(trainer)[name], value, atol=1e-6, rtol=0)


def test_no_default_has_changed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = RolloutConfig("unused", report_to="none")
    assert (made.use_vllm, made.vllm_mode, made.vllm_server_port, made.vllm_server_timeout) == (
        False, "colocate", 8000, 240.0
    )  # fmt: skip
