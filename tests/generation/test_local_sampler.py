"""The local engine: one reading of each prompt, rows that come and go, numbers that do not depend on the company."""

import random

import pytest
import torch
from sampled_models import build, random_prompts, raw_logprobs
from tiny_models import lora

from trl.generation import LocalSampler, SamplingParams, TransformersSampler
from trl.generation.kv_attention import NAME
from trl.generation.packed_weights import packed_weights
from trl.generation.probe import NotLocal
from trl.generation.rows import uniforms
from trl.models import AutoModelForCausalLMWithValueHead

VARIED = SamplingParams(max_new_tokens=24, seed=4, stop_token_ids=tuple(range(2, 10)))


def forwarded(model) -> list[int]:
    """Tokens in each forward pass from now on."""
    counts: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: counts.append(args[0].numel()))
    return counts


def ids_of(completions) -> list[list[list[int]]]:
    return [[c.ids for c in group] for group in completions]


def test_a_prompt_is_read_once_for_its_group():
    model = build("llama")
    sampler = LocalSampler(model)
    counts = forwarded(model)
    params = SamplingParams(max_new_tokens=6, seed=0, stop_token_ids=())
    sampler.sample(random_prompts(20, 7), params, n=8)
    assert counts == [27] + [16] * 5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gemma3", "gpt_oss"])
def test_what_prompts_have_in_common_is_read_once(name):
    """Conversations of two groups that went apart after their prompts of 34 tokens: 2 starts and 6 ends."""
    model = build(name)
    starts, ends = random_prompts(34, 34), random_prompts(3, 1, 5, 4, 2, 3)
    prompts = [starts[place % 2] + end for place, end in enumerate(ends)]
    greedy = SamplingParams(max_new_tokens=4, temperature=0, stop_token_ids=())
    sampler, counts = LocalSampler(model), forwarded(model)
    together = sampler.sample(prompts, greedy)
    assert counts == [34 + 34 + sum(map(len, ends)), 6, 6, 6]
    for prompt, (completion,) in zip(prompts, together, strict=True):
        expected = raw_logprobs(model, prompt, completion.ids)
        assert completion.raw_logprobs == pytest.approx(expected, abs=2e-5)


def test_equal_prompts_are_read_once_and_short_starts_apart():
    model = build("llama")
    params = SamplingParams(max_new_tokens=1, seed=0, stop_token_ids=())
    (prompt,) = random_prompts(40)
    sampler, counts = LocalSampler(model), forwarded(model)
    sampler.sample([prompt] * 5, params)
    sampler.sample([[*prompt[:20], 5], [*prompt[:20], 6]], params)
    sampler.sample([prompt[:33], prompt], params)  # one is the start of the other
    assert counts == [39 + 5, 42, 32 + 1 + 8]


def test_finished_rows_leave_and_waiting_ones_take_their_places():
    model = build("llama")
    sampler = LocalSampler(model, max_rows=6)
    counts = forwarded(model)
    prompts = random_prompts(20, 7, 7, 9, 12)
    completions = sampler.sample(prompts, VARIED, n=4)
    lengths = [len(c.ids) for group in completions for c in group]
    assert len(set(lengths)) > 3
    tokens_fed = sum(lengths) - len(lengths)  # the last token of a row is never fed back
    assert sum(counts) == 55 + tokens_fed
    assert {c.finish_reason for group in completions for c in group} == {"stop", "length"}
    assert all((c.finish_reason == "stop") == (c.ids[-1] < 10) for group in completions for c in group)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_the_company_does_not_matter(name):
    model = build(name)
    prompts = random_prompts(20, 7, 7, 1, 12, 40)
    expected = ids_of(LocalSampler(model).sample(prompts, VARIED, n=3))
    for max_rows, max_prefill_tokens in ((1, 8), (4, 1), (7, 30)):
        sampler = LocalSampler(model, max_rows=max_rows, max_prefill_tokens=max_prefill_tokens)
        assert ids_of(sampler.sample(prompts, VARIED, n=3)) == expected
    order = random.Random(0).sample(range(6), 6)
    shuffled = ids_of(LocalSampler(model).sample([prompts[i] for i in order], VARIED, n=3))
    assert shuffled == [expected[i] for i in order]
    assert ids_of(LocalSampler(model).sample(prompts[2:3], VARIED, n=3)) == expected[2:3]


def test_copies_of_a_prompt_differ_however_they_are_asked_for():
    model = build("llama")
    prompt = random_prompts(5)[0]
    together = LocalSampler(model).sample([prompt], VARIED, n=4)
    apart = LocalSampler(model).sample([prompt] * 4, VARIED)
    assert ids_of(together)[0] == [group[0] for group in ids_of(apart)]
    assert len({tuple(ids) for ids in ids_of(together)[0]}) == 4


