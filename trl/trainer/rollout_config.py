"""Settings that every trainer shares whose data are its own samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trl.trainer.configuration import PostTrainingConfig, require

SAMPLING_KEYWORDS = ("min_new_tokens", "stop_strings", "stop_token_ids")
"""what `generation_kwargs` may hold besides the fields of the config"""


@dataclass
class RolloutConfig(PostTrainingConfig):
    """`TrainingArguments` and what sampling takes: prompts, how completions are drawn, how long each rollout serves."""

    learning_rate: float = field(default=1e-6)
    """initial learning rate"""
    disable_dropout: bool = field(default=True)
    """train without dropout; with it the first update's ratio is not 1"""
    num_generations: int = field(default=8)
    """completions of each prompt"""
    num_generations_eval: int | None = field(default=None)
    """the same in evaluation; None: as `num_generations`"""
    max_prompt_length: int | None = field(default=None)
    """longest prompt in tokens, longer ones lose their start; None: never cut"""
    max_completion_length: int = field(default=512)
    """longest completion in tokens"""
    steps_per_generation: int | None = field(default=None)
    """micro-batches of one rollout; None: `gradient_accumulation_steps`, so a rollout is one optimizer step"""
    generation_batch_size: int | None = field(default=None)
    """completions of one rollout over all ranks; another way to say `steps_per_generation`"""
    num_iterations: int = field(default=1)
    """passes over each rollout"""
    shuffle_dataset: bool = field(default=True)
    """draw the prompts in random order"""
    temperature: float = field(default=1.0)
    """sampling temperature; a policy is scored at the same"""
    top_p: float = field(default=1.0)
    """sample among the smallest set of tokens whose probability reaches this"""
    top_k: int = field(default=0)
    """sample among the k most probable tokens; 0: all"""
    min_p: float | None = field(default=None)
    """sample among tokens at least this fraction as probable as the most probable one"""
    repetition_penalty: float = field(default=1.0)
    """punish tokens that are in the prompt or the completion already; 1: off"""
    generation_kwargs: dict[str, Any] | None = field(default=None)
    """further sampling settings: min_new_tokens, stop_strings, stop_token_ids"""
    max_tool_calling_iterations: int | None = field(default=None)
    """rounds of tool calls in a conversation; None: as many as `max_completion_length` has room for"""
    chat_template_kwargs: dict[str, Any] | None = field(default=None)
    """variables for the chat template"""
    padding_free: bool = field(default=True)
    """no padding, shared prompts computed once; False forces padded rows (same results, slower)"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    save_rollouts: bool = field(default=True)
    """write each rollout's texts, rewards and what was learned of them to `output_dir/rollouts/*.parquet`"""
    log_completions: bool = field(default=False)
    """print some completions at each rollout"""
    num_completions_to_print: int | None = field(default=None)
    """how many; None: all"""
    log_unique_prompts: bool = field(default=False)
    """print one completion of each prompt"""
    use_vllm: bool = field(default=False)
    """sample with vLLM: not supported yet"""

    def token_settings(self) -> dict[str, str | None]:
        return {"pad_token": self.pad_token}

    @property
    def pads_rows(self) -> bool:
        return not self.padding_free

    def validate(self) -> None:
        super().validate()
        require(self, "use_vllm", not self.use_vllm, "vLLM is not supported yet; the local sampler needs no settings")
        way_out = "a resumed run goes on where it stopped, in the midst of a rollout even; leave it False"
        require(self, "ignore_data_skip", not self.ignore_data_skip, way_out)
        require(self, "auto_find_batch_size", not self.auto_find_batch_size, "the batch size is part of a rollout")
        for name in ("num_generations", "max_completion_length", "num_iterations", "per_device_train_batch_size",
                     "gradient_accumulation_steps"):  # fmt: skip
            require(self, name, getattr(self, name) >= 1, "give a whole number >= 1")
        for name in ("num_generations_eval", "max_prompt_length", "steps_per_generation", "generation_batch_size",
                     "num_completions_to_print", "max_tool_calling_iterations"):  # fmt: skip
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "give a whole number >= 1, or None")
        require(
            self, "temperature", self.temperature > 0, "give a number > 0: a policy that is greedy explores nothing"
        )
        require(self, "top_p", 0 < self.top_p <= 1, "give a probability in (0, 1]")
        require(self, "top_k", self.top_k is None or self.top_k >= 0, "give a number of tokens, or 0 for all")
        require(self, "min_p", self.min_p is None or 0 <= self.min_p <= 1, "give a fraction in [0, 1], or None")
        require(self, "repetition_penalty", self.repetition_penalty > 0, "give a number > 0; 1 is off")
        unknown = set(self.generation_kwargs or {}) - set(SAMPLING_KEYWORDS)
        require(self, "generation_kwargs", not unknown, f"choose among {', '.join(SAMPLING_KEYWORDS)}")
        for name in ("num_completions_to_print", "log_unique_prompts"):
            require(
                self, name, self.log_completions or not getattr(self, name), "no effect without log_completions=True"
            )

    def place_in_data(self) -> dict[str, Any]:
        """Nothing: prompts are counted, and a half-used rollout is compared with the settings that made it."""
        return {}

    @property
    def reshapes(self) -> bool:
        """Whether completions are drawn from another distribution than the policy at `temperature`."""
        filters = (self.top_k or 0, self.top_p, self.min_p or 0.0, self.repetition_penalty)
        return filters != (0, 1.0, 0.0, 1.0) or bool((self.generation_kwargs or {}).get("min_new_tokens"))

    def rollout_shape(self) -> tuple[int, int]:
        """`(micro-batches, completions)` of one rollout on this rank."""
        size, world, accumulation = self.per_device_train_batch_size, self.world_size, self.gradient_accumulation_steps
        steps = self.steps_per_generation
        if self.generation_batch_size is not None:
            if self.generation_batch_size % (size * world):
                raise ValueError(
                    f"generation_batch_size={self.generation_batch_size}: must be a multiple of "
                    f"per_device_train_batch_size * processes = {size * world}"
                )
            implied = self.generation_batch_size // (size * world)
            if steps not in (None, implied):
                raise ValueError(
                    f"steps_per_generation={steps}: generation_batch_size implies {implied}; set one of them"
                )
            steps = implied
        steps = steps or accumulation
        if steps % accumulation and accumulation % steps:
            raise ValueError(
                f"steps_per_generation={steps}: an optimizer step of gradient_accumulation_steps={accumulation} "
                "micro-batches would straddle two rollouts; make one a multiple of the other"
            )
        if steps * size % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: must divide the completions of a rollout on each rank, "
                f"per_device_train_batch_size * steps_per_generation = {steps * size}"
            )
        return steps, steps * size


