"""PPO with a value head: teach a language model to please a score.

Without arguments a tiny model learns in seconds to write one letter of three. With a real one:

    python examples/ppo.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset stanfordnlp/imdb --column text \
        --reward_model lvwerra/distilbert-imdb
"""

import argparse

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers import PreTrainedTokenizerFast as Fast

from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder or Hub name of a causal language model")
parser.add_argument("--dataset", help="name of a data set of prompts")
parser.add_argument("--column", default="prompt", help="its column of texts; the first 32 characters are the prompt")
parser.add_argument("--reward_model", help="folder or Hub name of a classifier with one label")
parser.add_argument("--steps", type=int, default=15)
arguments = parser.parse_args()


def share_of_a(completion_ids, **columns):
    return [sum(token == 1 for token in ids) / len(ids) for ids in completion_ids]


if arguments.model:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(arguments.model)
    texts = load_dataset(arguments.dataset, split="train")[arguments.column]
    prompts = Dataset.from_list([{"prompt": text[:32]} for text in texts])
    scoring = {"reward_funcs": arguments.reward_model}
    config = PPOConfig(steps=32 * arguments.steps, batch_size=32, mini_batch_size=8, learning_rate=1.4e-5, target=6)
else:
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = Fast(tokenizer_object=backend, pad_token="<pad>")
    tiny = LlamaConfig(vocab_size=4, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                       bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(AutoModelForCausalLM.from_config(tiny))
    prompts = Dataset.from_list([{"prompt": text} for text in ("a b", "b c", "c a", "a", "b", "c")])
    scoring = {"reward_funcs": share_of_a}
    config = PPOConfig(steps=32 * arguments.steps, batch_size=32, mini_batch_size=32, learning_rate=3e-3,
                       max_new_tokens=8, init_kl_coef=0.02)  # fmt: skip

trainer = PPOTrainer(config, model, tokenizer=tokenizer, dataset=prompts, **scoring)
trainer.train(callback=lambda step, stats, batch: print(
    f"step {step:3d}  score {stats['ppo/mean_scores']:.3f}  kl {stats['objective/kl']:.2f}  {batch['response'][0]!r}"
))  # fmt: skip
