"""GRPO with vLLM's offline engine in this process; the last line says what came of it."""

import json
import sys

from datasets import Dataset
from servers import tiny_llama, tokenizer

import trl

if __name__ == "__main__":
    names, model = tokenizer(), tiny_llama()
    before = model.lm_head.weight.detach().clone()
    config = trl.GRPOConfig(
        output_dir=sys.argv[1], per_device_train_batch_size=8, num_generations=4, max_steps=2, learning_rate=0.3,
        optim="sgd", max_completion_length=10, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        use_cpu=True, use_vllm=True, vllm_mode="colocate", vllm_max_model_length=128,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model, lambda completion_ids, **columns: [-sum(ids) / len(ids) / 50 for ids in completion_ids], config,
        Dataset.from_dict({"prompt": ["a b c", "sky", "one two", "cat sat on"]}), processing_class=names,
    )  # fmt: skip
    trainer.train()
    key = "sampling/sampling_logp_difference/max"
    found = {
        "version": trainer.sampler.version,
        "difference": max(entry[key] for entry in trainer.state.log_history if key in entry),
        "moved": float((model.lm_head.weight - before).abs().max()),
    }
    print()
    print(json.dumps(found))
