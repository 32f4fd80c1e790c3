"""Value-head models on every architecture: what they compute, and that they come back from disk."""

import json
import os
import resource

import pytest
import torch
from tiny_models import CAUSAL, SEQ2SEQ, lora, tiny_model
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, GPT2Config

from trl.models.modeling_value_head import (
    SUPPORTED_ARCHITECTURES,
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    ValueHead,
)
from trl.models.weight_files import WEIGHT_FILES, writing

ALL = [*CAUSAL, *SEQ2SEQ]


def wrapper_class(name):
    return AutoModelForSeq2SeqLMWithValueHead if name in SEQ2SEQ else AutoModelForCausalLMWithValueHead


def wrapped(name, **kwargs):
    return wrapper_class(name).from_pretrained(tiny_model(name), v_head_init_strategy="normal", **kwargs).eval()


def inputs_of(name):
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids[:, :3]} if name in SEQ2SEQ else {})


@pytest.mark.parametrize("name", ALL)
def test_forward_is_the_inner_model_and_a_value_per_position(name):
    model = wrapped(name)
    logits, loss, values = model(**inputs_of(name))
    inner = model.pretrained_model(**inputs_of(name), output_hidden_states=True)
    hidden = inner.decoder_hidden_states[-1] if name in SEQ2SEQ else inner.hidden_states[-1]
    assert loss is None
    assert_close(logits, inner.logits)
    assert_close(values, hidden @ model.v_head.summary.weight[0] + model.v_head.summary.bias)
    assert values.shape == logits.shape[:2]


@pytest.mark.parametrize("adapter", [False, True])
def test_goes_on_from_a_cache(adapter):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        tiny_model("llama"), peft_config=lora() if adapter else None
    )
    inputs, past = inputs_of("llama"), DynamicCache()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits, _, values = model.eval()(**inputs)
    model(ids[:, :3], past_key_values=past, attention_mask=mask[:, :3])
    last, _, value = model(ids[:, 3:], past_key_values=past, attention_mask=mask)
    assert_close(last, logits[:, 3:])
    assert_close(value, values[:, 3:])


def test_loss_of_labels_and_gradients_reach_head_and_body():
    model = wrapped("llama")
    inputs = inputs_of("llama")
    _, loss, values = model(**inputs, labels=inputs["input_ids"])
    (loss + values.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_encoder_decoder_says_so_and_causal_has_no_such_attribute():
    assert wrapped("t5").is_encoder_decoder is True
    assert not hasattr(wrapped("llama"), "is_encoder_decoder")
    assert list(SUPPORTED_ARCHITECTURES) == [AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead]


@pytest.mark.parametrize("name", ALL)
def test_bfloat16_body_gives_float32_logits_and_values(name):
    model = wrapper_class(name).from_pretrained(tiny_model(name).to(torch.bfloat16))
    logits, loss, values = model(**inputs_of(name))
    assert (logits.dtype, loss, values.dtype) == (torch.float32, None, torch.float32)
    assert model.v_head.summary.weight.dtype == torch.float32
    assert model.pretrained_model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ALL)
def test_folder_loads_with_transformers_and_with_the_wrapper(name, tmp_path):
    model = wrapped(name)
    model.save_pretrained(tmp_path)
    auto_class = AutoModelForSeq2SeqLM if name in SEQ2SEQ else AutoModelForCausalLM
    plain = auto_class.from_pretrained(tmp_path).eval()
    again = wrapper_class(name).from_pretrained(str(tmp_path)).eval()
    logits, _, values = model(**inputs_of(name))
    assert_close(plain(**inputs_of(name)).logits, logits, rtol=0, atol=0)
    again_logits, _, again_values = again(**inputs_of(name))
    assert_close(again_logits, logits, rtol=0, atol=0)
    assert_close(again_values, values, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_adapter_folder_holds_adapter_and_head_alone(name, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "base")
    load = wrapper_class(name).from_pretrained
    task_type = "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "CAUSAL_LM"
    model = load(str(tmp_path / "base"), peft_config=lora(name, task_type), v_head_init_strategy="normal").eval()
    assert model.is_peft_model
    model.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin"} <= set(
        os.listdir(tmp_path / "adapter")
    )
    assert set(torch.load(tmp_path / "adapter" / "pytorch_model.bin")) == {
        "v_head.summary.weight",
        "v_head.summary.bias",
    }
    again = load(str(tmp_path / "adapter")).eval()
    assert again.is_peft_model
    assert [p for p in again.pretrained_model.parameters() if p.requires_grad] == []
    assert any(
        p.requires_grad for p in load(str(tmp_path / "adapter"), is_trainable=True).pretrained_model.parameters()
    )
    for ours, theirs in zip(again(**inputs_of(name)), model(**inputs_of(name)), strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


def test_adapter_wraps_a_model_object_and_its_state_dict_is_the_head():
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=lora())
    assert set(model.state_dict()) == {"v_head.summary.weight", "v_head.summary.bias"}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora" in name or name.startswith("v_head") for name in trained)


