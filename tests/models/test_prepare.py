"""Loading, adapters, checkpointing, dropout, noise and vocabulary: what every trainer does to its model."""

import json
import sys

import peft
import pytest
import torch
import transformers as t
from tiny_models import CAUSAL, SEQ2SEQ, lora, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.testing import assert_close

from trl.models import peft_support
from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead
from trl.models.prepare import (
    activate_neftune,
    align_special_tokens,
    check_vocabulary,
    context_length,
    disable_dropout_in_model,
    enable_gradient_checkpointing,
    ensure_pad_token,
    load_model,
    load_tokenizer,
    modern_init_kwargs,
    neftune_post_forward_hook,
    peft_module_casting_to_bf16,
    wrap_peft,
)

IDS = torch.tensor([[5, 6, 7, 8]])
CausalLM = t.AutoModelForCausalLM


def tokenizer_of(size, **special):
    vocabulary = {f"w{number}": number for number in range(size)}
    return t.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0")), **special)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_load_model_by_name_path_or_object(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    assert load_model(model, CausalLM) is model
    for name in (tmp_path, str(tmp_path)):
        assert_close(load_model(name, CausalLM).lm_head.weight, model.lm_head.weight)
    assert load_model(tmp_path, CausalLM, {"torch_dtype": "bfloat16"}).dtype == torch.bfloat16


def test_a_trainer_warns_of_a_name_and_refuses_keywords_for_an_object(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="You passed a model_id to the SFTTrainer. This will automatically create"):
        load_model(str(tmp_path), CausalLM, owner="SFTTrainer")
    with pytest.raises(ValueError) as error:
        load_model(tiny_model("llama"), CausalLM, {"dtype": "bfloat16"}, owner="DPOTrainer")
    assert str(error.value) == "You passed model_kwargs to the DPOTrainer. But your model is already instantiated."


def test_folder_of_an_adapter_is_a_trainable_peft_model(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    adapted = wrap_peft(CausalLM.from_pretrained(tmp_path / "base"), lora())
    adapted.save_pretrained(tmp_path / "adapter")
    model = load_model(tmp_path / "adapter", CausalLM)
    assert isinstance(model, peft.PeftModel)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert_close(model.eval()(IDS).logits, adapted.eval()(IDS).logits)


def broken(folder, what):
    if what != "missing":
        tiny_model("llama").save_pretrained(folder)
    if what == "no config":
        (folder / "config.json").unlink()
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    if what == "broken config":
        (folder / "config.json").write_text("{")
    if what == "half a file":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    if what == "unknown kind":
        (folder / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    if what == "homeless adapter":
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))


@pytest.mark.parametrize(
    "what",
    ["missing", "no config", "no weights", "broken config", "half a file", "unknown kind", "homeless adapter"],
)
@pytest.mark.parametrize("load", [load_model, AutoModelForCausalLMWithValueHead.from_pretrained])
def test_a_folder_that_cannot_be_read_says_so_in_one_line(what, load, tmp_path):
    broken(tmp_path / "model", what)
    with pytest.raises((OSError, ValueError)) as error:
        load(str(tmp_path / "model"), *([CausalLM] if load is load_model else []))
    message = str(error.value)
    assert str(tmp_path / "model") in message
    assert "\n" not in message


def test_names_of_today_and_of_yesterday(monkeypatch):
    assert modern_init_kwargs({"torch_dtype": "auto"}) == {"dtype": "auto"}
    assert modern_init_kwargs({"load_in_8bit": False, "dtype": "auto"}) == {"dtype": "auto"}
    with pytest.raises(ValueError, match="both say how to quantise"):
        modern_init_kwargs({"load_in_4bit": True, "quantization_config": object()})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("trl.models.prepare.is_gpu_available", lambda: True)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        modern_init_kwargs({"load_in_4bit": True})


