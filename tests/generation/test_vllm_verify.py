"""A sync that did not do what it said is found before a token of it is used."""

import copy
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM, Fault
from tiny_models import lora, tiny_model

from trl.generation import LocalSampler, SamplingParams
from trl.generation.sampler import is_exact
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.engine import EngineError, Settings
from trl.generation.vllm.sampler import VLLMSampler
from trl.generation.vllm.sync import make_sync
from trl.generation.vllm.verify import MismatchError, Verification, apart

ROW = torch.arange(3, 20)[None]
PROMPTS = [[5, 6, 7], [8, 9, 10, 11]]


def step(model: Any) -> None:
    """An optimizer step of SGD."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    optimizer.zero_grad()
    model(input_ids=ROW, labels=ROW).loss.backward()
    optimizer.step()


def scored(model: Any) -> Any:
    @torch.no_grad()
    def score(prompts: list[list[int]], ids: list[list[int]]) -> list[list[float]]:
        found = []
        for prompt, row in zip(prompts, ids, strict=True):
            logprobs_TV = model(input_ids=torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(logprobs_TV.gather(1, torch.tensor(row)[:, None])[:, 0].tolist())
        return found

    return score


def verification(policy: Any, **more: Any) -> Verification:
    given = {"vocabulary": 60, **more}
    return Verification(scored(policy), lambda: "float32", **given)


def sampler_of(server: FakeVLLM, policy: Any, verify: Verification, **more: Any) -> VLLMSampler:
    return VLLMSampler(
        ServerEngine(server.url), make_sync(policy), model=policy, stamp="run", verify=verify, **more
    )  # fmt: skip


def trained(name: str, adapter: bool) -> tuple[Any, Any]:
    """A policy, and what a server begins with."""
    from peft import get_peft_model

    first = tiny_model(name)
    return (get_peft_model(copy.deepcopy(first), lora(name)) if adapter else copy.deepcopy(first)), first


@pytest.mark.parametrize(("name", "adapter"), [("llama", False), ("qwen2", False), ("llama", True)])
def test_a_sync_that_is_right_is_measured(name, adapter):
    policy, first = trained(name, adapter)
    with FakeVLLM(first) as server:
        verify = verification(policy)
        sampler = sampler_of(server, policy, verify)
        for version in range(3):
            sampler.follow(version)
            assert verify.last.tokens == 16 * 4
            assert verify.last.mean < 1e-6
            sampler.sample(PROMPTS, SamplingParams(max_new_tokens=3, seed=0))
            assert verify.prompts == PROMPTS
            step(policy)


@pytest.mark.parametrize(("name", "adapter"), [("llama", False), ("llama", True)])
def test_a_sync_that_changed_nothing_is_found(name, adapter):
    policy, first = trained(name, adapter)
    with FakeVLLM(first) as server:
        sampler = sampler_of(server, policy, verification(policy))
        sampler.follow(0)
        step(policy)
        path = "/v1/load_lora_adapter" if adapter else "/collective_rpc"
        server.faults.append(Fault("stale", path=path))
        with pytest.raises(MismatchError, match=r"vLLM does not sample by the policy's weights: .* 64 tokens .* away"):
            sampler.follow(1)
        sampler.follow(1)  # the next sync is right, and is made although the number is the same
        assert sampler.expected == "run-1"


def test_a_tied_head_that_stays_is_found_and_named():
    policy, first = trained("qwen2", False)
    with FakeVLLM(first, tied_head_stays=True) as server:
        sampler = sampler_of(server, policy, verification(policy, tied=True))
        sampler.follow(0)  # the weights are still the first ones
        step(policy)
        with pytest.raises(
            MismatchError, match="The policy's head is its embeddings, and for some models vLLM keeps the old head"
        ):
            sampler.follow(1)


def test_the_local_sampler_goes_on_where_that_is_asked(caplog):
    policy, first = trained("qwen2", False)
    with FakeVLLM(first, tied_head_stays=True) as server:
        otherwise = lambda: LocalSampler(policy)  # noqa: E731
        sampler = sampler_of(server, policy, verification(policy), otherwise=otherwise)
        sampler.follow(0)
        assert not is_exact(sampler)
        step(policy)
        sampler.follow(1)
        assert is_exact(sampler)
        assert caplog.text.count("The local sampler goes on.") == 1
        calls = len(server.calls)
        step(policy)
        sampler.follow(2)
        params = SamplingParams(max_new_tokens=4, seed=3)
        [[found]] = sampler.sample([[5, 6]], params)
        [[own]] = LocalSampler(policy).sample([[5, 6]], params)
        assert (found.ids, found.logprobs) == (own.ids, own.logprobs)
        assert len(server.calls) == calls


def test_a_wrong_model_is_found_at_the_first_sync_of_an_adapter():
    from peft import get_peft_model

    policy = get_peft_model(tiny_model("llama"), lora("llama"))
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.3)
    with FakeVLLM(other) as server, pytest.raises(MismatchError, match="Does it serve another model"):
        sampler_of(server, policy, verification(policy)).follow(0)


def test_weights_of_another_run_are_found():
    policy, first = trained("llama", False)
    with FakeVLLM(first) as server:
        sampler = sampler_of(server, policy, verification(policy))
        server.faults.append(Fault("other-version"))
        with pytest.raises(EngineError, match="after the weights 'run-0' were given, vLLM samples by 'other'"):
            sampler.follow(0)


def test_every_kth_push_is_checked():
    policy, first = trained("llama", False)
    with FakeVLLM(first) as server:
        sampler = sampler_of(server, policy, verification(policy, every=2))
        asked = []
        for version in range(5):
            sampler.follow(version)
            asked.append(sum(path == "/inference/v1/generate" for path, _ in server.calls))
        assert asked == [4, 4, 8, 8, 12]
        silent = sampler_of(server, policy, verification(policy, every=0))
        silent.follow(0)
        assert sum(path == "/inference/v1/generate" for path, _ in server.calls) == 12


def test_servers_say_how_they_were_started():
    with (
        FakeVLLM(tiny_model("llama")) as one,
        FakeVLLM(tiny_model("llama"), dtype="torch.bfloat16", max_lora_rank=0) as other,
    ):
        assert ServerEngine(one.url).settings() == Settings("torch.float32", 16, (1,))
        assert ServerEngine([one.url, other.url]).settings() == Settings(None, 0, (1, 1))
        other.routes_for_training = False
        assert ServerEngine(other.url).settings() == Settings()


@pytest.mark.parametrize(
    ("trainer", "engine", "tolerance", "mean"),
    [
        ("float32", "torch.float32", None, 2e-4),
        ("float32", "float", None, 2e-4),
        ("float32", "bfloat16", None, 0.1),
        ("float32", None, None, 0.1),
        ("bfloat16", "float32", None, 0.1),
        ("tf32", "half", None, 0.1),
        ("float32", "fp8_e4m3", None, 0.1),
        ("float32", "float32", 0.3, 0.3),
    ],
)
def test_how_far_they_may_be_apart(trainer, engine, tolerance, mean):
    verify = Verification(scored(None), lambda: trainer, 60, dtype=engine, tolerance=tolerance)
    assert verify.limits()[0] == pytest.approx(mean)
    assert verify.limits()[1] == pytest.approx(20 * mean)


def test_numbers_that_are_none_are_as_far_apart_as_can_be():
    found = apart([[-1.0, -2.0]], [[-1.5, float("nan")]], [[3, 4]])
    assert found == (2, float("inf"), float("inf"), 4)
    assert apart([[-1.0, -2.0]], [[-1.5, -2.0]], [[3, 4]]) == (2, 0.25, 0.5, 3)
    assert apart([], [], []).tokens == 0
