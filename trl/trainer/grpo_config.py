"""Settings of the critic-free on-policy trainers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trl.losses.policy import ADVANTAGES, REWARD_AGGREGATIONS
from trl.trainer.configuration import PostTrainingConfig, choose, require

SAMPLING_KEYWORDS = ("min_new_tokens", "stop_strings", "stop_token_ids")
"""what `generation_kwargs` may hold besides the fields of the config"""


@dataclass
class OnPolicyConfig(PostTrainingConfig):
    """What every trainer that learns from its own samples shares."""

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
    """sampling temperature; the policy is scored at the same"""
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
    chat_template_kwargs: dict[str, Any] | None = field(default=None)
    """variables for the chat template"""
    beta: float = field(default=0.0)
    """weight of the KL to the reference; 0: no reference is kept"""
    reward_weights: list[float] | None = field(default=None)
    """weight of each reward function; None: 1 each"""
    reward_timeout: float | None = field(default=None)
    """seconds after which a reward function has no opinion of a batch; None: wait"""
    mask_truncated_completions: bool = field(default=False)
    """completions cut at the length limit teach nothing"""
    overlong_cache: int | None = field(default=None)
    """soft punishment: the last so many tokens before the limit cost up to 1; None: off"""
    dynamic_sampling: bool = field(default=False)
    """sample further prompts in place of groups whose rewards are all equal"""
    dynamic_sampling_max_rounds: int = field(default=3)
    """rounds of sampling per rollout at most; what is missing then stays idle"""
    sync_ref_model: bool = field(default=False)
    """move the reference towards the policy every `ref_model_sync_steps`"""
    ref_model_mixup_alpha: float = field(default=0.6)
    """share of the policy in the new reference"""
    ref_model_sync_steps: int = field(default=512)
    """optimizer steps between two moves"""
    padding_free: bool = field(default=True)
    """no padding, shared prompts computed once; False forces padded rows (same results, slower)"""
    pad_token: str | None = field(default=None)
    """padding token, where it is not the tokenizer's own"""
    save_rollouts: bool = field(default=True)
    """write each rollout's texts, rewards and advantages to `output_dir/rollouts/*.parquet`"""
    log_completions: bool = field(default=False)
    """print some completions with their rewards at each rollout"""
    num_completions_to_print: int | None = field(default=None)
    """how many; None: all"""
    use_vllm: bool = field(default=False)
    """sample with vLLM: not supported yet"""
    ignore_data_skip: bool = field(default=True)
    """must stay True: a resumed run takes up its rollouts itself"""

    def validate(self) -> None:
        super().validate()
        require(self, "use_vllm", not self.use_vllm, "vLLM is not supported yet; the local sampler needs no settings")
        require(self, "ignore_data_skip", self.ignore_data_skip, "the rollouts keep their own place; leave it True")
        for name in ("num_generations", "max_completion_length", "num_iterations", "dynamic_sampling_max_rounds",
                     "ref_model_sync_steps"):  # fmt: skip
            require(self, name, getattr(self, name) >= 1, "give a whole number >= 1")
        for name in ("num_generations_eval", "max_prompt_length", "steps_per_generation", "generation_batch_size",
                     "num_completions_to_print"):  # fmt: skip
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "give a whole number >= 1, or None")
        require(
            self, "temperature", self.temperature > 0, "give a number > 0: a policy that is greedy explores nothing"
        )
        require(self, "beta", self.beta >= 0, "give a weight >= 0")
        timeout, cache = self.reward_timeout, self.overlong_cache
        require(self, "reward_timeout", timeout is None or timeout > 0, "give seconds > 0, or None")
        fits = cache is None or 0 < cache <= self.max_completion_length
        require(self, "overlong_cache", fits, "give tokens in (0, max_completion_length], or None")
        unknown = set(self.generation_kwargs or {}) - set(SAMPLING_KEYWORDS)
        require(self, "generation_kwargs", not unknown, f"choose among {', '.join(SAMPLING_KEYWORDS)}")
        require(self, "ref_model_mixup_alpha", 0 < self.ref_model_mixup_alpha <= 1, "give a share in (0, 1]")
        require(self, "sync_ref_model", not self.sync_ref_model or self.beta > 0, "beta=0 keeps no reference to move")
        prints = self.num_completions_to_print is None or self.log_completions
        require(self, "num_completions_to_print", prints, "no effect without log_completions=True")

    def rollout_shape(self) -> tuple[int, int]:
        """`(micro-batches, completions)` of one rollout on this rank."""
        size, world = self.per_device_train_batch_size, self.world_size
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
        steps = steps or self.gradient_accumulation_steps
        if steps * size % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: must divide the completions of a rollout on each rank, "
                f"per_device_train_batch_size * steps_per_generation = {steps * size}"
            )
        return steps, steps * size