def test_save_replaces_an_earlier_save_and_keeps_other_files(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    (tmp_path / "notes.txt").write_text("mine")
    torch.save({"v_head.summary.weight": torch.zeros(1, 16)}, tmp_path / "pytorch_model.bin")
    model.save_pretrained(tmp_path)
    names = set(os.listdir(tmp_path))
    assert {"model.safetensors", "notes.txt", "config.json"} <= names
    assert [name for name in names if "-of-" in name or "index" in name or "saving" in name or "bin" in name] == []


def test_a_rank_that_writes_no_weights_removes_none(tmp_path):
    (tmp_path / "model.safetensors").write_text("of rank 0")
    with writing(tmp_path, WEIGHT_FILES) as folder:
        (folder / "config.json").write_text("{}")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_head_is_read_from_the_shard_that_holds_it(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert not (tmp_path / "model.safetensors").exists()
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert_close(again.v_head.summary.weight, model.v_head.summary.weight)


@pytest.mark.parametrize("sharded", [False, True])
def test_head_is_read_from_pickled_weights(tmp_path, sharded):
    model = wrapped("llama")
    model.pretrained_model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    if sharded:
        head = {key: state.pop(key) for key in list(state) if key.startswith("v_head")}
        torch.save(state, tmp_path / "pytorch_model-00001-of-00002.bin")
        torch.save(head, tmp_path / "pytorch_model-00002-of-00002.bin")
        index = dict.fromkeys(state, "pytorch_model-00001-of-00002.bin")
        index |= dict.fromkeys(head, "pytorch_model-00002-of-00002.bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    assert_close(again.v_head.summary.weight, model.v_head.summary.weight)


def test_a_plain_folder_warns_that_it_has_no_head(tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path)
    AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    expected = (
        f"model is loaded from '{tmp_path}', and no v_head weight is found. "
        "This IS expected if you are not resuming PPO training."
    )
    assert expected in caplog.text


def test_full_disk_leaves_the_folder_as_it_was(tmp_path):
    model = wrapped("llama")
    model.save_pretrained(tmp_path / "good")
    before = (tmp_path / "good" / "model.safetensors").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with torch.no_grad():
        model.v_head.summary.weight.zero_()
    for folder in ("good", "new"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        try:
            with pytest.raises(OSError, match=f"could not save to .*{folder}.*nothing there has changed"):
                model.save_pretrained(tmp_path / folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "good" / "model.safetensors").read_bytes() == before
    assert not any(".saving" in name for name in os.listdir(tmp_path / "good"))
    assert not (tmp_path / "new").exists()


def test_an_adapter_never_overwrites_a_whole_model(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    torch.save(tiny_model("llama").state_dict(), tmp_path / "pytorch_model.bin")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path), peft_config=lora())
    with pytest.raises(ValueError, match="a folder of its own"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("peft_config", [None, lora()])
def test_other_ranks_write_nothing(peft_config, tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=peft_config)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("nested", [False, True])
def test_state_dict_goes_back_where_it_came_from(nested):
    source, target = wrapped("gpt2"), wrapped("gpt2")
    with torch.no_grad():
        source.v_head.summary.weight.fill_(3.0)
        source.pretrained_model.transformer.wte.weight.fill_(0.5)
    assert "transformer.wte.weight" in source.state_dict()
    if nested:  # as DistributedDataParallel holds it
        source, target = torch.nn.ModuleDict({"module": source}), torch.nn.ModuleDict({"module": target})
    target.load_state_dict(source.state_dict())
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    target.load_state_dict(dict(source.named_parameters()), strict=False)


@pytest.mark.parametrize("bare", ["gpt2", "t5", "bart"])
def test_model_without_language_model_head(bare):
    model = AutoModel.from_config((CAUSAL | SEQ2SEQ)[bare])
    with pytest.raises(ValueError) as error:
        wrapper_class(bare).from_pretrained(model)
    assert str(error.value) == "The model does not have a language model head, please use a model that has one."


def test_head_initialisation():
    model = tiny_model("llama", hidden_size=512)
    head = AutoModelForCausalLMWithValueHead.from_pretrained(
        model, v_head_init_strategy="normal", v_head_initializer_range=2.0
    ).v_head.summary
    assert 1.7 < head.weight.std() < 2.3
    assert head.bias.item() == 0
    default = AutoModelForCausalLMWithValueHead.from_pretrained(model).v_head.summary
    assert default.weight.abs().max() <= 1 / 512**0.5  # torch's own: uniform in +-1/sqrt(fan in)
    with pytest.raises(ValueError, match="v_head_init_strategy='zeros' is not known"):
        AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="zeros")


def test_value_head_dropout_comes_from_the_config_then_from_the_keyword():
    config = GPT2Config(n_embd=8)
    assert ValueHead(config).dropout.p == 0.1
    assert ValueHead(config, summary_dropout_prob=0.3).dropout.p == 0.3
    assert isinstance(ValueHead(config, summary_dropout_prob=0).dropout, torch.nn.Identity)
    config.summary_dropout_prob = 0.7
    assert ValueHead(config, summary_dropout_prob=0.3).dropout.p == 0.7


def test_generate_is_the_inner_models():
    model = wrapped("llama")
    ids = torch.tensor([[5, 6]])
    answer = model.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert torch.equal(
        answer, model.pretrained_model.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    )


def test_offloaded_models_are_refused_and_spread_ones_followed():
    inner = tiny_model("llama")
    inner.hf_device_map = {"model": "cpu", "lm_head": "disk"}
    with pytest.raises(ValueError, match="CPU & disk offloading is not supported for ValueHead models"):
        AutoModelForCausalLMWithValueHead.from_pretrained(inner)
    inner.hf_device_map = {"": "cpu"}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(inner)
    assert model.is_sequential_parallel
    model(torch.tensor([[5]]))


def test_push_to_hub_takes_the_head_along_and_leaves_the_model_alone(monkeypatch):
    model = wrapped("llama")
    seen = {}

    def push(repo_id, **kwargs):
        seen.update(repo=repo_id, keys=set(model.pretrained_model.state_dict()), **kwargs)
        return "done"

    monkeypatch.setattr(model.pretrained_model, "push_to_hub", push)
    assert model.push_to_hub("me/mine", private=True) == "done"
    assert (seen["repo"], seen["private"]) == ("me/mine", True)
    assert "v_head.summary.weight" in seen["keys"]
    assert not hasattr(model.pretrained_model, "v_head")


def test_push_to_hub_of_an_adapter_uploads_the_head_too(monkeypatch):
    from trl.models import modeling_value_head

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny_model("llama"), peft_config=lora())
    uploads = []
    monkeypatch.setattr(model.pretrained_model, "push_to_hub", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        modeling_value_head, "HfApi", lambda: type("Api", (), {"upload_file": lambda self, **k: uploads.append(k)})()
    )
    model.push_to_hub("me/mine", token="t", private=True)
    assert [(each["path_in_repo"], each["repo_id"], each["token"]) for each in uploads] == [
        ("pytorch_model.bin", "me/mine", "t")
    ]
