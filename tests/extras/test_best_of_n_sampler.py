import pytest
import torch
from tokenizers_for_tests import byte_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, BestOfNSampler
from trl.core import LengthSampler
from trl.extras.best_of_n_sampler import Candidate, best_of_n_kl_bound

SAMPLED = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 0}
ONLY_GENERATE = {"renormalize_logits": True}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer(eos="<|endoftext|>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(1)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0, **size)
    return AutoModelForCausalLMWithValueHead.from_pretrained(LlamaForCausalLM(config).eval())


class Scores:
    """Scores texts by their length; keeps what it was shown."""

    def __init__(self) -> None:
        self.shown: list[list[str]] = []

    def __call__(self, texts: list[str]) -> list[float]:
        self.shown.append(texts)
        return [len(set(text)) for text in texts]


@pytest.fixture
def make(model, tokenizer):
    def make_sampler(scores=None, length=lambda: 8, **settings):
        return BestOfNSampler(model, tokenizer, scores or Scores(), length, **settings)

    return make_sampler


INPUTS = {
    "ids": ([30, 31, 32], 1),
    "1-d": (torch.tensor([30, 31, 32]), 1),
    "2-d": (torch.tensor([[30, 31], [33, 34]]), 2),
    "tensors": ([torch.tensor([30, 31, 32]), torch.tensor([33, 34])], 2),
    "lists": ([[30, 31, 32], [33, 34]], 2),
    "none": ([], 0),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("further", [{}, ONLY_GENERATE])
@pytest.mark.parametrize("n_candidates", [1, 3])
def test_every_kind_of_query(make, tokenizer, kind, further, n_candidates):
    queries, count = INPUTS[kind]
    scores = Scores()
    best = make(scores, n_candidates=n_candidates).generate(queries, **SAMPLED, **further)
    assert [len(of_query) for of_query in best] == [n_candidates] * count
    assert [len(shown) for shown in scores.shown] == [4] * count
    for of_query, shown in zip(best, scores.shown, strict=True):
        values = sorted((len(set(text)) for text in shown), reverse=True)
        assert [len(set(text)) for text in of_query] == values[:n_candidates]
        assert set(of_query) <= set(shown)
    if count == 2 and kind != "2-d":
        assert best[0][0].startswith(tokenizer.decode([30, 31, 32]))
        assert best[1][0].startswith(tokenizer.decode([33, 34]))


def test_several_beams_of_each_sample_are_candidates(make):
    scores = Scores()
    make(scores, sample_size=1).generate([30, 31], num_beams=3, num_return_sequences=3)
    assert len(set(scores.shown[0])) == 3


@pytest.mark.parametrize("further", [{}, ONLY_GENERATE])
def test_a_sample_of_one_is_a_whole_text(make, tokenizer, further):
    ((text,),) = make(sample_size=1).generate([40, 41], skip_special_tokens=False, **SAMPLED, **further)
    assert text.startswith(tokenizer.decode([40, 41]))
    assert len(tokenizer(text).input_ids) > 3


def test_best_first_with_scores_in_order(make):
    fixed = iter([[0.1, 3.0, 2.0, 2.0], [4, 5, 6, 7]])
    shown = []
    sampler = make(lambda texts: shown.append(texts) or next(fixed), n_candidates=3)
    first, second = sampler.candidates([[30, 31], [32]], **SAMPLED)
    assert first == [Candidate(shown[0][i], score) for i, score in ((1, 3.0), (2, 2.0), (3, 2.0))]
    assert [candidate.score for candidate in second] == [7, 6, 5]


def test_the_seed_repeats_it(make):
    length = LengthSampler(2, 20)
    runs = [make(length=length, seed=5).generate([[30, 31], [32]], **SAMPLED) for _ in range(2)]
    assert runs[0] == runs[1]
    assert make(length=length, seed=6).generate([[30, 31], [32]], **SAMPLED) != runs[0]


@pytest.mark.parametrize("further", [{}, ONLY_GENERATE])
def test_every_query_has_its_own_length(make, tokenizer, further):
    lengths, scores = iter([2, 9]), Scores()
    make(scores, length=lambda: next(lengths)).generate(
        [[40], [40]], skip_special_tokens=False, eos_token_id=-1, **SAMPLED, **further
    )
    tokens = [[len(tokenizer(text).input_ids) for text in shown] for shown in scores.shown]
    # A byte that is no text decodes to a mark of three bytes.
    assert all(3 <= count <= 1 + 3 * 2 for count in tokens[0])
    assert all(count >= 10 for count in tokens[1])


def test_the_generation_config_applies(make, caplog):
    config = GenerationConfig(do_sample=False, eos_token_id=9)
    scores = Scores()
    make(scores, generation_config=config).generate([30, 31])
    assert len(set(scores.shown[0])) == 1
    assert "all samples of a query are the same" in caplog.text
    make(scores, generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=9)).generate([30, 31])
    assert len(set(scores.shown[1])) > 1


def test_encoder_decoders():
    tokenizer = byte_tokenizer(eos="</s>")
    size = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, eos_token_id=4, pad_token_id=0, **size)
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(T5ForConditionalGeneration(config).eval())
    scores = Scores()
    best = BestOfNSampler(model, tokenizer, scores, lambda: 5).generate([[30, 31, 4], [32, 4]], **SAMPLED)
    assert [len(of_query) for of_query in best] == [1, 1]
    assert [len(shown) for shown in scores.shown] == [4, 4]


def test_wrong_arguments(make, model, tokenizer):
    with pytest.raises(ValueError, match="tokenizer must be a PreTrainedTokenizer or PreTrainedTokenizerFast, got"):
        BestOfNSampler(model, "tokenizer", Scores(), lambda: 4)
    with pytest.raises(ValueError, match="model must be a PreTrainedModelWrapper, got"):
        BestOfNSampler(model.pretrained_model, tokenizer, Scores(), lambda: 4)
    with pytest.raises(ValueError, match="n_candidates=5: give from 1 to sample_size=4"):
        make(n_candidates=5)
    with pytest.raises(ValueError, match="device='cuda': the model is on cpu"):
        make().generate([30], device="cuda")
    with pytest.raises(ValueError, match=r"tokenized_query\[1\]"):
        make().generate([[30], "text"])
    with pytest.raises(ValueError, match="3 dimensions"):
        make().generate(torch.ones(1, 1, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="1 scores for 4 texts"):
        make(lambda texts: [1.0]).generate([30], **SAMPLED)


@pytest.mark.parametrize(("n", "bound"), [(1, 0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508)])
def test_kl_bound(n, bound):
    assert best_of_n_kl_bound(n) == pytest.approx(bound, abs=1e-6)


def test_kl_bound_is_the_divergence_where_scores_have_no_ties():
    # Uniform over many texts with distinct scores: P(best of n has rank r of k) = (r^n - (r-1)^n) / k^n.
    k, n = 20000, 4
    rank = torch.arange(k + 1, dtype=torch.float64) / k
    best = rank.pow(n).diff()
    assert (best * (best * k).log()).sum().item() == pytest.approx(best_of_n_kl_bound(n), abs=1e-3)