@dataclass
class GRPOConfig(OnPolicyConfig):
    """`TrainingArguments` and what group-relative policy optimisation adds."""

    loss_type: str = field(default="dapo")
    """how tokens are averaged and clipped: grpo, dapo, bnpo, dr_grpo, cispo, sapo"""
    epsilon: float = field(default=0.2)
    """lower clip range of the ratio"""
    epsilon_high: float | None = field(default=None)
    """upper clip range; None: `epsilon`. For cispo: the largest weight itself"""
    delta: float | None = field(default=None)
    """two-sided clipping: upper bound of the ratio where the advantage is negative"""
    importance_sampling_level: str = field(default="token")
    """ratio of each token, or of the sequence (GSPO)"""
    scale_rewards: str | bool = field(default="group")
    """divide advantages by the std of their group or of the batch, or not (none)"""
    advantage: str | None = field(default=None)
    """baseline by name, in place of the group's mean: leave_one_out, batch, group_then_batch, none, ..."""
    multi_objective_aggregation: str = field(default="sum_then_normalize")
    """several reward functions: sum_then_normalize, or normalize_then_sum (GDPO)"""
    kl_estimator: str = field(default="k3")
    """estimate of the KL to the reference: k1, k2, k3"""
    kl_placement: str = field(default="loss")
    """where the KL acts: loss, or reward (each completion's reward minus beta times its KL)"""
    use_bias_correction_kl: bool = field(default=False)
    """weigh the KL term by the importance ratio, which makes its gradient unbiased"""
    sapo_temperature_neg: float = field(default=1.05)
    """sapo: steepness of the gate where the advantage is negative"""
    sapo_temperature_pos: float = field(default=1.0)
    """sapo: steepness of the gate where it is positive"""
    top_entropy_quantile: float = field(default=1.0)
    """learn from this share of the tokens, those of the highest entropy"""
    entropy_coef: float = field(default=0.0)
    """weight of the entropy bonus"""
    off_policy_mask_threshold: float | None = field(default=None)
    """leave out bad completions that the policy has moved away from by more than this"""

    def validate(self) -> None:
        self.scale_rewards = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
        super().validate()
        choose(self, "loss_type", LOSS_TYPES)
        choose(self, "importance_sampling_level", ("token", "sequence", "sequence_token"))
        choose(self, "scale_rewards", ("group", "batch", "none"))
        choose(self, "advantage", (None, *ADVANTAGES))
        choose(self, "multi_objective_aggregation", REWARD_AGGREGATIONS)
        choose(self, "kl_estimator", ("k1", "k2", "k3"))
        choose(self, "kl_placement", ("loss", "reward"))
        cispo, sapo = self.loss_type == "cispo", self.loss_type == "sapo"
        high = self.epsilon_high
        require(self, "epsilon", self.epsilon > 0, "give a range > 0")
        require(self, "epsilon_high", high is None or high > (1 if cispo else 0), "give a number > 0 (cispo: > 1)")
        bound = self.delta
        clips = not (cispo or sapo)
        require(self, "delta", bound is None or clips, f"loss_type={self.loss_type!r} has no two-sided clipping")
        require(self, "delta", bound is None or bound > 1 + (high or self.epsilon), "must exceed 1 + epsilon_high")
        for name, default in (("sapo_temperature_neg", 1.05), ("sapo_temperature_pos", 1.0)):
            value = getattr(self, name)
            require(self, name, sapo or value == default, f"no effect with loss_type={self.loss_type!r}")
            require(self, name, value > 0, "give a steepness > 0")
        require(self, "scale_rewards", self.advantage is None or self.scale_rewards == "group",
                f"advantage={self.advantage!r} says how rewards are scaled; leave it out")  # fmt: skip
        least = 2 if (self.advantage or self.scale_rewards) in ("group", "leave_one_out") else 1
        require(self, "num_generations", self.num_generations >= least, "a group needs at least 2 completions")
        require(self, "top_entropy_quantile", 0 < self.top_entropy_quantile <= 1, "give a share in (0, 1]")
        in_loss = self.beta > 0 and self.kl_placement == "loss"
        corrected = self.use_bias_correction_kl
        require(self, "use_bias_correction_kl", in_loss or not corrected, "needs beta > 0 and kl_placement='loss'")
        unbiased = self.kl_estimator != "k1" or not in_loss or corrected
        require(
            self, "kl_estimator", unbiased, "k1 in the loss has no gradient; take k2 or k3, or place it in the reward"
        )


LOSS_TYPES = {
    "grpo": ("clip", "sequence"),
    "dapo": ("clip", "token"),
    "bnpo": ("clip", "token"),
    "dr_grpo": ("clip", "constant"),
    "cispo": ("cispo", "token"),
    "sapo": ("sapo", "sequence"),
}
"""name -> (clip rule, aggregation)"""


@dataclass
class RLOOConfig(OnPolicyConfig):
    """`TrainingArguments` and what REINFORCE leave-one-out adds: the KL acts in the reward, the ratio is the sequence's."""

    num_generations: int = field(default=2)
    """completions of each prompt"""
    beta: float = field(default=0.05)
    """weight of the KL to the reference, subtracted from the reward"""
    epsilon: float = field(default=0.2)
    """lower clip range of the ratio"""
    epsilon_high: float | None = field(default=None)
    """upper clip range; None: `epsilon`"""
    normalize_advantages: bool = field(default=False)
    """whiten the advantages over the batch"""
    reward_clip_range: tuple[float, float] | None = field(default=None)
    """bounds of each completion's reward, before the KL"""

    def validate(self) -> None:
        super().validate()
        require(self, "num_generations", self.num_generations >= 2, "leave-one-out needs at least 2 completions")
        require(self, "epsilon", self.epsilon > 0, "give a range > 0")
        require(self, "epsilon_high", self.epsilon_high is None or self.epsilon_high > 0, "give a range > 0, or None")
        bounds = self.reward_clip_range
        require(self, "reward_clip_range", bounds is None or bounds[0] < bounds[1], "give (low, high) with low < high")
