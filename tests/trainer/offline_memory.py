"""A training step and an evaluation of 4,096 scored tokens over a vocabulary of 150,000; prints the MiB it took."""

import argparse
import json
import resource

import torch
from datasets import Dataset
from tokenizers_for_tests import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

VOCABULARY, ROWS, LENGTH = 150_000, 8, 513


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer", choices=["sft", "dpo"])
    parser.add_argument("folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
        )
    )  # fmt: skip
    ids = torch.randint(4, VOCABULARY, (ROWS, LENGTH)).tolist()
    settings = {
        "output_dir": given.folder, "max_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
        "optim": "sgd",
    }  # fmt: skip
    if given.trainer == "sft":
        rows = Dataset.from_dict({"input_ids": ids})
        settings |= {"per_device_train_batch_size": ROWS, "per_device_eval_batch_size": ROWS}
        build = (SFTTrainer, SFTConfig)
    else:
        half = ROWS // 2
        answers = [row[1:] for row in ids]
        columns = {"prompt_ids": [[5]] * half, "chosen_ids": answers[:half], "rejected_ids": answers[half:]}
        rows = Dataset.from_dict(columns)
        settings |= {"per_device_train_batch_size": half, "per_device_eval_batch_size": half}
        build = (DPOTrainer, DPOConfig)
    trainer = build[0](
        model, args=build[1](**settings), train_dataset=rows, eval_dataset=rows, processing_class=word_tokenizer()
    )
    start = peak()
    trainer.train()
    trained = peak()
    trainer.evaluate()
    print(json.dumps({"training": round(trained - start), "evaluation": round(peak() - start)}))


if __name__ == "__main__":
    main()
