"""Weights into a real vLLM: adapters, whole ones in a folder; a push that did not do what it said is found."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from servers import tiny_llama

from trl.generation import SamplingParams
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.sampler import VLLMSampler
from trl.generation.vllm.sync import make_sync
from trl.generation.vllm.verify import MismatchError, Verification

PROMPTS = [[4, 5, 6], [31, 7]]
ROWS = torch.arange(4, 36).reshape(2, 16)


def trained(way, tied=False):
    model = tiny_llama(tied)
    if way == "folder":
        return model
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )  # fmt: skip


def step(model):
    """A large step of SGD."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def scored(model, prompts, ids):
    with torch.no_grad():
        return [
            model(torch.tensor([[*prompt, *row]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[range(len(row)), row]
            for prompt, row in zip(prompts, ids, strict=True)
        ]


def following(server, policy, way, **more):
    engine = ServerEngine(server.url, wait=5.0)
    verify = Verification(
        lambda *asked: [row.tolist() for row in scored(policy, *asked)], lambda: "float32", vocabulary=100,
        dtype="torch.float32", **more,
    )  # fmt: skip
    return VLLMSampler(engine, make_sync(policy, way), model=policy, stamp="run", verify=verify)


@pytest.mark.parametrize("way", ["adapter", "folder"])
def test_the_engine_follows_the_policy(way, server, tied):
    policy, told = trained(way, way == "adapter"), []
    sampler = following(tied if way == "adapter" else server, policy, way)
    for version in range(3):
        sampler.follow(version)
        assert sampler.verify.last.mean < 1e-6
        groups = sampler.sample(PROMPTS, SamplingParams(24, stop_token_ids=(), seed=2), n=2)
        made = [one for group in groups for one in group]
        own = scored(policy, [prompt for prompt in PROMPTS for _ in range(2)], [one.ids for one in made])
        apart = max((theirs - torch.tensor(one.logprobs)).abs().max() for theirs, one in zip(own, made, strict=True))
        assert apart < 2e-5  # of the least likely tokens, after steps that are large
        assert {span.version for one in made for span in one.versions} == {f"run-{version}"}
        told.append(made[0].logprobs)
        step(policy)
    assert abs(told[0][0] - told[1][0]) > 1e-2  # steps are seen
    sampler.close()


def test_the_base_stays_beside_the_adapter(tied):
    """Its log-probabilities are the reference's."""
    policy = trained("adapter", tied=True)
    sampler = following(tied, policy, "adapter")
    sampler.follow(0)
    (found,) = sampler.engine.prompt_logprobs([[4, 5, 6, 7]])
    with policy.disable_adapter():
        (own,) = scored(policy, [[4]], [[5, 6, 7]])
    assert max(abs(entry[token] - float(x)) for entry, token, x in zip(found, [5, 6, 7], own, strict=True)) < 3e-6
    sampler.close()


def test_whole_weights_of_a_tied_model_are_right(tied):
    """The head stands among them under its own name; without it the server would keep its old one."""
    policy = trained("folder", tied=True)
    sampler = following(tied, policy, "folder", tied=True)
    for version in range(2):
        sampler.follow(version)
        assert sampler.verify.last.mean < 1e-6
        step(policy)
    sampler.close()


def test_weights_without_the_tied_head_are_found(tied, tmp_path, monkeypatch):
    """As `save_pretrained` writes them. The server answers success."""
    policy = trained("folder", tied=True)
    sampler = following(tied, policy, "folder", tied=True)
    sampler.follow(0)
    step(policy)
    policy.save_pretrained(tmp_path)
    load = sampler.engine.reload_weights
    monkeypatch.setattr(sampler.engine, "reload_weights", lambda folder: load(str(tmp_path)))
    with pytest.raises(MismatchError, match=r"away from the trainer's on average .* The policy's head is its embeddin"):
        sampler.follow(1)
    assert sampler.verify.last.mean > 0.01
    sampler.close()


@pytest.mark.parametrize("way", ["adapter", "folder"])
def test_a_push_that_changed_nothing_is_found(way, server, tied, monkeypatch):
    policy = trained(way, way == "adapter")
    sampler = following(tied if way == "adapter" else server, policy, way)
    sampler.follow(0)
    step(policy)
    monkeypatch.setattr(
        sampler.engine, {"adapter": "load_adapter", "folder": "reload_weights"}[way], lambda *given: None
    )
    with pytest.raises(MismatchError, match=r"^vLLM does not sample by the policy's weights"):
        sampler.follow(1)
    sampler.close()


def test_an_adapter_outlives_its_folder(tied):
    """A run that has ended takes it along; a server that read it again would end."""
    sampler = following(tied, trained("adapter", tied=True), "adapter")
    for version in range(2):
        sampler.follow(version)
    sampler.sync.close()
    tied.post("/reset_prefix_cache")
    (group,) = sampler.sample(PROMPTS[:1], SamplingParams(12, stop_token_ids=(), seed=2))
    assert len(group[0].ids) == 12
    sampler.close()


@pytest.mark.parametrize("way", ["adapter", "folder"])
def test_a_server_that_began_anew_gets_the_weights_once_more(way, server, tied, caplog):
    server = tied if way == "adapter" else server
    policy = trained(way, way == "adapter")
    if way == "folder":
        step(policy)
    sampler = following(server, policy, way)
    sampler.follow(3)
    params = SamplingParams(12, stop_token_ids=(), seed=2)
    before = [one.ids for group in sampler.sample(PROMPTS, params, n=2) for one in group]
    server.begin_anew()
    made = [one for group in sampler.sample(PROMPTS, params, n=2) for one in group]
    assert [one.ids for one in made] == before
    assert {span.version for one in made for span in one.versions} == {"run-3"}
    assert "it gets the policy's weights once more" in caplog.text
    sampler.close()


def test_weights_of_another_run_are_not_taken_for_ours(server):
    """Two runs at one server: the one that comes late takes its weights back."""
    ours, theirs = trained("folder"), copy.deepcopy(trained("folder"))
    step(theirs)
    mine, other = following(server, ours, "folder"), following(server, theirs, "folder")
    other.stamp = "other"
    mine.follow(0)
    other.follow(0)
    (group,) = mine.sample(PROMPTS[:1], SamplingParams(12, stop_token_ids=(), seed=2))
    (own,) = scored(ours, PROMPTS[:1], [group[0].ids])
    assert (own - torch.tensor(group[0].logprobs)).abs().max() < 3e-6
    mine.close()
    other.close()
