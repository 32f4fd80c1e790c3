"""The memory of a process by formula: by hand, and against what autograd keeps."""

import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers_for_tests import word_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from trl import SFTConfig, SFTTrainer
from trl.models.memory import SHARED_OUT, memory_per_rank

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
SIZES = {
    "vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
BLOCK = 8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 12 + 2 * 8  # q and o, k and v, the MLP, two norms
OUTSIDE = 2 * 50 * 8 + 8
N = 3 * BLOCK + OUTSIDE


def of(**told):
    return memory_per_rank(LlamaConfig(**SIZES), **told)


def test_by_hand():
    one = of(tokens=10, states=2.0, reference=True, rollout_tokens=7)
    assert (one.weights, one.gathered, one.gradients, one.optimizer, one.reference) == (4 * N, 0, 4 * N, 8 * N, 4 * N)
    a_layer = 6 * 8 + 8 + 4 * 12
    assert one.activations == 10 * 4 * (3 * a_layer + 16)
    assert one.head == 4 * (10 * 50 + 2**18)
    assert one.rollout == 7 * 3 * 8 * 4
    assert one.total == sum(vars(one).values()) - one.rollout
    assert of(tokens=10, rollout_tokens=10**5).total == 4 * N + 8 * N + 10**5 * 3 * 8 * 4  # the peak is in sampling
    assert of(tokens=10, checkpointing=True).activations == 10 * 4 * (3 * 8 + a_layer + 16)


def test_what_is_shared_out():
    ddp, fsdp = of(ranks=4, reference=True), of(engine="fsdp2", ranks=4, computed=2, reference=True, rollout_tokens=1)
    assert (ddp.weights, ddp.gradients, ddp.optimizer, ddp.reference) == (4 * N, 8 * N, 8 * N, 4 * N)
    assert (fsdp.weights, fsdp.gradients, fsdp.optimizer, fsdp.reference) == (N, N, 2 * N, N)
    assert fsdp.gathered == 2 * (OUTSIDE + 2 * BLOCK)
    assert fsdp.rollout == 4 * N + 3 * 8 * 2
    zero1, zero2 = of(engine="zero1", ranks=4), of(engine="zero2", ranks=4)
    assert (zero1.weights, zero1.gradients, zero1.optimizer) == (4 * N, 4 * N, 2 * N)
    assert (zero2.weights, zero2.gradients, zero2.optimizer) == (4 * N, N, 2 * N)
    lora = of(stored=2, trained=100, states=2.0)
    assert (lora.weights, lora.gradients, lora.optimizer) == (2 * N, 200, 400)
    with pytest.raises(ValueError, match="engine='fsdp': choose one of ddp, zero1, zero2, zero3, fsdp2"):
        of(engine="fsdp")


@pytest.mark.parametrize(
    ("sizes", "checkpointing"),
    [({}, False), ({}, True), ({"intermediate_size": 384}, False), ({"num_key_value_heads": 4}, False)],
)
def test_against_what_autograd_keeps(sizes, checkpointing, tmp_path):
    """The difference between four blocks and two: what a block keeps of a token, in a pass of a trainer."""
    kept, predicted = [], []
    for layers in (2, 4):
        numbers = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
        config = LlamaConfig(**{**numbers, "num_key_value_heads": 2, **sizes}, num_hidden_layers=layers, pad_token_id=0)
        kept.append(kept_by_autograd(config, tmp_path, checkpointing))
        predicted.append(memory_per_rank(config, tokens=2 * 32, checkpointing=checkpointing).activations)
    assert kept[1] - kept[0] == pytest.approx(predicted[1] - predicted[0], rel=0.01)


def kept_by_autograd(config, folder, checkpointing):
    """Bytes that a pass of two rows of 32 tokens keeps in SFT, weights left out."""
    model = AutoModelForCausalLM.from_config(config)
    args = SFTConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        save_strategy="no", gradient_checkpointing=checkpointing, disable_tqdm=True,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[4 + place % 90 for place in range(32)]] * 2})
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=word_tokenizer())
    trainer.train()  # which finds out how the model is run
    (batch,) = trainer.get_train_dataloader()
    weights, found = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trainer.compute_loss(model.train(), batch, num_items_in_batch=torch.tensor(62.0))
    return sum(storage.nbytes() for storage in found.values())


MODELS = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen2.5-1.5B": Qwen2Config(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "Llama-3.1-70B": LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    ),
}  # fmt: skip
COLUMNS = (("ddp", 1), ("ddp", 8), ("zero2", 8), ("fsdp2", 8), ("fsdp2", 64))


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_page(name):
    told = {"tokens": 8192, "computed": 2, "checkpointing": True}
    found = [memory_per_rank(MODELS[name], engine=engine, ranks=ranks, **told).total for engine, ranks in COLUMNS]
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
    assert re.findall(r"[\d.]+", row.removeprefix(f"| {name} |")) == [f"{each / 2**30:.1f}" for each in found]


def test_every_engine_is_on_the_page():
    for engine in SHARED_OUT:
        assert f"`{engine}`" in PAGE
