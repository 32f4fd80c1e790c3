"""Prompts with pictures in the samplers: the engine's numbers are those of the model's own call of each row alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from fake_vllm import FakeVLLM
from families import FAMILIES, data_url, model_of, picture, processor_of
from PIL import Image
from tokenizers_for_tests import word_tokenizer
from torch import Tensor

from trl import AutoModelForCausalLMWithValueHead
from trl.core import LengthSampler
from trl.data.pictures import Album, PictureReader, read_by, reader_of
from trl.extras import BestOfNSampler
from trl.generation.engine import lay_out
from trl.generation.kv_cache import Prompt
from trl.generation.local import LocalSampler, make_sampler
from trl.generation.plain_generate import generate_padded
from trl.generation.probe import BOTH_WAYS, CAUSAL, how_it_reads_pictures
from trl.generation.sampler import SamplingParams
from trl.generation.transformers_sampler import TransformersSampler
from trl.generation.vllm.client import ServerEngine
from trl.generation.vllm.colocate import ColocatedEngine
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.pictures import folded
from trl.generation.vllm.sampler import VLLMSampler
from trl.generation.vllm.verify import Verification
from trl.models.forward import note, plan_of
from trl.models.pictures import introduce
from trl.models.pictures import keywords as keywords_of
from trl.rollout.prompts import decoded, prompt_ids, with_opened_pictures, with_prompts
from trl.rollout.reward_check import trivial_answers
from trl.rollout.source import FunctionSource

WORDS = list(range(40, 80))
"""a start that is long enough to be read once for all prompts that have it"""


def kept(seed: int, size: tuple[int, int] = (16, 16)) -> int:
    """The number of a picture in the album."""
    file = BytesIO()
    picture(seed, size).save(file, "PNG")
    return Album.keep(file.getvalue())


def ready(name: str) -> tuple[Any, Any, PictureReader]:
    model, tokenizer = model_of(name), read_by(processor_of(name))
    reader = reader_of(tokenizer)
    assert reader is not None
    introduce(model, reader)
    return model, tokenizer, reader


def prompts_of(reader: PictureReader) -> list[list[int]]:
    """With a picture; the same words with another; the first one's start and a second picture; words alone."""
    one, other = reader.ids_of(kept(1)), reader.ids_of(kept(2, (32, 16)))
    start = [*WORDS, *one, 81, 82]
    return [[*start, 83], [*WORDS, *other, 81, 82, 83], [*start, 84, *other, 85], [*WORDS, 86]]


def own_logits(model: Any, ids: Sequence[int]) -> Tensor:
    """Of the model's own call of this row alone. [L, V]"""
    ids_1L = torch.tensor([ids])
    given: dict[str, Any] = {}
    if min(ids) < 0:
        given = keywords_of(model, ids_1L, repeated=True)
        ids_1L = torch.where(ids_1L < 0, model.config.image_token_id, ids_1L)
    with torch.no_grad():
        return model(input_ids=ids_1L, use_cache=False, **given).logits[0].float()


def assert_own(model: Any, prompts: Sequence[Sequence[int]], groups: Any, atol: float = 1e-5) -> None:
    """The log-probabilities of what was sampled are those of the model's own call of each row alone."""
    for prompt, group in zip(prompts, groups, strict=True):
        for one in group:
            logits_TV = own_logits(model, [*prompt, *one.ids])[len(prompt) - 1 : -1]
            expected = logits_TV.log_softmax(-1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.raw_logprobs), expected, atol=atol, rtol=0)