@pytest.mark.parametrize(
    ("given", "loaded"),
    [
        ({"load_in_4bit": True, "dtype": "auto"}, {"dtype": "auto"}),
        ({"quantization_config": {"load_in_8bit": True}}, {}),
        ({"attn_implementation": "flash_attention_2"}, {"attn_implementation": "sdpa"}),
        ({"attn_implementation": "kernels-community/flash-attn3"}, {"attn_implementation": "sdpa"}),
    ],
)
def test_what_needs_a_gpu_is_replaced_with_a_warning(given, loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("trl.models.prepare.is_gpu_available", lambda: False)
    with pytest.warns(UserWarning, match="needs a GPU") as told:
        assert modern_init_kwargs(given) == loaded
    assert len(told) == 1
    monkeypatch.setattr("trl.models.prepare.is_gpu_available", lambda: True)
    if "attn_implementation" in given:
        assert modern_init_kwargs(given) == given


def test_a_quantisation_object_is_left_out_too(monkeypatch):
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr(BitsAndBytesConfig, "post_init", lambda self: None)
    quantisation = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("trl.models.prepare.is_gpu_available", lambda: False)
    with pytest.warns(UserWarning, match="`quantization_config` needs a GPU and bitsandbytes"):
        assert modern_init_kwargs({"quantization_config": quantisation}) == {}


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_load_tokenizer(tmp_path):
    tokenizer_of(10, eos_token="w2").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, padding_side="left")
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (2, "left")
    assert load_tokenizer(tokenizer) is tokenizer
    with pytest.raises(ValueError, match="use_fast cannot change"):
        load_tokenizer(tokenizer, use_fast=True)
    with pytest.raises(OSError, match=r"could not load a tokenizer from .*empty"):
        load_tokenizer(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no such folder"),
        ({}, ""),
        ({"config.json": '{"model_type": "llama"}'}, "it holds no tokenizer. Save one there"),
        ({"config.json": "{"}, ""),
    ],
)
def test_a_folder_without_a_tokenizer_is_said_in_whole_sentences(files, message, tmp_path):
    place = tmp_path / "place"
    for name, text in (files or {}).items():
        place.mkdir(exist_ok=True)
        (place / name).write_text(text)
    if files == {}:
        place.mkdir()
    with pytest.raises(OSError, match=r"could not load a tokenizer from .*place") as error:
        load_tokenizer(str(place))
    assert message in str(error.value)
    assert ": Save" not in str(error.value)
    assert "\n" not in str(error.value)
    assert ("Save one there" in str(error.value)) == (files is not None)


@pytest.mark.parametrize("base", ["/gone/base", "./gone", "empty"])
def test_an_adapter_without_its_model_says_which_and_the_way_out(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    peft.get_peft_model(tiny_model("llama"), lora()).save_pretrained("adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises((OSError, ValueError), match="the adapter 'adapter' belongs to a model that cannot be") as error:
        load_model("adapter", CausalLM)
    assert f"could not load a model from '{base}'" in str(error.value)
    assert "`trl merge` as --base" in str(error.value)


def test_pad_token_is_its_own_else_the_end_token_else_an_error():
    assert ensure_pad_token(tokenizer_of(10, eos_token="w2", pad_token="w3")).pad_token_id == 3
    assert ensure_pad_token(tokenizer_of(10, eos_token="w2")).pad_token_id == 2
    with pytest.raises(ValueError, match=r"neither a pad token nor an EOS token: .*tokenizer\.pad_token = "):
        ensure_pad_token(tokenizer_of(10))


def test_pad_token_reaches_configs_that_have_none():
    model = tiny_model("llama", pad_token_id=None)
    model.generation_config.pad_token_id = None
    wrapper = AutoModelForCausalLMWithValueHead(model)
    align_special_tokens(wrapper, tokenizer_of(10, pad_token="w3"))
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (3, 3)
    align_special_tokens(model, tokenizer_of(10, pad_token="w4"))
    assert model.config.pad_token_id == 3


def test_vocabulary_beyond_the_embedding():
    for model in (tiny_model("llama"), AutoModelForCausalLMWithValueHead(tiny_model("llama"))):
        check_vocabulary(model, tokenizer_of(60))
        with pytest.raises(
            ValueError, match=r"highest id is 60, and the model's embedding has 60 rows: .*resize_token"
        ):
            check_vocabulary(model, tokenizer_of(61))


@pytest.mark.parametrize(
    ("name", "limit"),
    [("llama", 64), ("gpt2", 64), ("opt", 64), ("bart", 64), ("gpt_neox", 64), ("bloom", None), ("t5", None)],
)
def test_context_length(name, limit):
    assert context_length(tiny_model(name)) == limit


def test_context_length_of_roberta_starts_behind_its_padding():
    fields = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = t.RobertaConfig(**fields, intermediate_size=8, max_position_embeddings=12, num_labels=1, pad_token_id=1)
    model = t.RobertaForSequenceClassification(config).eval()
    assert context_length(model) == 10
    model(torch.full((1, 10), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 11), 5))


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_wrap_peft_trains_the_adapter_alone():
    model = wrap_peft(tiny_model("llama"), lora(), owner="SFTTrainer")
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def test_a_model_with_an_adapter_is_merged_only_on_request():
    adapted = wrap_peft(tiny_model("llama"), lora())
    with pytest.raises(ValueError, match="has an adapter already"):
        wrap_peft(adapted, lora())
    before = adapted.eval()(IDS).logits
    merged = wrap_peft(adapted, lora(init_lora_weights=True), merge=True)
    assert_close(merged.eval()(IDS).logits, before)
    with merged.disable_adapter():
        assert_close(merged(IDS).logits, before)


def test_what_is_no_adapter_config(monkeypatch):
    with pytest.raises(
        ValueError, match=r"need to pass a PeftConfig object to the SFTTrainer\. and you passed a <class 'di"
    ):
        wrap_peft(tiny_model("llama"), {"r": 2}, owner="SFTTrainer")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="PEFT is not installed and you passed a `peft_config`"):
        wrap_peft(tiny_model("llama"), object())
    with pytest.raises(ImportError, match="pip install peft"):
        peft_module_casting_to_bf16(tiny_model("llama"))


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": True}, {"use_reentrant": False}])
def test_checkpointing_below_an_adapter_still_gives_gradients(kwargs):
    model = wrap_peft(
        tiny_model("llama"), lora(), gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs
    ).train()
    assert model.get_input_embeddings()(IDS).requires_grad == (kwargs or {}).get("use_reentrant", True)
    enable_gradient_checkpointing(model.get_base_model(), kwargs)
    model(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_quantised_models_are_prepared_first(monkeypatch):
    seen = {}

    def prepare(model, **kwargs):
        seen.update(kwargs)
        return model

    monkeypatch.setattr(peft_support, "prepare_model_for_kbit_training", prepare)
    monkeypatch.setattr(peft_support, "get_peft_model", lambda model, config: model)
    cast = []
    monkeypatch.setattr(peft_support, "peft_module_casting_to_bf16", cast.append)
    model = tiny_model("llama")
    model.is_loaded_in_4bit = True
    reentrant = {"use_reentrant": False}
    wrap_peft(model, lora(), gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant, bf16=True)
    assert seen == {"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": reentrant}
    assert cast == [model]
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = False, True
    wrap_peft(model, lora(), bf16=True)
    assert seen["use_gradient_checkpointing"] is False
    assert len(cast) == 1


def test_casting_to_bfloat16():
    model = wrap_peft(tiny_model("llama"), lora())
    peft_module_casting_to_bf16(model)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, kind in kinds.items():
        to_bf16 = "q_proj" in name or "lm_head" in name or "embed_tokens" in name
        assert kind == (torch.bfloat16 if to_bf16 else torch.float32), name


# --- gradient checkpointing, dropout, noise ---------------------------------------------------------------------------


def test_gradient_checkpointing_of_wrappers_and_of_those_that_cannot():
    model = AutoModelForCausalLMWithValueHead(tiny_model("llama")).train()
    enable_gradient_checkpointing(model, {"use_reentrant": False})
    assert model.pretrained_model.model.layers[0].gradient_checkpointing
    inner = tiny_model("llama")
    inner.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="LlamaForCausalLM does not support `gradient_checkpointing`"):
        enable_gradient_checkpointing(inner)


