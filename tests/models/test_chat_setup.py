"""A chat template for a base model: ChatML, and templates of other tokenizers."""

import pytest
import torch
from tiny_models import tiny_model
from tokenizers_for_tests import CHATML, LLAMA3, byte_tokenizer, word_tokenizer

from trl.models.chat_setup import (
    SIMPLE_CHAT_TEMPLATE,
    clone_chat_template,
    get_training_chat_template,
    setup_chat_format,
    template_at,
    unwrap_model_for_generation,
)

TURNS = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]


def model_for(tokenizer):
    return tiny_model("llama", vocab_size=len(tokenizer))


def test_chatml():
    tokenizer = word_tokenizer()
    model = model_for(tokenizer)
    before = model.get_input_embeddings().weight.clone()
    model, tokenizer = setup_chat_format(model, tokenizer)
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == (
        "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    )
    prompt = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", *["<|im_end|>"] * 2)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [100, 101]
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (100, 101, 101)
    assert torch.equal(model.get_input_embeddings().weight[:100], before)
    assert model.get_output_embeddings().weight.shape[0] == 102
    with pytest.raises(ValueError, match="it has a chat template already"):
        setup_chat_format(model, tokenizer)
    with pytest.raises(ValueError, match="format='alpaca'"):
        setup_chat_format(model, tokenizer, format="alpaca")


def test_an_embedding_with_spare_rows_keeps_them():
    tokenizer = word_tokenizer()
    model = tiny_model("llama", vocab_size=128)
    setup_chat_format(model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == 128
    tokenizer.chat_template = None
    setup_chat_format(model, tokenizer, resize_to_multiple_of=100)
    assert model.get_input_embeddings().num_embeddings == 200


def test_clone(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    model = model_for(tokenizer)
    model, tokenizer, added = clone_chat_template(model, tokenizer, str(tmp_path))
    assert tokenizer.chat_template == CHATML
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id
    assert "<|im_start|>" in tokenizer.convert_ids_to_tokens(added)
    assert "<pad>" not in tokenizer.convert_ids_to_tokens(added)  # both have it
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 128
    assert added == list(range(100, 100 + len(added)))


def test_clone_without_rounding_and_of_a_base_model(tmp_path):
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "chat")
    byte_tokenizer(None).save_pretrained(tmp_path / "base")
    tokenizer = word_tokenizer()
    model, tokenizer, added = clone_chat_template(model_for(tokenizer), tokenizer, str(tmp_path / "chat"), None)
    assert len(tokenizer) == 100 + len(added) == model.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match="that tokenizer has no chat template"):
        clone_chat_template(model, tokenizer, str(tmp_path / "base"))


def test_templates_for_training_are_the_tokenizer_s_own():
    assert get_training_chat_template(byte_tokenizer(LLAMA3)) == LLAMA3


def test_simple_template():
    tokenizer = byte_tokenizer(SIMPLE_CHAT_TEMPLATE)
    text = tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert text == "User: a b\n\nAssistant:"


def test_template_of_a_file_folder_or_name(tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert template_at(str(tmp_path / "chat.jinja")) == "{{ messages }}"
    byte_tokenizer(CHATML).save_pretrained(tmp_path / "chat")
    assert template_at(str(tmp_path / "chat")) == CHATML
    byte_tokenizer(None).save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="the tokenizer there has no chat template"):
        template_at(str(tmp_path / "base"))
    for name in ("missing.jinja", "./missing", str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="there is no such file; give a file with a Jinja template"):
            template_at(name)


def test_unwrapped_for_generation():
    from accelerate import Accelerator

    model = tiny_model("llama")
    with unwrap_model_for_generation(model, Accelerator(cpu=True)) as inner:
        assert inner is model