@contextmanager
def watched(model: Any) -> Iterator[list[int]]:
    """How much of pictures the vision tower is given in each of its calls."""
    seen: list[int] = []

    def note_call(module: Any, args: Any, kwargs: Any) -> None:
        values = next(iter([*args, *kwargs.values()]))
        seen.append(len(values))

    hook = model.get_encoder(modality="image").register_forward_pre_hook(note_call, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_samplers_compute_what_the_model_computes_of_each_row_alone(name: str) -> None:
    model, tokenizer, reader = ready(name)
    prompts = prompts_of(reader)
    params = SamplingParams(max_new_tokens=4, stop_token_ids=(), seed=3)
    sampler = make_sampler(model, tokenizer)
    assert type(sampler) is LocalSampler
    assert how_it_reads_pictures(model) == (BOTH_WAYS if name == "gemma3" else CAUSAL)
    assert_own(model, prompts, sampler.sample(prompts, params, n=2))
    assert_own(model, prompts, TransformersSampler(model, tokenizer).sample(prompts, params, n=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_most_probable_word_is_taken_at_temperature_0(name: str) -> None:
    """Of both samplers: the word taken is the best one of the model's own call, or as good but for rounding."""
    model, tokenizer, reader = ready(name)
    prompts = prompts_of(reader)
    params = SamplingParams(max_new_tokens=3, temperature=0.0, stop_token_ids=())
    for sampler in (LocalSampler(model, tokenizer), TransformersSampler(model, tokenizer)):
        for prompt, (one,) in zip(prompts, sampler.sample(prompts, params), strict=True):
            logits_TV = own_logits(model, [*prompt, *one.ids])[len(prompt) - 1 : -1]
            logits_TV[:, reader.image_token_id] = -torch.inf
            taken_T = logits_TV.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            assert float((logits_TV.amax(1) - taken_T).max()) < 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm", "llava"])
def test_a_picture_is_encoded_once_for_all_completions_and_all_prompts_that_have_it(name: str) -> None:
    model, tokenizer, reader = ready(name)
    first, _, both, words = prompts_of(reader)
    again = [*first[:-1], 87]
    sampler = LocalSampler(model, tokenizer)
    how_it_reads_pictures(model)
    params = SamplingParams(max_new_tokens=2, stop_token_ids=(), seed=1)
    with watched(model) as alone:
        own_logits(model, first)
    with watched(model) as seen:
        groups = sampler.sample([first, again, words], params, n=8)
    assert seen == alone
    assert [len(group) for group in groups] == [8, 8, 8]
    with watched(model) as pair:
        own_logits(model, both)
    with watched(model) as seen:
        sampler.sample([first, both, again], params, n=2)
    assert sum(seen) == sum(pair)
    with watched(model) as seen:  # two passes: the prompts are longer than one takes
        LocalSampler(model, tokenizer, max_prefill_tokens=len(first)).sample([first, again], params, n=2)
    assert seen == alone * 2
    with watched(model) as seen:
        sampler.sample([words], params, n=2)
    assert seen == []


def test_a_shared_start_ends_before_a_picture_or_behind_it() -> None:
    one, other = [-5] * 6, [-6] * 6
    alike = [[*WORDS, *one, *one], [*WORDS, *one, *other, 3], [*WORDS, *one]]
    prompts = [Prompt(ids) for ids in alike]
    laid_out = lay_out(prompts, {})
    assert [(piece.stem.end - piece.stem.start if piece.stem else 0) for piece in laid_out.own] == [len(WORDS)] * 3
    assert len(laid_out.ids) == len(WORDS) + sum(len(ids) - len(WORDS) for ids in alike)
    behind = [Prompt([*WORDS, *one, 7, word]) for word in (8, 9)]
    assert {piece.stem.end for piece in lay_out(behind, {}).own if piece.stem} == {len(WORDS) + 7}


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "filters", [{}, {"temperature": 0.0}, {"temperature": 0.7}, {"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}]
)
def test_the_token_of_a_picture_is_never_sampled(filters: dict[str, Any], captured: bool) -> None:
    """Even where it is the most probable one. What is said of others is the model's own log-probability."""
    model, tokenizer, reader = ready("llava")
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(9.0 * torch.eye(head.out_features)[reader.image_token_id])
    prompts = [WORDS[:9]] if captured else prompts_of(reader)
    params = SamplingParams(max_new_tokens=4, stop_token_ids=(), seed=2, **filters)
    groups = LocalSampler(model, tokenizer, captured=captured).sample(prompts, params, n=2)
    assert all(reader.image_token_id not in one.ids for group in groups for one in group)
    assert_own(model, prompts, groups)
    if not filters:  # as training scores it, with all words
        assert all(one.logprobs == one.raw_logprobs for group in groups for one in group)


def test_a_token_of_no_known_picture_is_refused() -> None:
    """As a processor writes it: the model would be shown nothing there."""
    model, tokenizer, reader = ready("llava")
    prompts = [WORDS[:4], reader.plain(prompts_of(reader)[0])]
    params = SamplingParams(max_new_tokens=1)
    for sampler in (LocalSampler(model, tokenizer), TransformersSampler(model, tokenizer)):
        with pytest.raises(ValueError, match=r"prompts\[1\] has the token \d+, which stands for a part of a picture"):
            sampler.sample(prompts, params)


def test_a_repetition_penalty_knows_words_and_no_pictures() -> None:
    model, tokenizer, reader = ready("qwen2_5_vl")
    prompts = prompts_of(reader)[:2]
    params = SamplingParams(max_new_tokens=3, stop_token_ids=(), seed=2, repetition_penalty=1.5)
    for sampler in (LocalSampler(model, tokenizer), TransformersSampler(model, tokenizer)):
        groups = sampler.sample(prompts, params)
        assert_own(model, prompts, groups)
        for prompt, (one,) in zip(prompts, groups, strict=True):
            logits_V = own_logits(model, [*prompt, *one.ids])[len(prompt) - 1]
            seen = torch.tensor([word for word in set(prompt) if word >= 0])
            logits_V[seen] = torch.where(logits_V[seen] < 0, logits_V[seen] * 1.5, logits_V[seen] / 1.5)
            assert one.logprobs[0] == pytest.approx(float(logits_V.log_softmax(-1)[one.ids[0]]), abs=1e-5)


@pytest.mark.parametrize("seed", [7, None, (1, 2, 3, 4)])
def test_where_the_engine_does_not_read_pictures_generate_samples_these_prompts(
    seed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer, reader = ready("llava")
    prompts = prompts_of(reader)
    params = SamplingParams(max_new_tokens=3, stop_token_ids=(), seed=seed)
    torch.manual_seed(0)
    expected = LocalSampler(model, tokenizer).sample(prompts, params, n=2)
    note(model, replace(plan_of(model), reads_pictures=""))
    torch.manual_seed(0)
    with watched(model) as seen:
        apart = LocalSampler(model, tokenizer).sample(prompts, params, n=2)
    assert sum(seen) == 8  # each completion has its own: 2, 2 and 4
    assert_own(model, prompts, apart)
    assert [one.ids for one in apart[3]] == [one.ids for one in expected[3]]
    assert [[len(one.ids) for one in group] for group in apart] == [[3, 3]] * 4


def test_a_model_that_reads_pictures_otherwise_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """A picture that sees the words behind it: neither way of the engine is the model's, which is said once."""
    model, tokenizer, reader = ready("llava")
    text = model.model.language_model
    own = text.forward

    def looks_ahead(*args: Any, **kwargs: Any) -> Any:
        embeds = kwargs["inputs_embeds"]
        return own(*args, **{**kwargs, "inputs_embeds": embeds + embeds.mean(1, keepdim=True)})

    sampler = LocalSampler(model, tokenizer)
    text.forward = looks_ahead
    with caplog.at_level("WARNING"):
        assert how_it_reads_pictures(model) == how_it_reads_pictures(model) == ""
    (said,) = [record.getMessage() for record in caplog.records if "read pictures" in record.getMessage()]
    assert said.startswith("LlavaForConditionalGeneration: the local engine does not read pictures as the model does")
    assert "standard deviations" in said
    del text.forward
    assert len(sampler.sample(prompts_of(reader)[:1], SamplingParams(max_new_tokens=1))[0][0].ids) == 1


def test_on_a_gpu_prompts_with_pictures_are_sampled_step_by_step(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer, reader = ready("qwen3_vl")
    prompts = prompts_of(reader)
    params = SamplingParams(max_new_tokens=3, stop_token_ids=(), seed=3)
    sampler = LocalSampler(model, tokenizer, captured=True)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            groups = sampler.sample(prompts, params)
    assert [record.getMessage() for record in caplog.records if "pictures" in record.getMessage()] == [
        "prompts with pictures are sampled step by step, without graphs: same results, slower"
    ]
    assert_own(model, prompts, groups)


def test_an_adapter_is_part_of_what_samples() -> None:
    from peft import LoraConfig, get_peft_model

    model, tokenizer, reader = ready("qwen2_5_vl")
    network = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False))
    prompts = prompts_of(reader)
    params = SamplingParams(max_new_tokens=3, stop_token_ids=(), seed=3)
    assert_own(model, prompts, LocalSampler(network, tokenizer).sample(prompts, params))


# --- vLLM -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_server_is_given_a_placeholder_and_the_picture(name: str) -> None:
    """Its completions are the policy's, as the check of its weights finds too."""
    model, tokenizer, reader = ready(name)
    prompts = prompts_of(reader)
    with FakeVLLM(model, tokenizer) as server:
        engine = ServerEngine(server.url, wait=0.5, timeout=20.0)
        sampler = VLLMSampler(engine, None, tokenizer, model=model)
        groups = sampler.sample(prompts, SamplingParams(max_new_tokens=3, stop_token_ids=(), seed=3), n=2)
        asked = [body for path, body in server.calls if path.startswith("/inference")]
        verify = Verification.of(model, sampler.vocabulary, reader=reader)
        verify.saw(prompts)
        verify(engine, "default", None)
        engine.close()
    assert verify.last is not None
    assert verify.last.tokens > 8
    assert verify.last.largest < 1e-4
    assert sorted(len(body.get("content_parts", ())) for body in asked) == [0, 1, 1, 2]
    assert all(min(body["token_ids"]) >= 0 for body in asked)
    assert sum(reader.image_token_id in body["token_ids"] for body in asked) in (0, 3)  # Gemma has another placeholder
    for prompt, group in zip(prompts, groups, strict=True):
        logits = [own_logits(model, [*prompt, *one.ids])[len(prompt) - 1 : -1].log_softmax(-1) for one in group]
        for one, logprobs_TV in zip(group, logits, strict=True):
            expected = logprobs_TV.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(one.logprobs), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("text", ["a\n{}\nb", "{}{} b", "\n\n{}\n", "x {} y {}"])
def test_the_placeholder_of_a_picture_is_found_again(name: str, text: str) -> None:
    """Whatever stands beside it: Gemma's blanks become one token with those around them."""
    _, tokenizer, reader = ready(name)
    numbers = [kept(7), kept(8, (32, 16))][: text.count("{}")]
    written = text.format(*[reader.placeholder] * len(numbers))
    whole = tokenizer(reader.expand(written, (), numbers).text, add_special_tokens=False)["input_ids"]
    found = folded(reader.tokens(whole, numbers), numbers, reader)
    assert tokenizer.decode(found) == tokenizer.decode(tokenizer(written, add_special_tokens=False)["input_ids"])


def test_an_engine_that_reads_a_picture_otherwise_is_found_out() -> None:
    model, tokenizer, reader = ready("qwen2_5_vl")
    prompts = prompts_of(reader)[:1]
    other = processor_of("qwen2_5_vl")
    other.image_processor.size = {"shortest_edge": 24 * 24, "longest_edge": 64 * 64}
    params = SamplingParams(max_new_tokens=1, stop_token_ids=(), seed=3)
    with FakeVLLM(model, read_by(other)) as server:
        engine = ServerEngine(server.url, wait=0.5, timeout=20.0)
        sampler = VLLMSampler(engine, None, tokenizer, model=model)
        with pytest.raises(
            EngineError, match=r"reads a prompt with 1 pictures as 52 tokens which are not the policy's"
        ):
            sampler.sample(prompts, params)
        server.says_prompt = False
        with pytest.raises(EngineError, match=r"does not say how it has read the pictures .*: take release 0.32"):
            sampler.sample(prompts, params)
        server.tokenizer = word_tokenizer()
        with pytest.raises(EngineError, match="is not a multimodal model"):
            sampler.sample(prompts, params)
        unaware = VLLMSampler(engine, None, word_tokenizer())
        with pytest.raises(ValueError, match="a prompt has pictures, and the sampler does not know what reads them"):
            unaware.sample(prompts, params)
        engine.close()


def test_an_engine_in_this_process_is_given_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, reader = ready("smolvlm")
    seen: list[dict[str, Any]] = []

    class Offline:
        def __init__(self, extra: int = 0) -> None:
            self.extra = extra
            self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(model="folder", max_model_len=512))

        def generate(self, rows: Any, params: Any, use_tqdm: bool, lora_request: Any) -> list[Any]:
            seen.extend(rows)
            shown = [row.get("multi_modal_data", {}).get("image", []) for row in rows]
            whole = [prompt for prompt in prompts if (min(prompt) < 0) == bool(shown[0])][: len(rows)]
            one = SimpleNamespace(
                token_ids=[40], logprobs=[{40: SimpleNamespace(logprob=-1.0)}], finish_reason="length",
                weight_versions=None, sampling_mask=None, routed_experts=None,
            )  # fmt: skip
            said = [[*reader.plain(prompt), *[5] * self.extra] for prompt in whole]
            return [SimpleNamespace(outputs=[one], prompt_token_ids=ids) for ids in said]

    vllm = ModuleType("vllm")
    vllm.__version__, vllm.SamplingParams = "0.32.0", lambda **asked: asked  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr("trl.generation.vllm.colocate.is_vllm_available", lambda: True)
    prompts = prompts_of(reader)[:3]
    params = SamplingParams(max_new_tokens=1, stop_token_ids=(), seed=3)
    sampler = VLLMSampler(ColocatedEngine(Offline()), None, tokenizer, model=model)
    assert [group[0].ids for group in sampler.sample(prompts, params)] == [[40]] * 3
    assert [len(row["multi_modal_data"]["image"]) for row in seen] == [1, 1, 2]
    assert seen[0]["multi_modal_data"]["image"][0].tobytes() == picture(1).tobytes()
    assert seen[0]["multi_modal_uuids"] == {"image": [str(kept(1))]}
    assert [row["prompt_token_ids"].count(reader.image_token_id) for row in seen] == [1, 1, 2]
    sampler = VLLMSampler(ColocatedEngine(Offline(extra=1)), None, tokenizer, model=model)
    with pytest.raises(EngineError, match="which are not the policy's"):
        sampler.sample(prompts, params)


# --- other ways to sample, and what is read of prompts ---------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_by_its_own_keywords(name: str) -> None:
    """What only `generate` knows; several answers to rows with several pictures are each shown their own."""
    model, tokenizer, reader = ready(name)
    prompts = prompts_of(reader)
    queries = [torch.tensor(prompt) for prompt in prompts]
    given = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    answers = generate_padded(model, tokenizer, queries, {**given, "num_return_sequences": 1})
    again = generate_padded(model, tokenizer, queries, {**given, "num_return_sequences": 2, "do_sample": True,
                                                        "top_k": 1}, several=True)  # fmt: skip
    assert [ids.tolist() for ids in again[::2]] == [ids.tolist() for ids in answers]
    for prompt, answer in zip(prompts, answers, strict=True):
        logits_TV = own_logits(model, [*prompt, *answer.tolist()])[len(prompt) - 1 : -1]
        logits_TV[:, reader.image_token_id] = -torch.inf
        taken_T = logits_TV.gather(1, answer[:, None])[:, 0]
        assert float((logits_TV.amax(1) - taken_T).max()) < 1e-4
    with pytest.raises(ValueError, match="num_beams: prompts with pictures are sampled without beams"):
        generate_padded(model, tokenizer, queries, {**given, "num_beams": 2})


def as_file(seed: int) -> bytes:
    file = BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_tokenised_with_their_pictures(name: str) -> None:
    """As PPO and loops of one's own do: by parts, by a column, and in texts; and read again as text."""
    _, tokenizer, reader = ready(name)
    said = [{"type": "text", "text": "What is it?"}]
    by_part = {"prompt": [{"role": "user", "content": [{"type": "image", "image": picture(1)}, *said]}]}
    by_url = {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(1)}}, *said]}]}
    by_column = {"prompt": [{"role": "user", "content": said}], "images": [{"bytes": as_file(1), "path": None}]}
    ids = prompt_ids(by_url, tokenizer).tolist()
    assert reader.occurrences(ids) == [kept(1)]
    assert prompt_ids(by_column, tokenizer).tolist() == ids
    written = prompt_ids(by_part, tokenizer).tolist()  # as a file of its own
    assert [token if token >= 0 else -1 for token in written] == [token if token >= 0 else -1 for token in ids]
    (number,) = reader.occurrences(written)
    assert Album.open(number).tobytes() == picture(1).tobytes()
    text = {"prompt": f"{reader.placeholder} and {reader.placeholder}", "images": [picture(1), as_file(2)]}
    assert reader.occurrences(prompt_ids(text, tokenizer).tolist()) == [number, kept(2)]
    (row,) = with_prompts([{"input_ids": ids}], tokenizer)
    assert row["prompt_ids"] == ids
    assert "What is it?" in row["prompt"]
    shown = decoded(tokenizer, ids)
    assert "What is it?" in shown
    assert shown.count(tokenizer.decode([reader.image_token_id])) <= 5  # a token for each tile
    with pytest.raises(ValueError, match="ids are 0 or more"):
        prompt_ids({"input_ids": ids}, word_tokenizer())