@dataclass
class RewardedConfig(RolloutConfig):
    """What reward functions add."""

    reward_weights: list[float] | None = field(default=None)
    """weight of each reward function; None: 1 each"""
    reward_timeout: float | str | list[float | None] | None = field(default=None)
    """seconds after which a reward function has no opinion of a batch, for all or one each; None: wait"""
    overlong_cache: int | None = field(default=None)
    """soft punishment: the last so many tokens before the limit cost up to 1; None: off"""
    dynamic_sampling: bool = field(default=False)
    """sample further prompts in place of groups whose rewards are all equal"""
    dynamic_sampling_max_rounds: int = field(default=3)
    """rounds of sampling per rollout at most; what is missing then stays idle"""

    def json_fields(self) -> tuple[str, ...]:
        return (*super().json_fields(), "reward_timeout")

    def validate(self) -> None:
        super().validate()
        rounds, cache = self.dynamic_sampling_max_rounds, self.overlong_cache
        require(self, "dynamic_sampling_max_rounds", 1 <= rounds <= 64, "give a whole number from 1 to 64")
        require(self, "dynamic_sampling", not self.dynamic_sampling or rounds > 1, "has no effect with 1 round")
        weights = self.reward_weights or []
        require(self, "reward_weights", all(map(math.isfinite, weights)), "give finite numbers")
        timeouts: list[Any] = self.reward_timeout if isinstance(self.reward_timeout, list) else [self.reward_timeout]
        fits = all(seconds is None or seconds > 0 for seconds in timeouts)
        require(self, "reward_timeout", fits, "give seconds > 0, or None")
        fits = cache is None or 0 < cache <= self.max_completion_length
        require(self, "overlong_cache", fits, "give tokens in (0, max_completion_length], or None")
