"""GRPO: teach a language model what a reward function likes, without a critic.

Without arguments a tiny model learns in seconds to write one letter of three. With a real one:

    python examples/grpo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset stanfordnlp/imdb --column text \
        --reward sentiment
"""

import argparse

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub name of a causal language model")
parser.add_argument("--dataset", help="name of a data set of prompts; its other columns reach the reward functions")
parser.add_argument("--column", default="prompt", help="its column of prompts")
parser.add_argument("--reward", nargs="+", help="names of `trl.rewards.REWARDS`, or folders of reward models")
parser.add_argument("--steps", type=int, default=15)
arguments = parser.parse_args()


def share_of_a(completion_ids, **columns):
    return [sum(token == 1 for token in ids) / len(ids) for ids in completion_ids]


if arguments.model:
    model, tokenizer = arguments.model, AutoTokenizer.from_pretrained(arguments.model)
    prompts = load_dataset(arguments.dataset, split="train").rename_column(arguments.column, "prompt")
    rewards, numbers = arguments.reward, {"per_device_train_batch_size": 32, "max_prompt_length": 16}
else:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    bos_token_id=None, eos_token_id=None)
    )  # fmt: skip
    prompts = Dataset.from_list([{"prompt": text} for text in ("a b", "b c", "c a", "a", "b", "c")])
    rewards = share_of_a
    numbers = {"per_device_train_batch_size": 32, "learning_rate": 3e-3, "max_completion_length": 8}

config = GRPOConfig(output_dir="grpo", max_steps=arguments.steps, logging_steps=1, report_to="none",
                    save_strategy="no", **numbers)  # fmt: skip
trainer = GRPOTrainer(model, rewards, config, prompts, processing_class=tokenizer)
trainer.train()
first, last = (row["reward"] for row in (trainer.state.log_history[0], trainer.state.log_history[-2]))
print(f"mean reward {first:.3f} -> {last:.3f}; every completion is in {config.output_dir}/rollouts")
