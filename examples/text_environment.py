"""A tiny model learns from nothing to use a tool: to look at a coin (half the reward), and then to name its side."""

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl import GRPOConfig, GRPOTrainer, TextEnvironment, set_seed

set_seed(0)
names = ["<pad>", "<request>", "<look>", "<heads>", "<tails>", "<call>", "<response>", "<submit>", "H", "T", "toss"]
backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
backend.decoder = decoders.Fuse()
backend.add_tokens([AddedToken(name, normalized=False) for name in names[1:]])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<pad>")
shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ids = {"vocab_size": len(names), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
model = LlamaForCausalLM(LlamaConfig(**shape, **ids, initializer_range=0.2))


class Coin:
    """Shows its side to those who look, and pays those who then name it: `<request><look><call>` is a move."""

    def reset(self, side: str) -> None:
        self.side, self.reward, self.done = side, 0.0, False

    def look(self, text: str) -> str:
        self.reward = 0.5
        return self.side

    def heads(self, text: str) -> str:
        return self._name("H")

    def tails(self, text: str) -> str:
        return self._name("T")

    def _name(self, side: str) -> str:
        self.reward += 0.5 * (self.reward > 0 and side == self.side)
        self.done = True
        return side


environment = TextEnvironment(
    environment_factory=Coin, max_turns=2, generation_kwargs={"max_new_tokens": 3}, tool_timeout=None
)
config = GRPOConfig(
    output_dir="coin", per_device_train_batch_size=128, num_generations=32, max_steps=100, learning_rate=3e-3,
    lr_scheduler_type="constant", max_completion_length=16, logging_steps=10, entropy_coef=0.05,
    turn_level_credit=True, save_strategy="no", save_rollouts=False, report_to="none",
)  # fmt: skip
rows = Dataset.from_list([{"prompt": "toss", "side": side} for side in "HT"] * 32)
trainer = GRPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, environment=environment)
trainer.train()
print("reward:", *[f"{row['reward']:.2f}" for row in trainer.state.log_history if "reward" in row])