def url(seed: int) -> str:
    return data_url(picture(seed))


@pytest.mark.parametrize(
    "values",
    [
        [picture(1), picture(2)],
        [[picture(1)], [picture(2), picture(1)]],
        [{"bytes": as_file(1), "path": None}, None],
        [[{"bytes": as_file(1), "path": None}], []],
        [as_file(1), [url(2)]],
    ],
)
@pytest.mark.parametrize("column", ["image", "images"])
def test_rewards_are_given_pil_pictures(values: list[Any], column: str) -> None:
    _, tokenizer, _ = ready("llava")
    twice = [value for value in values for _ in range(2)]
    given = {column: twice, "other": [0] * 4}
    made = with_opened_pictures(given, tokenizer)
    assert made["other"] is given["other"]
    assert len(made[column]) == 4
    assert made[column][0] is made[column][1]
    flat = [each for value in made[column] for each in (value if isinstance(value, list) else [value])]
    assert all(each is None or isinstance(each, Image.Image) for each in flat)
    assert flat[0].tobytes() == picture(1).tobytes()
    assert [isinstance(value, list) for value in made[column]] == [isinstance(value, list) for value in twice]
    assert with_opened_pictures(given, word_tokenizer()) is given


def test_a_function_of_the_user_gives_prompts_as_the_processor_writes_them() -> None:
    """Its placeholders are the row's pictures; others are refused, and so are tokens of pictures in completions."""
    _, _, reader = ready("qwen2_5_vl")
    prompts = prompts_of(reader)[:2]
    rows = [{"prompt_ids": ids} for ids in prompts]

    def drawn(given: list[list[int]], completions: list[list[int]]) -> Any:
        made = {"prompt_ids": given, "completion_ids": completions}
        return FunctionSource(lambda asked: made, None, 300, reader).draw(rows)

    answers = [[40], [41]]
    for given in ([reader.plain(ids) for ids in prompts], prompts):
        assert drawn(given, answers).prompts == prompts
    with pytest.raises(ValueError, match=r"prompt_ids\[0\] does not show the 1 pictures of its row .* give the"):
        drawn([[*reader.plain(prompts[0]), reader.image_token_id], prompts[1]], answers)
    with pytest.raises(ValueError, match=r"completion_ids\[1\] has the token \d+, which stands for a part"):
        drawn(prompts, [[40], [reader.image_token_id]])
    with pytest.raises(ValueError, match=r"prompt_ids\[0\] has the token -9, and the policy knows 0 to 299"):
        drawn([[5, -9], prompts[1]], answers)


def test_a_trivial_answer_echoes_the_words_of_a_prompt_in_parts() -> None:
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What is it?"}]
    assert trivial_answers([{"role": "user", "content": content}], 8)["echoed prompt"] == "What is it?"


def test_best_of_n_reads_pictures() -> None:
    model, tokenizer, reader = ready("llava")
    seen: list[str] = []

    def scores(texts: list[str]) -> list[float]:
        seen.extend(texts)
        return [float(len(text)) for text in texts]

    wrapped = AutoModelForCausalLMWithValueHead.from_pretrained(model)
    sampler = BestOfNSampler(wrapped, tokenizer, scores, LengthSampler(2, 3), sample_size=2)
    (best,) = sampler.generate(prompts_of(reader)[0], skip_special_tokens=False)
    assert best == [max(seen, key=len)]
    assert all(text.count("<image>") == 1 for text in seen)