@pytest.mark.parametrize("name", ["gpt2", "opt", "bloom", "t5", "bart", "llama"])
def test_without_dropout_train_mode_repeats_itself(name):
    rates = ("dropout", "attention_dropout", "hidden_dropout", "layerdrop", "decoder_layerdrop", "dropout_rate")
    config = (CAUSAL | SEQ2SEQ)[name]
    model = tiny_model(name, **{rate: 0.5 for rate in rates if hasattr(config, rate)})
    disable_dropout_in_model(model)
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {})
    quiet = model(**inputs).logits
    model.train()
    for _ in range(3):
        assert_close(model(**inputs).logits, quiet)


def test_neftune_noise_is_bounded_uniform_and_only_in_training():
    embedding = nn.Embedding(10, 25)
    embedding.neftune_noise_alpha = 5.0
    ids = torch.arange(4)[None].repeat(50, 1)
    clean = embedding(ids)
    noise = neftune_post_forward_hook(embedding, None, clean) - clean
    assert noise.abs().max() <= 0.5 + 1e-6  # 5 / sqrt(4 * 25)
    assert noise.abs().max() > 0.49
    assert noise.mean().abs() < 0.02
    embedding.eval()
    assert neftune_post_forward_hook(embedding, None, clean) is clean


def test_neftune_is_put_on_and_taken_off():
    for model in (tiny_model("llama"), AutoModelForCausalLMWithValueHead(tiny_model("llama"))):
        model.train()
        embeddings = getattr(model, "pretrained_model", model).get_input_embeddings()
        handle = activate_neftune(model, 5.0)
        assert model.neftune_hook_handle is handle
        assert not torch.equal(embeddings(IDS), embeddings(IDS))
        handle.remove()
        assert torch.equal(embeddings(IDS), embeddings(IDS))


def test_without_peft_everything_else_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    tiny_model("llama").save_pretrained(tmp_path)
    assert type(load_model(tmp_path, CausalLM)).__name__ == "LlamaForCausalLM"
    assert not peft_support.is_peft_model(tiny_model("llama"))
