"""A tiny model learns to use a tool: to look at a coin (half the reward); to say what it shows takes it longer."""

from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl import GRPOConfig, GRPOTrainer, TextEnvironment, set_seed

set_seed(0)
names = ["<pad>", "<request>", "<coin>", "<call>", "<response>", "<submit>", "<say>", "heads", "tails", "toss", "over"]
backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
backend.decoder = decoders.Fuse()
backend.add_tokens([AddedToken(name, normalized=False) for name in names[1:]])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<pad>")
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
)


class Coin:
    """Shows one side to those who look, and pays those who then say which."""

    def reset(self, side: str) -> None:
        self.side, self.reward, self.seen, self.done = side, 0.0, False, False

    def coin(self, text: str) -> str:
        self.reward, self.seen = 0.5, True
        return self.side

    def say(self, text: str) -> str:
        self.reward += 0.5 * (self.seen and text == self.side)
        self.done = True
        return "over"


environment = TextEnvironment(
    environment_factory=Coin, max_turns=2, generation_kwargs={"max_new_tokens": 4}, tool_timeout=None
)
config = GRPOConfig(
    output_dir="coin", per_device_train_batch_size=128, num_generations=32, max_steps=80, learning_rate=3e-3,
    lr_scheduler_type="constant", max_completion_length=16, logging_steps=10, entropy_coef=0.02,
    save_strategy="no", save_rollouts=False, report_to="none",
)  # fmt: skip
rows = Dataset.from_list([{"prompt": "toss", "side": side} for side in ("heads", "tails")] * 32)
trainer = GRPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, environment=environment)
trainer.train()
print("reward:", *[f"{row['reward']:.2f}" for row in trainer.state.log_history if "reward" in row])