def test_seeds():
    model = build("llama")
    sampler = LocalSampler(model)
    prompts = random_prompts(5, 5)
    assert ids_of(sampler.sample(prompts, VARIED)) == ids_of(sampler.sample(prompts, VARIED))
    per_prompt = SamplingParams(max_new_tokens=24, seed=(4, 9), stop_token_ids=VARIED.stop_token_ids)
    first, second = ids_of(sampler.sample(prompts, per_prompt))
    assert first == ids_of(sampler.sample(prompts, VARIED))[0]
    assert second != ids_of(sampler.sample(prompts, VARIED))[1]
    free = SamplingParams(max_new_tokens=24)
    torch.manual_seed(1)
    one, other = ids_of(sampler.sample(prompts, free)), ids_of(sampler.sample(prompts, free))
    torch.manual_seed(1)
    assert one == ids_of(sampler.sample(prompts, free))
    assert one != other


def test_uniform_numbers_are_uniform_and_unrelated():
    drawn = torch.from_numpy(uniforms([i // 100 for i in range(20000)], [i % 100 for i in range(20000)]))
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = torch.histc(drawn.float(), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 50  # chi-square, 19 degrees of freedom
    table = drawn.view(200, 100)
    assert abs(float(torch.corrcoef(torch.stack([table[:, :-1].flatten(), table[:, 1:].flatten()]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([table[:-1].flatten(), table[1:].flatten()]))[0, 1])) < 0.03


@pytest.mark.parametrize("engine", [LocalSampler, TransformersSampler])
def test_end_tokens(engine):
    model = build("llama")
    prompt = random_prompts(5)[0]
    sampler = engine(model)
    endless = sampler.sample([prompt], SamplingParams(max_new_tokens=10, temperature=0, stop_token_ids=()))[0][0]
    end = endless.ids[3]
    cut = sampler.sample([prompt], SamplingParams(max_new_tokens=10, temperature=0, stop_token_ids=(end,)))[0][0]
    assert cut.ids == endless.ids[: endless.ids.index(end) + 1]
    assert (cut.finish_reason, endless.finish_reason) == ("stop", "length")
    model.generation_config.eos_token_id = [end, 66]
    own = engine(model).sample([prompt], SamplingParams(max_new_tokens=10, temperature=0))[0][0]
    assert own.ids == cut.ids


@pytest.mark.parametrize("engine", [LocalSampler, TransformersSampler])
def test_stop_strings_are_searched_in_generated_text_only(engine, tiny_tokenizer):
    model = build("llama", vocab_size=100)
    sampler = engine(model, tiny_tokenizer)
    plain = SamplingParams(max_new_tokens=12, seed=3, stop_token_ids=())
    words = {tuple(p): sampler.sample([p], plain)[0][0].ids for p in random_prompts(6, 5, 4)}
    for prompt, ids in words.items():
        texts = tiny_tokenizer.batch_decode([[token] for token in ids])
        stop = " ".join(texts[3:5])
        params = SamplingParams(max_new_tokens=12, seed=3, stop_token_ids=(), stop_strings=("nowhere", stop))
        first = next(k for k in range(1, 13) if stop in tiny_tokenizer.decode(ids[:k]))
        said = tiny_tokenizer(f"{stop} yes")["input_ids"]
        found = sampler.sample([list(prompt)], params)[0][0]
        assert found.ids == ids[:first]
        assert found.finish_reason == "stop"
        assert len(sampler.sample([said], params)[0][0].ids) > 0  # its prompt holds the stop string: no reason to stop
    late = SamplingParams(max_new_tokens=12, min_new_tokens=9, seed=3, stop_token_ids=(), stop_strings=(stop,))
    assert len(sampler.sample([list(prompt)], late)[0][0].ids) >= 9


def test_stop_strings_across_byte_tokens(chat_tokenizer):
    """A stop string of many byte tokens, some of them parts of one character."""
    from trl.generation.stopping import StopStrings

    ids = chat_tokenizer("one two — drei", add_special_tokens=False)["input_ids"]
    search = StopStrings(("two — d",), chat_tokenizer)
    found = [search.found([ids[:k]])[0] for k in range(1, len(ids) + 1)]
    assert found.index(True) == len(ids) - 4
    long = chat_tokenizer("x" * 500 + "stop", add_special_tokens=False)["input_ids"]
    assert StopStrings(("xstop",), chat_tokenizer).found([long, long[:-1]]) == [True, False]


def test_state_of_the_model_comes_back():
    model = build("llama", attention_dropout=0.5)
    model.activation_checkpointing_enable()
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    prompt = random_prompts(6)[0]
    completion = LocalSampler(model).sample([prompt], VARIED)[0][0]
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == implementation != NAME
    model.eval()
    expected = raw_logprobs(model, prompt, completion.ids)
    torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, rtol=0, atol=1e-5)
    assert torch.is_grad_enabled()


def test_state_comes_back_after_an_error():
    model = build("llama").train()
    sampler = LocalSampler(model)
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        sampler.sample(random_prompts(4), VARIED)
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation != NAME


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_models_sample_with_their_adapter(name):
    import peft

    model = peft.get_peft_model(build(name), lora(name))
    prompt = random_prompts(6)[0]
    params = SamplingParams(max_new_tokens=10, seed=2, stop_token_ids=())
    completion = LocalSampler(model).sample([prompt], params)[0][0]
    expected = raw_logprobs(model, prompt, completion.ids)
    torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        other = LocalSampler(model).sample([prompt], params)[0][0]
        expected = raw_logprobs(model, prompt, other.ids)
    torch.testing.assert_close(torch.tensor(other.raw_logprobs), expected, rtol=0, atol=1e-5)
    assert other.raw_logprobs != completion.raw_logprobs


def test_value_head_wrappers_sample_as_what_they_wrap():
    inner = build("llama")
    wrapped = AutoModelForCausalLMWithValueHead(inner)
    prompts = random_prompts(6, 3)
    expected = ids_of(LocalSampler(inner).sample(prompts, VARIED, n=2))
    assert ids_of(LocalSampler(wrapped).sample(prompts, VARIED, n=2)) == expected
    assert ids_of(TransformersSampler(wrapped).sample(prompts, VARIED, n=2)) == expected


def test_prompts_of_very_different_lengths():
    """Several blocks of the cache, rows of some of which finish before others start."""
    model = build("qwen2", max_position_embeddings=1024)
    prompts = random_prompts(300, 2, 70, 130, 1, 64, 65, 20)
    wide = LocalSampler(model).sample(prompts, VARIED, n=2)
    narrow = LocalSampler(model, max_rows=3).sample(prompts, VARIED, n=2)
    assert ids_of(wide) == ids_of(narrow)
    for prompt, group in zip(prompts, wide, strict=True):
        for completion in group:
            expected = raw_logprobs(model, prompt, completion.ids)
            torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_head_is_packed_and_put_back(bias):
    model = build("llama", vocab_size=2**15)
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(2**15))
    prompt = random_prompts(6)[0]
    params = SamplingParams(max_new_tokens=10, seed=2, stop_token_ids=())
    with packed_weights(model):
        assert "forward" in vars(model.lm_head)
    completions = LocalSampler(model).sample([prompt], params, n=3)[0]
    assert "forward" not in vars(model.lm_head)
    for completion in completions:
        expected = raw_logprobs(model, prompt, completion.ids)
        torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, rtol=0, atol=1e-5)
    model.lm_head.weight.data.mul_(0.5)  # an optimizer's step
    after = LocalSampler(model).sample([prompt], params)[0][0]
    expected = raw_logprobs(model, prompt, after.ids)
    torch.testing.assert_close(torch.tensor(after.raw_logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_adapters_with_virtual_tokens_take_the_fallback(kind):
    import peft

    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build("llama"), config)
    model.prompt_encoder.default.embedding.weight.data.normal_()
    with pytest.raises(NotLocal, match="virtual tokens"):
        LocalSampler(model)
    prompt = random_prompts(6)[0]
    params = SamplingParams(max_new_tokens=5, seed=2, stop_token_ids=())
    completion = TransformersSampler(model).sample([prompt], params)[0][0]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, -6:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None]).squeeze(1)
    torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, rtol=0, atol=1e-5)


def test_a_model_that_scores_packed_rows_samples_too():
    from trl.models.attention import enable_tree_attention

    model = build("llama")
    prompts = random_prompts(6, 3)
    expected = ids_of(LocalSampler(model).sample(prompts, VARIED))
    enable_tree_attention(model)
    before = model.config._attn_implementation
    assert ids_of(LocalSampler(model).sample(prompts, VARIED)) == expected
    assert model.config._attn_implementation == before


def test_a_forward_under_autocast():
    model = build("llama")
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    prompt = random_prompts(6)[0]
    completion = LocalSampler(model).sample([prompt], SamplingParams(max_new_tokens=12, seed=1, stop_token_ids=()))[0][
        0
    ]
    expected = raw_logprobs(model, prompt, completion.ids)
    torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, rtol=0, atol=0.05)
