"""Trainers that learn from rollouts of their own policy: prompts -> rollout -> experience -> micro-batches -> loss."""

from __future__ import annotations

import logging
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback, TrainingArguments

from trl.data.encode import Limits
from trl.data.microbatches import collated, lengths_of, unasked_budget
from trl.data.pictures import reader_of
from trl.data.prompt_rows import PromptsJob
from trl.data.records import Batch, PackedBatch, Rollout
from trl.data.tokenize import tokenize
from trl.environment.factories import Factory
from trl.generation import make_sampler
from trl.generation.generate_kwargs import OUTPUTS, unknown_to_samplers
from trl.generation.local import MOST_ROWS, LocalSampler
from trl.generation.sampler import Sampler, SamplingParams, check_sampler, is_exact
from trl.generation.stopping import end_tokens
from trl.generation.vllm.client import server_urls
from trl.generation.vllm.engine import EngineError
from trl.generation.vllm.sync import WAYS, as_one
from trl.import_utils import VLLM, is_vllm_available, pip_install
from trl.losses.loss_sum import Aggregation, LossSum, counted
from trl.models.forward import rows_padded
from trl.models.memory import Load
from trl.models.precision import dtype_of, frozen_dtype, is_quantized, precision_of
from trl.models.prepare import context_length, embedding_rows, load_model
from trl.models.reference import Reference
from trl.models.scoring import Scores, score
from trl.models.sharded import gathered, in_step, prepare_frozen, say_gathering, shards_weights
from trl.models.unwrap import below_peft, is_encoder_decoder, reads_pictures, runs_in_step
from trl.rewards.named import RewardSource, reward_panel
from trl.rewards.reward_model import RewardModel
from trl.rollout import report as rollout_report
from trl.rollout import reward_check
from trl.rollout.collector import Ahead, Collected, Collector
from trl.rollout.experience import (
    Division,
    Experience,
    PolicyBatch,
    RolloutLoader,
    RolloutShape,
    RolloutState,
    divided_anew,
)
from trl.rollout.measure import check_first_ratio, in_pieces, means_of
from trl.rollout.prompts import PromptStream, part_of, places_of
from trl.rollout.rewards import OwnRewards, Rewards, RolloutRewards
from trl.rollout.source import (
    EnvironmentSource,
    FunctionSource,
    SamplerSource,
    Seed,
    Source,
    calls_of,
    check_names,
    close_objects,
    environment_for_policy,
    make_environment,
    names_of,
    reward_names,
    rows_without_prompts,
    says_prompts,
    with_own_prompts,
)
from trl.trainer import checkpoints
from trl.trainer.checkpoints import processes_text
from trl.trainer.configuration import PostTrainingConfig, Setting, as_config, processing_class_of, require
from trl.trainer.engines import engine_sampler
from trl.trainer.metrics import check_new_names
from trl.trainer.objective import ObjectiveTrainer, pieces_of
from trl.trainer.preparation import prepare_model, prepare_tokenizer
from trl.trainer.references import SyncReference
from trl.trainer.settings import ROLLOUTS, accepted, default_of, rename

logger = logging.getLogger(__name__)

SAMPLING_KEYWORDS = ("min_new_tokens", "stop_strings", "stop_token_ids")
"""what `generation_kwargs` may hold besides the fields of the config"""
SAMPLING_FIELDS = {
    "max_new_tokens": "max_completion_length", "temperature": "temperature", "top_p": "top_p", "top_k": "top_k",
    "min_p": "min_p", "repetition_penalty": "repetition_penalty",
}  # fmt: skip
"""keywords of `generate` that are fields of the config"""
ENGINE = (
    "vllm_mode", "vllm_weight_sync", "vllm_sync_folder", "vllm_structured_outputs_regex", "vllm_verify_every",
    "vllm_verify_tolerance", "vllm_on_mismatch",
)  # fmt: skip
"""settings of vLLM, wherever it runs"""
SERVER = (
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_request_timeout",
    "vllm_group_port",
)  # fmt: skip
"""settings of vLLM's servers; the first three name one"""
COLOCATED = (
    "vllm_model_impl", "vllm_dtype", "vllm_gpu_memory_utilization", "vllm_max_model_length",
    "vllm_tensor_parallel_size", "vllm_enable_prefix_caching", "vllm_enable_sleep_mode",
)  # fmt: skip
"""settings of vLLM in this process"""


class _OfLength(Protocol):
    """A config that limits prompt and completion together."""

    max_length: int | None
    max_completion_length: int
    max_prompt_length: int | None


def limit_whole(config: _OfLength) -> None:
    """Give prompts the room that `max_length` leaves beside the longest completion."""
    if config.max_length is not None:
        room = config.max_length - config.max_completion_length
        require(config, "max_length", room > 0, f"give more than max_completion_length={config.max_completion_length}")
        config.max_prompt_length = min(room, config.max_prompt_length or room)


@dataclass
class RolloutConfig(PostTrainingConfig):
    """`TrainingArguments` and the settings of sampling: prompts, filters, how often each rollout is learned from."""

    learning_rate: float = field(default=1e-6)
    """initial learning rate"""
    disable_dropout: bool = field(default=True)
    """train without dropout; with it the first update's ratio is not 1"""
    num_generations: int = field(default=8)
    """completions of each prompt"""
    num_generations_eval: int | None = field(default=None)
    """completions of each prompt in evaluation; None: as `num_generations`"""
    max_prompt_length: int | None = field(default=None)
    """longest prompt in tokens, longer ones lose their start; None: never cut"""
    max_completion_length: int = field(default=512)
    """longest completion in tokens"""
    steps_per_generation: int | None = field(default=None)
    """micro-batches of one rollout; None: `gradient_accumulation_steps`, so a rollout is one optimizer step"""
    generation_batch_size: int | None = field(default=None)
    """completions of one rollout over all ranks; set this or `steps_per_generation`"""
    num_iterations: int = field(default=1)
    """passes over each rollout"""
    max_staleness: int = field(default=0)
    """rollouts that are drawn ahead: rollout n by the weights from which the updates on rollout n - max_staleness
    start. An engine with weights of its own samples them while the trainer learns; 0: each by the weights of now"""
    sync_in_flight: bool = field(default=False)
    """give the engine new weights while it samples, and let it go on with them: nobody waits, but a completion may be
    sampled by several weights, and two runs differ"""
    shuffle_dataset: bool = field(default=True)
    """draw the prompts in random order; those of an `IterableDataset` come in its own"""
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
    """further sampling settings: min_new_tokens, stop_strings, stop_token_ids; and keywords of `generate`"""
    max_tool_calling_iterations: int | None = field(default=None)
    """rounds of tool calls in a conversation; None: as many as `max_completion_length` has room for"""
    chat_template_kwargs: dict[str, Any] | None = field(default=None)
    """variables for the chat template"""
    padding_free: bool = field(default=True)
    """no padding, shared prompts computed once; False forces padded rows (same results, slower)"""
    pad_token: str | None = field(default=None)
    """padding token, if it is another one than the tokenizer's"""
    save_rollouts: bool = field(default=True)
    """write each rollout's texts, rewards and advantages to `output_dir/rollouts/*.parquet`"""
    log_completions: bool = field(default=False)
    """print some completions at each rollout"""
    num_completions_to_print: int | None = field(default=None)
    """how many; None: all"""
    log_unique_prompts: bool = field(default=False)
    """print one completion of each prompt"""
    gather: str = field(default="model")
    """FSDP2, ZeRO-3: how sampling gets weights that ranks hold in parts. model: all at once, for each round of
    sampling; layers: layer by layer, with all ranks in step, which needs less memory and is far slower"""
    sampling_max_rows: int | None = field(default=None)
    """completions that the local sampler has in progress at a time, which bounds the memory for keys and values; None:
    128, and on a GPU as many as it has memory for, up to 1,024"""
    use_vllm: bool = field(default=False)
    """sample with vLLM (docs/vllm.md): an engine with weights of its own, which follow the policy's"""
    vllm_mode: str = field(default="colocate")
    """colocate: vLLM in this process, beside the trainer; server: a server that `trl vllm-serve` started"""
    vllm_server_base_url: str | None = field(default=None)
    """address of the server, such as http://127.0.0.1:8000; several with commas share the prompts. None: host and port
    """
    vllm_server_host: str = field(default="0.0.0.0")
    """host of the server; 0.0.0.0: this machine"""
    vllm_server_port: int = field(default=8000)
    """port of the server"""
    vllm_server_timeout: float = field(default=240.0)
    """seconds to wait for a server that does not answer: at the start, and where it went away in the midst"""
    vllm_request_timeout: float = field(default=1200.0)
    """seconds for one answer of the server, after which it is asked again"""
    vllm_weight_sync: str = field(default="auto")
    """how vLLM gets the weights: adapter (LoRA), nccl, ipc, memory, folder; auto: an adapter where that is all that is
    trained, else whole weights: nccl from a GPU to a server, a folder from a CPU, by hand in this process (memory)"""
    vllm_sync_folder: str | None = field(default=None)
    """where adapters and whole weights lie on their way, which the server must see too; None: memory, or the disk"""
    vllm_verify_every: int = field(default=1)
    """after every so many pushes of weights, score some of vLLM's completions to find out whether it has them; 0: never
    """
    vllm_verify_tolerance: float | None = field(default=None)
    """how far vLLM's log-probabilities may be from the trainer's, on average; None: as the precisions allow"""
    vllm_on_mismatch: str = field(default="stop")
    """where they are further: stop the run, or go on with the local sampler (local)"""
    vllm_group_port: int = field(default=51216)
    """port of the group in which weights go to a server over NCCL"""
    vllm_structured_outputs_regex: str | None = field(default=None)
    """a pattern that completions follow; the policy then learns from another distribution than its own"""
    vllm_guided_decoding_regex: str | None = accepted("vllm_guided_decoding_regex")
    vllm_model_impl: str = field(default="vllm")
    """colocate: vLLM's own code of the model (vllm), or that of transformers (transformers), or auto"""
    vllm_dtype: str | None = field(default=None)
    """colocate: precision of vLLM's weights; None: the policy's"""
    vllm_gpu_memory_utilization: float = field(default=0.3)
    """colocate: share of the GPU's memory that vLLM takes"""
    vllm_max_model_length: int | None = field(default=None)
    """colocate: longest prompt and completion together; None: the model's context"""
    vllm_max_model_len: int | None = accepted("vllm_max_model_len")
    vllm_tensor_parallel_size: int = field(default=1)
    """colocate: GPUs that share vLLM's weights, with one process that trains"""
    vllm_enable_prefix_caching: bool | None = field(default=None)
    """colocate: keep what prompts have in common; None: vLLM decides"""
    vllm_enable_sleep_mode: bool = field(default=False)
    """colocate: vLLM gives its memory back while the policy is trained"""
    vllm_device: str | None = accepted("vllm_device")
    vllm_importance_sampling_correction: bool = accepted("vllm_importance_sampling_correction", True)
    vllm_importance_sampling_mode: str = accepted("vllm_importance_sampling_mode", "sequence_mask")
    vllm_importance_sampling_clip_max: float | None = accepted("vllm_importance_sampling_clip_max", 3.0)
    vllm_importance_sampling_clip_min: float | None = accepted("vllm_importance_sampling_clip_min")
    vllm_importance_sampling_cap: float | None = accepted("vllm_importance_sampling_cap")
    ds3_gather_for_generation: bool = field(default=True)
    """False: gather="layers", by its name for DeepSpeed ZeRO-3"""
    cache_implementation: str | None = accepted("cache_implementation")
    use_transformers_paged: bool = accepted("use_transformers_paged", False)
    use_transformers_continuous_batching: bool = accepted("use_transformers_continuous_batching", False)
    transformers_continuous_batching_config: dict[str, Any] | str | None = accepted(  # noqa: RUF009
        "transformers_continuous_batching_config"
    )
    cast_lm_head_to_fp32: bool = accepted("cast_lm_head_to_fp32", False)
    log_multimodal: bool = accepted("log_multimodal", True)
    log_completions_hub_repo: str | None = accepted("log_completions_hub_repo")
    log_completions_steps: int | None = accepted("log_completions_steps")

    wandb_log_unique_prompts: bool | None = accepted("wandb_log_unique_prompts")

    def translate(self) -> None:
        super().translate()
        rename(self, "wandb_log_unique_prompts", "log_unique_prompts")
        self.wandb_log_unique_prompts = None
        self._translate_generation()
        rename(self, "vllm_guided_decoding_regex", "vllm_structured_outputs_regex")
        rename(self, "vllm_max_model_len", "vllm_max_model_length")
        self.vllm_guided_decoding_regex = self.vllm_max_model_len = None
        if self.use_vllm:
            self._choose_vllm()

    def _translate_generation(self) -> None:
        """Keywords of `generate` in `generation_kwargs` as fields of the config and as the sampler's own."""
        asked = dict(self.generation_kwargs or {})
        defaults = {entry.name: default_of(entry) for entry in fields(self)}
        for keyword, name in SAMPLING_FIELDS.items():
            value = asked.pop(keyword, None)
            if value is not None and value != getattr(self, name):
                way_out = f"generation_kwargs has {keyword}={value!r}; say it once"
                require(self, name, getattr(self, name) == defaults[name], way_out)
                setattr(self, name, value)
        greedy = asked.pop("do_sample", True) is False
        require(self, "generation_kwargs", not greedy, "do_sample=False explores nothing; leave it out")
        ends = asked.pop("eos_token_id", None)
        if ends is not None:
            asked.setdefault("stop_token_ids", ends if isinstance(ends, list | tuple) else [ends])
        if isinstance(asked.get("stop_strings"), str):
            asked["stop_strings"] = [asked["stop_strings"]]
        own = {name: value for name, value in asked.items() if name in SAMPLING_KEYWORDS}
        unknown = unknown_to_samplers({name: value for name, value in asked.items() if name not in own})
        way_out = f"no sampler follows {', '.join(unknown)}; choose among do_sample, eos_token_id, "
        require(self, "generation_kwargs", not unknown, way_out + ", ".join([*SAMPLING_FIELDS, *SAMPLING_KEYWORDS]))
        self.generation_kwargs = own or None

    def _choose_vllm(self) -> None:
        """Where vLLM runs; the local sampler where it is to run in this process and is not installed."""
        require(self, "vllm_mode", self.vllm_mode in ("colocate", "server"), "choose 'colocate' or 'server'")
        defaults = {entry.name: default_of(entry) for entry in fields(self) if entry.name.startswith("vllm_")}
        named = [name for name in SERVER[:3] if getattr(self, name) != defaults[name]]
        if named and self.vllm_mode == "colocate":
            logger.warning("%s=%r names a server: vllm_mode='server'", named[0], getattr(self, named[0]))
            self.vllm_mode = "server"
        if self.vllm_mode == "server" or is_vllm_available():
            return
        way_out = f"the local sampler follows no pattern: {pip_install(VLLM)}, or leave it out"
        require(self, "vllm_structured_outputs_regex", self.vllm_structured_outputs_regex is None, way_out)
        warnings.warn(
            "use_vllm=True: vLLM is not installed; the local sampler draws the completions, from the same distribution "
            f"({pip_install(VLLM)}, or vllm_mode='server')"
        )
        self.__dict__.update(defaults, use_vllm=False)

    def vllm_urls(self) -> tuple[str, ...]:
        """The servers of vLLM that are named."""
        given = self.vllm_server_base_url or f"{self.vllm_server_host}:{self.vllm_server_port}"
        return server_urls(given)

    def unused(self) -> dict[str, str]:
        found = super().unused()
        if not self.use_vllm:
            found |= dict.fromkeys((*ENGINE, *SERVER, *COLOCATED), "has no effect without use_vllm=True")
        elif self.vllm_mode == "server":
            found |= dict.fromkeys(COLOCATED, "has no effect on a server: say it to `trl vllm-serve`")
        else:
            found |= dict.fromkeys(SERVER, "has no effect with vllm_mode='colocate'")
        if self.use_vllm:
            found["sampling_max_rows"] = "has no effect with use_vllm=True: vLLM has a limit of its own, max_num_seqs"
        return found

    @property
    def smooths_labels(self) -> bool:
        return False

    in_training = False  # a trainer's own copy of the config; no field

    def settle(self) -> None:
        super().settle()
        sequential = self.train_sampling_strategy == "sequential"
        self.shuffle_dataset = self.shuffle_dataset and not sequential
        # of evaluation rows too, which have no lengths, and of whose batches no metrics are computed
        self.__dict__.update(train_sampling_strategy="random", include_for_metrics=[])

    @classmethod
    def exceptions(cls) -> dict[str, str]:
        return ROLLOUTS

    def validate(self) -> None:
        super().validate()
        way_out = "a resumed run goes on where it stopped, in the midst of a rollout even; leave it False"
        require(self, "ignore_data_skip", not self.ignore_data_skip or self.in_training, way_out)
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
        most = self.sampling_max_rows
        require(self, "sampling_max_rows", most is None or most >= 1, "give 1 or more, or None")
        for name in ("vllm_server_timeout", "vllm_request_timeout", "vllm_tensor_parallel_size"):
            require(self, name, getattr(self, name) > 0, "give a number > 0")
        share = self.vllm_gpu_memory_utilization
        require(self, "vllm_gpu_memory_utilization", 0 < share <= 1, "give a share of the memory in (0, 1]")
        require(self, "vllm_weight_sync", self.vllm_weight_sync in WAYS, f"choose one of {', '.join(WAYS)}")
        require(self, "vllm_verify_every", self.vllm_verify_every >= 0, "give a number of pushes, or 0 for never")
        require(self, "vllm_on_mismatch", self.vllm_on_mismatch in ("stop", "local"), "choose 'stop' or 'local'")
        limit = self.vllm_verify_tolerance
        require(self, "vllm_verify_tolerance", limit is None or limit > 0, "give nats > 0, or None")
        if self.use_vllm and self.vllm_mode == "server":
            self.vllm_urls()
        require(self, "gather", self.gather in ("model", "layers"), "choose 'model' or 'layers'")
        require(self, "min_p", self.min_p is None or 0 <= self.min_p <= 1, "give a fraction in [0, 1], or None")
        require(self, "repetition_penalty", self.repetition_penalty > 0, "give a number > 0; 1 is off")
        require(self, "max_staleness", self.max_staleness >= 0, "give a whole number >= 0; 0 is in step")
        way_out = "no effect with max_staleness=0, where nothing is sampled while weights change"
        require(self, "sync_in_flight", not self.sync_in_flight or self.max_staleness > 0, way_out)
        for name in ("num_completions_to_print", "log_unique_prompts"):
            require(
                self, name, self.log_completions or not getattr(self, name), "no effect without log_completions=True"
            )

    @property
    def gathers_layers(self) -> bool:
        """Whether sampling is to gather sharded weights layer by layer."""
        return self.gather == "layers" or not self.ds3_gather_for_generation

    def measures_function(self) -> bool:
        """Whether log-probabilities that a `rollout_func` does not know are those of a pass of the policy."""
        return True

    def keeps_words(self, exact: bool) -> bool:
        """Whether a token is learned as chosen from the words that the filters left, where its sampler says them."""
        return False

    def keeps_experts(self) -> bool:
        """Whether a mixture's experts are those that an engine took, where it says them."""
        return False

    @property
    def reshapes(self) -> bool:
        """Whether completions are drawn from another distribution than the policy at `temperature`."""
        filters = (self.top_k or 0, self.top_p, self.min_p or 0.0, self.repetition_penalty)
        return filters != (0, 1.0, 0.0, 1.0) or bool((self.generation_kwargs or {}).get("min_new_tokens"))

    def token_settings(self) -> dict[str, str | None]:
        return {"pad_token": self.pad_token}

    @property
    def pads_rows(self) -> bool:
        return not self.padding_free or self.neftune_noise_alpha is not None

    def refill_rounds(self) -> int:
        """Rounds of sampling for each rollout at most."""
        return 1

    def how_rewards_are_checked(self) -> str:
        """Before training: yes, no, or all."""
        return "no"

    def place_in_data(self) -> dict[str, Any]:
        """Nothing: prompts are counted, and a half-used rollout is compared with the settings that made it."""
        return {}

    def rollout_shape(self) -> RolloutShape:
        """How a rollout is divided on each rank; ValueError where the batch sizes do not fit together."""
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
        whole = size * world * steps
        if whole % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations}: must divide the completions of a rollout, "
                f"per_device_train_batch_size * processes * steps_per_generation = {whole}; {divisors(whole)} do"
            )
        return RolloutShape(size, self.num_generations, self.num_iterations, steps)

    def rows_of_step(self, shape: RolloutShape) -> int:
        """Completions that an optimizer step learns from on each rank."""
        return shape.per_device_train_batch_size * min(self.gradient_accumulation_steps, shape.steps_per_generation)


def _listed(given: Any) -> list[Any]:
    """One or several, or none, as a list."""
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _identity(function: Any) -> Any:
    """What two loads of one function have in common: where its code stands; of anything else itself."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function if isinstance(function, str) else id(function)
    return code.co_filename, code.co_firstlineno, code.co_name, getattr(function, "__closure__", None) and id(function)


def divisors(number: int) -> str:
    """The sizes of groups that divide a number of completions, for an error."""
    return ", ".join(str(size) for size in range(2, number + 1) if number % size == 0) or "1"


@dataclass
class RewardedConfig(RolloutConfig):
    """`RolloutConfig` and the settings of reward functions."""

    reward_weights: list[float] | None = field(default=None)
    """weight of each reward function; None: 1 each"""
    reward_timeout: float | str | list[float | None] | None = field(default=None)
    """seconds after which a reward function has no opinion of a batch, for all or one each; None: wait"""
    check_rewards: Literal["yes", "no", "all"] = field(default="no")
    """before training, try the reward functions on trivial answers (empty, constant, echoed, very long, repeated) and
    on the model's own samples, and say where a trivial one earns more: yes, no, or all, which also calls functions that
    ask other machines. They are called in a process of their own, so what they remember stays as it was"""
    overlong_cache: int | None = field(default=None)
    """soft punishment for the last so many tokens before the limit, from 0 up to 1; None: off"""
    dynamic_sampling: bool = field(default=False)
    """sample further prompts in place of groups whose rewards are all equal"""
    dynamic_sampling_max_rounds: int = field(default=3)
    """rounds of sampling for each rollout at most; groups of equal rewards that are left then stay"""

    def json_fields(self) -> tuple[str, ...]:
        return (*super().json_fields(), "reward_timeout")

    def validate(self) -> None:
        super().validate()
        rounds, cache = self.dynamic_sampling_max_rounds, self.overlong_cache
        require(self, "dynamic_sampling_max_rounds", 1 <= rounds <= 64, "give a whole number from 1 to 64")
        require(self, "dynamic_sampling", not self.dynamic_sampling or rounds > 1, "has no effect with 1 round")
        weights = self.reward_weights or []
        listed = isinstance(weights, list | tuple) and all(isinstance(weight, Real) for weight in weights)
        require(self, "reward_weights", listed, "give a list of numbers, one for each reward function")
        require(self, "reward_weights", all(map(math.isfinite, weights)), "give finite numbers")
        timeouts: list[Any] = self.reward_timeout if isinstance(self.reward_timeout, list) else [self.reward_timeout]
        fits = all(seconds is None or seconds > 0 for seconds in timeouts)
        require(self, "reward_timeout", fits, "give seconds > 0, or None")
        asked: Any = self.check_rewards
        if isinstance(asked, bool):
            self.check_rewards = "yes" if asked else "no"
        require(self, "check_rewards", self.check_rewards in ("yes", "no", "all"), "choose yes, no or all")
        fits = cache is None or 0 < cache <= self.max_completion_length
        require(self, "overlong_cache", fits, "give tokens in (0, max_completion_length], or None")

    def refill_rounds(self) -> int:
        return self.dynamic_sampling_max_rounds if self.dynamic_sampling else 1

    def how_rewards_are_checked(self) -> str:
        return self.check_rewards


DECIDED = (*SAMPLING_FIELDS, "do_sample", "eos_token_id", "max_length", "min_length", *OUTPUTS)
"""what the config of a trainer decides, whatever the model's `generation_config` says; and what says nothing here"""


def with_models_own(given: Mapping[str, Any] | None, model: nn.Module) -> dict[str, Any] | None:
    """`generation_kwargs` with what the model's `generation_config` says of completions and the config does not.

    ValueError for what no sampler follows.
    """
    own = getattr(below_peft(model), "generation_config", None)
    said = {name: value for name, value in (vars(own) if own is not None else {}).items() if name[0] != "_"}
    unknown = unknown_to_samplers({name: value for name, value in said.items() if name not in DECIDED})
    if unknown:
        raise ValueError(
            f"model.generation_config.{unknown[0]}={said[unknown[0]]!r}: no sampler follows it, so completions would "
            "be drawn otherwise than by `generate`; set it to None"
        )
    taken = {name: said[name] for name in ("min_new_tokens", "stop_strings") if said.get(name)}
    if isinstance(taken.get("stop_strings"), str):
        taken["stop_strings"] = [taken["stop_strings"]]
    return {**taken, **(given or {})} or None


def _own_prompts(environment: Any, config: RolloutConfig) -> Any:
    """Rows without prompts, for an environment that says them."""
    names = names_of(environment)
    if names is None:
        raise ValueError(
            "train_dataset: on-policy training needs prompts; give rows with a column `prompt`, or an "
            "`environment_factory` whose `reset()` says them"
        )
    way_out = "without a train_dataset the environment says the prompts, which never end; give a number of steps"
    require(config, "max_steps", config.max_steps > 0, way_out)
    return rows_without_prompts(names, config.seed if config.data_seed is None else config.data_seed)


UNREAD = {
    "data_collator": "rollouts are packed by the trainer",
    "compute_metrics": "a reward function can log with its argument `log_metric`",
    "preprocess_logits_for_metrics": "no metrics are computed of logits",
    "formatting_func": "give rows with `prompt` and `completion`, or `messages`",
}
"""arguments that trainers of other releases have -> what is done here"""


def without_unread(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that no trainer here reads; ValueError where one of them was given a value."""
    for name, text in UNREAD.items():
        if given.get(name) is not None:
            raise ValueError(f"{name}: {text}; leave it out")
    return {name: value for name, value in given.items() if name not in UNREAD}


def with_prompt_ids(dataset: Any) -> Any:
    """A data set of tokenised prompts in `input_ids`, as releases 0.9-0.16 took it, with them as `prompt_ids`."""
    if isinstance(dataset, list):
        plain = all(isinstance(row, Mapping) and "input_ids" in row and "prompt" not in row for row in dataset)
        return [{**row, "prompt_ids": row["input_ids"]} for row in dataset] if plain else dataset
    names = getattr(dataset, "column_names", None)
    if not isinstance(names, list) or "input_ids" not in names or {"prompt", "prompt_ids"} & set(names):
        return dataset
    return dataset.rename_column("input_ids", "prompt_ids")


RolloutFunction = Callable[..., Rollout | Mapping[str, Any]]
"""`(a row of the data set per completion, trainer) -> Rollout`, or `(prompts, trainer) -> dict of lists`, for
environments and other engines; see `calls_of` and `rollout_of`"""


class RolloutTrainer(ObjectiveTrainer):
    """A `Trainer` whose data are its own rollouts; callbacks, trackers and checkpoints work as users know them.

    An algorithm says what to learn from a rollout (`experience`) and the loss of a micro-batch (`policy_objective`).
    """

    config_class: type[RolloutConfig]
    aggregation: Aggregation = "token"
    needs_rewards = True
    _said_gathering = False
    _draws = False
    """whether the collector and the loader are there"""
    _before_first_update = True
    _steps_begun = 0
    """optimizer steps since the trainer was made, whatever its runs were"""
    _ratio_is_one_at: int | None = None
    """number of the optimizer step that must start at ratio 1"""
    _sampled_apart = False
    """whether what the optimizer step at hand learns was sampled by an engine, or by older weights"""
    _is_stale = False
    """whether the rollout at hand was sampled by older weights than those from which its updates started"""
    _lost: EngineError | None = None
    """why the run ends before its end"""
    _first_step = 0
    """optimizer steps before this run; -1 until its first one"""
    _followed = -1
    """number of the weights that an engine was given last"""
    _moved = 0
    """what is added to the number of an optimizer step, so that other weights have another number"""
    _replaced = False
    """whether the weights may be others than an optimizer step left"""
    temperature, top_p, top_k, min_p, repetition_penalty = (Setting() for _ in range(5))
    max_completion_length, reward_weights = Setting(), Setting()
    num_generations = Setting(fixed="rollouts are divided by it")

    def __init__(
        self,
        model: nn.Module | str,
        reward_funcs: RewardSource | Sequence[RewardSource] | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        quantization_config: Any = None,
        tokenizer: Any = None,
        rollout_func: RolloutFunction | None = None,
        environment: Any = None,
        environment_factory: Factory | Mapping[str, Factory] | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        sampler: Sampler | None = None,
        judge_funcs: RewardSource | Sequence[RewardSource] | None = None,
    ):
        config = as_config(args, self.config_class)
        check_sampler(sampler)
        if sampler is not None and config.use_vllm:
            raise ValueError("sampler: use_vllm=True makes one too; give one of them")
        shape = config.rollout_shape()
        environment = make_environment(
            environment,
            tools,
            environment_factory,
            max_iterations=config.max_tool_calling_iterations,
            template_kwargs=config.chat_template_kwargs,
        )
        if train_dataset is None:
            train_dataset = _own_prompts(environment, config)
        if environment is not None and rollout_func is not None:
            raise ValueError("rollout_func and an environment both make the rollouts: give one of them")
        if self.needs_rewards and reward_funcs is None and rollout_func is None and environment is None:
            raise ValueError("reward_funcs: give reward functions, or a `rollout_func` whose rollouts have rewards")
        if isinstance(model, str) and tokenizer is None and processing_class is None:
            tokenizer = model
        tokenizer = processing_class_of(processing_class, tokenizer)
        model, tokenizer = self._ready_model(model, tokenizer, config, peft_config, quantization_config)
        super().__init__(
            model=model,
            args=config,
            data_collator=lambda rows: Batch(rows=list(rows)),
            rows=partial(self._tokenised, self.row_job(tokenizer, config, model), environment, config.dataset_num_proc),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._check_sharding()
        self.args.generation_kwargs = with_models_own(self.args.generation_kwargs, self.model)
        self._reads_pictures = reader_of(tokenizer) is not None
        self.sampler = self._made_sampler(tokenizer) if sampler is None else sampler
        self.environment = None if environment is None else self._ready(environment, reward_funcs)
        self.rollout_func = rollout_func
        self.source = self.make_source()
        self._take_rewards(reward_funcs, reward_processing_classes, judge_funcs)
        self.reference: Reference | None = None
        self.collector = self._collector(shape)
        self.ahead = self._ahead()
        self.rollouts = self._loader(shape)
        self._draws = True

    def _ready_model(
        self, model: nn.Module | str, tokenizer: Any, config: RolloutConfig, peft_config: Any, quantization: Any
    ) -> tuple[nn.Module, Any]:
        """The model, loaded where it is given by name, and its tokenizer, both ready to be trained."""
        if isinstance(model, str):
            keywords, quantization = config.loading_keywords(quantization), None
            model = load_model(model, AutoModelForCausalLM, keywords, whole=peft_config is None)
        tokenizer = prepare_tokenizer(tokenizer, model, config)
        model = prepare_model(
            model,
            config,
            tokenizer,
            peft_config,
            auto_class=AutoModelForCausalLM,
            owner=type(self).__name__,
            dropout=not config.disable_dropout,
            init_kwargs={},
            quantization_config=quantization,
        )
        return model, tokenizer

    def _tokenised(self, job: PromptsJob, environment: Any, processes: int | None, dataset: Any, name: str) -> Any:
        """The rows of a data set as prompts are drawn of them."""
        dataset = self.with_prompt(dataset, name)
        check_names(environment, dataset, name)
        if says_prompts(environment, dataset, name):
            return dataset
        return tokenize(dataset, job, name=name, num_proc=processes)[0]

    def _take_rewards(self, functions: Any, tokenizers: Any, judges: Any) -> None:
        """What judges the rollouts: functions that are learned from, and held-out judges beside them."""
        self.rewards = self._rewards(functions, tokenizers) if self.needs_rewards else None
        self._reward_tokenizers, self._reward_funcs, self._judge_funcs = tokenizers, functions, judges
        rewarding = set(map(_identity, _listed(functions)))
        both = [each for each in _listed(judges) if _identity(each) in rewarding]
        if both and self.is_world_process_zero():
            logger.warning(
                "judge_funcs: %s is among the reward_funcs too: it is learned from, so it is no held-out opinion of "
                "what is learned; give another judge", getattr(both[0], "__name__", both[0]),
            )  # fmt: skip

    def _made_sampler(self, tokenizer: Any) -> Sampler:
        """vLLM where the config says so, else the local sampler."""
        if self.args.use_vllm:
            return engine_sampler(
                self.args, self.model, tokenizer, self._says_of, self._precision, lambda: self._local_sampler(tokenizer)
            )
        return self._local_sampler(tokenizer)

    def _says_of(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """The policy's log-probabilities of completions, at the sampling temperature. Collective on sharded weights."""
        masks = [[1] * len(ids) for ids in completions]
        with torch.no_grad():
            return self.logprobs_of(Rollout(prompts, completions, [], masks))

    def _local_sampler(self, tokenizer: Any) -> Sampler:
        # between 4-bit layers an adapter's float32 reaches a head in bfloat16, which autocast alone joins
        with in_step(self.model), self.accelerator.autocast() if is_quantized(self.model) else nullcontext():
            return make_sampler(self.model, tokenizer, max_rows=self.args.sampling_max_rows)

    def follow(self) -> None:
        """Give a sampler with weights of its own the policy's of now, once for each optimizer step. Collective.

        What it samples ahead has ended before.
        """
        self._rest()
        self._follow()

    def _follow(self) -> None:
        if not hasattr(self.sampler, "follow"):
            return
        step = int(self.state.global_step)
        if self._replaced:  # by a checkpoint, or by hand, between two runs
            self._moved, self._replaced = max(0, self._followed + 1 - step), False
        self._followed = step + self._moved
        before = is_exact(self.sampler)
        self.sampler.follow(self._followed)
        if is_exact(self.sampler) != before:  # the local sampler goes on in its place
            self.source = self.collector.source = self.make_source()
            self.collector.worker = None  # it samples the policy itself, in the thread that trains it

    def _ready(self, environment: Any, reward_funcs: Any) -> Any:
        """The environment with what it needs to play; ValueError for arguments that do not go together."""
        return environment_for_policy(
            environment,
            self.tokenizer,
            self._ends(),
            reward_funcs=reward_funcs,
            needs_rewards=self.needs_rewards,
            max_prompt_length=self.args.max_prompt_length,
        )

    @staticmethod
    def row_job(tokenizer: Any, config: RolloutConfig, model: nn.Module) -> PromptsJob:
        return PromptsJob(
            tokenizer=tokenizer,
            limits=Limits(max_prompt_length=config.max_prompt_length, truncation_mode="keep_end"),
            template_kwargs=config.chat_template_kwargs,
            context_length=context_length(model),
            embeddings=embedding_rows(model),
            ends=end_tokens(model, tokenizer),
        )

    def with_prompt(self, dataset: Any, name: str) -> Any:
        """The data set with the columns that this algorithm reads."""
        return dataset

    def other_train_rows(self) -> None:
        """Draw from the new rows, from their start; what is left of a rollout of the old ones is not learned."""
        if not self._draws:
            return
        made = self.rollouts.state.rollouts
        self._forget_waiting()
        self.collector.prompts = self._prompts()
        self.rollouts = self._loader(self.args.rollout_shape())
        self.rollouts.state.rollouts = made

    def _prompts(self) -> PromptStream:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PromptStream(self.train_dataset, seed, self.args.shuffle_dataset)

    @property
    def ref_model(self) -> nn.Module | None:
        """The reference, if it is a separate model; None without one, or if it is the policy without its adapter."""
        return None if self.reference is None else self.reference.frozen

    @property
    def reward_funcs(self) -> list[Any]:
        """The reward functions as they were given; other ones judge from the next rollout on."""
        return _listed(self._reward_funcs)

    @reward_funcs.setter
    def reward_funcs(self, functions: RewardSource | Sequence[RewardSource]) -> None:
        self.rewards = self._rewards(functions, self._reward_tokenizers)
        self._reward_funcs, self.collector.rewards = functions, self.rewards

    @property
    def reward_processing_classes(self) -> list[Any]:
        """The tokenizer of each reward function that is a model, None for the others."""
        panel = None if self.rewards is None else self.rewards.panel
        judges = [] if panel is None else panel.functions
        return [judge.encoder.tokenizer if isinstance(judge, RewardModel) else None for judge in judges]

    @property
    def reward_func_names(self) -> list[str]:
        """The names under which the rewards are logged."""
        return [] if self.rewards is None or self.rewards.panel is None else self.rewards.panel.names

    @property
    def generation_config(self) -> GenerationConfig:
        """How completions are sampled, in transformers' words; read the settings here, change them on the trainer."""
        config = self.args
        return GenerationConfig(
            max_new_tokens=config.max_completion_length, do_sample=True, temperature=config.temperature,
            top_p=config.top_p, top_k=config.top_k, min_p=config.min_p, repetition_penalty=config.repetition_penalty,
            pad_token_id=self.tokenizer.pad_token_id, eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip

    def changed(self, name: str) -> None:
        if name == "reward_weights" and self.rewards is not None:
            self.reward_funcs = self._reward_funcs
        elif name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_length"):
            if not self.rollouts.is_used_up:
                raise ValueError(
                    f"{name}: a rollout is half used, which was sampled otherwise; set it after its last step"
                )
            self._forget_waiting()
            self.source = self.collector.source = self.make_source()

    def _loader(self, shape: RolloutShape) -> RolloutLoader:
        prompts = shape.rows * self.args.world_size // shape.num_generations
        sized = hasattr(self.train_dataset, "__len__")
        length = -(-len(self.train_dataset) // prompts) * shape.passes if sized else None
        return RolloutLoader(self._make_experience, self._in_passes, shape, length)

    def _ahead(self) -> Ahead | None:
        """What draws rollouts before they are due, where the config asks for that."""
        config = self.args
        if not config.max_staleness:
            return None
        self._say_no_gain()
        follows, keeps = hasattr(self.sampler, "follow") and self.rollout_func is None, config.sync_in_flight
        if keeps:
            way_out = "only an engine beside the trainer, such as a vLLM server, samples while its weights change"
            require(config, "sync_in_flight", follows and getattr(self.sampler, "beside", True), way_out)
            way_out = "give the sampler keeps=True, and its sync mode='keep'"
            require(config, "sync_in_flight", getattr(self.sampler, "keeps", True), way_out)
        if follows and getattr(self.source, "measure", None) is not None:
            way_out = "the weights that could measure filtered completions at this temperature are gone by then"
            require(config, "max_staleness", False, f"{way_out}; leave the filters out, or set it to 0")
        return Ahead(
            self.collector,
            config.max_staleness,
            follow=self._follow,
            apart=self._draws_apart,
            keeps=keeps,
            plays=self.environment is not None,
        )

    def _draws_apart(self) -> bool:
        """Whether rollouts can be drawn while the policy is trained."""
        beside = hasattr(self.sampler, "follow") and getattr(self.sampler, "beside", True)
        return beside and self.is_asked_alone(self.source)

    def is_asked_alone(self, source: Source) -> bool:
        """Whether a source asks nothing of the trainer's own models and tokenizer, so that a thread may draw of it."""
        return isinstance(source, SamplerSource | EnvironmentSource)

    def _say_no_gain(self) -> None:
        """One line where rollouts are drawn ahead, and the policy waits for them all the same."""
        if self._draws_apart() or not self.is_world_process_zero():
            return
        why = "no engine beside the trainer, such as a vLLM server, samples them"
        if hasattr(self.sampler, "follow") and getattr(self.sampler, "beside", True):
            why = "they are drawn in the trainer's thread, with its models or functions"
        logger.warning(
            "max_staleness=%d: rollouts are drawn ahead by older weights, and no time is gained, for %s; 0 draws them "
            "in step", self.args.max_staleness, why,
        )  # fmt: skip

    def _rest(self) -> None:
        """Have what is in flight end. Collective."""
        if self.ahead is not None:
            self.ahead.rest(self.rollouts.state, self.state)

    def _forget_waiting(self) -> None:
        """Drop what waits: it is drawn again, by the weights of then."""
        if self.ahead is not None:
            self.ahead.forget(self.rollouts.state)

    def make_source(self) -> Source:
        """What completes the prompts: the environment, the user's function or the sampler."""
        if self.rollout_func is not None:
            call = calls_of(self.rollout_func, [self], [self.args, self.tokenizer])
            measure = self.logprobs_of if self.args.measures_function() else None
            words = embedding_rows(self.model) or math.inf
            return FunctionSource(call, measure, words, reader_of(self.tokenizer))
        return self.sampled_by(self.sampler)

    def sampled_by(self, sampler: Sampler) -> Source:
        """Completions by a sampler, or episodes of the environment in which it makes the turns."""
        config = self.args
        exact = is_exact(sampler)
        if self.environment is None:
            own_words = config.reshapes and config.keeps_words(exact)
            reshaped = config.reshapes and exact and not own_words
            return SamplerSource(
                sampler,
                partial(self.sampling_params, say_kept=True) if own_words else self.sampling_params,
                reshaped=reshaped,
                measure=self.logprobs_of if reshaped and config.temperature != 1.0 else None,
                keeps_words=own_words,
                keeps_experts=not exact and config.keeps_experts(),
            )
        return EnvironmentSource(
            self.environment,
            sampler,
            self.sampling_params,
            context=context_length(self.model),
            limit=config.max_completion_length,
            first=config.process_index * self.eval_rows,
            measure=self.logprobs_of if config.reshapes and exact else None,
        )

    @property
    def engine_samples(self) -> bool:
        """Whether completions are drawn by another computation of the policy than this trainer's."""
        return self.rollout_func is None and not is_exact(self.sampler)

    def _rewards(self, functions: Any, tokenizers: Any) -> RolloutRewards:
        config = self.args
        panel = None
        if functions is not None:
            like = frozen_dtype(self.model, self.accelerator.mixed_precision)
            panel = reward_panel(functions, tokenizers, config.reward_timeout, config.device, like=like)
        overlong = None if config.overlong_cache is None else (config.max_completion_length, config.overlong_cache)
        if not self.owns("_calculate_rewards"):
            return RolloutRewards(panel, config.reward_weights, overlong, reward_names(self.environment))
        if panel is None:
            raise ValueError("_calculate_rewards: it is overridden, but the rollouts bring their own rewards")
        rewards = OwnRewards(panel, config.reward_weights, overlong)
        rewards.function = lambda *asked: self._calculate_rewards(*asked)
        return rewards

    def _calculate_rewards(
        self, inputs: Sequence[Mapping[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        """What the reward functions say of this process's completions, NaN for no opinion; for subclasses. [B, F]

        inputs: the row of the data set of each completion.
        """
        if not isinstance(self.rewards, OwnRewards):
            raise ValueError("_calculate_rewards: it is there for a subclass that overrides it; ask trainer.rewards")
        return self.rewards.of_panel(inputs, prompts, completions, completion_ids_list)

    def prepared_columns(self) -> frozenset[str]:
        return frozenset({"prompt_ids"})

    def _collector(self, shape: RolloutShape) -> Collector:
        config = self.args
        rank, world, group = config.process_index, config.world_size, config.num_generations
        wanted = shape.rows * world // group
        if self._deals(shape):
            places: Sequence[int] = part_of(rank, world, wanted)
        else:
            places = places_of(rank, world, wanted // world, config.rows_of_step(shape) // group)
        return Collector(
            self.source,
            self.rewards,
            self._prompts(),
            self.tokenizer,
            seed=config.seed,
            group=group,
            wanted=wanted,
            places=places,
            rounds=config.refill_rounds(),
            world=world,
            unscored=self._write_unscored,
            ends=self._ends(),
            weights=self.weights_for_sampling,
            held_out=self._judges(),
        )

    def _judges(self) -> RolloutRewards | None:
        """Of what held-out judges say nothing is learned; it stands in the log as `judge/NAME/mean`."""
        if self._judge_funcs is None:
            return None
        like = frozen_dtype(self.model, self.accelerator.mixed_precision)
        return RolloutRewards(reward_panel(self._judge_funcs, None, None, self.args.device, like=like))

    def _begin_steps(self, step: int) -> None:
        super()._begin_steps(step)
        how = self.args.how_rewards_are_checked()
        if how == "no" or step or self.rewards is None:
            return
        try:
            with checkpoints.same_random_state():
                self._check_rewards(servers=how == "all")
        except Exception as error:  # nobody's run ends by this
            logger.warning("check_rewards: %s: %s; the rewards were not tried", type(error).__name__, error)

    def _check_rewards(self, *, servers: bool) -> None:
        """Try the reward functions, on one process; its samples are drawn as those of an evaluation."""
        if self.environment is not None or self.rewards is None or self.rewards.panel is None:
            logger.warning("check_rewards: the rewards of episodes, and those that rollouts bring, are not tried")
            return
        if not self.is_world_process_zero():
            return
        config, prompts = self.args, self._prompts()
        rows = prompts.take(0, reward_check.PROMPTS)
        asked = self.collector.prompt_texts(rows, 1)
        ids = [list(row["prompt_ids"]) for row in rows]
        end = self.tokenizer.eos_token_id
        made = reward_check.trivial_rollouts(asked, ids, self.tokenizer, config.max_completion_length, end)
        tried: dict[str, tuple[Rollout, int]] = {kind: (rollout, 1) for kind, rollout in made.items()}
        if self.rollout_func is None and config.world_size == 1:
            copies = min(reward_check.COPIES, config.num_generations)
            self.follow()
            with torch.no_grad():
                tried[reward_check.OWN] = self.collector.draw(rows, copies, self.collector.seed(-1)), copies

        def judge(rewards: RolloutRewards, rollout: Rollout, copies: int) -> Rewards:
            return self.collector.judge(rollout, rows, copies, self.state, rewards)

        found = reward_check.check_rewards(self.rewards, tried, judge, servers=servers)
        reward_check.tell(found, Path(str(config.output_dir)))

    def _check_sharding(self) -> None:
        """ValueError where the sampler could not get the weights; one line where `gather` has no effect."""
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ValueError("fsdp_version=1: the sampler cannot gather its weights; take fsdp_version=2")
        if not self.args.gathers_layers:
            return
        asked = "gather='layers'" if self.args.gather == "layers" else "ds3_gather_for_generation=False"
        if not shards_weights(self.accelerator):
            logger.warning("%s: no effect, because every process holds the weights whole", asked)
        elif is_encoder_decoder(self.model):
            raise ValueError(f"{asked}: an encoder-decoder is not sampled layer by layer; leave it out")
        elif reads_pictures(self.model):
            raise ValueError(f"{asked}: a model that reads pictures is not sampled layer by layer; leave it out")

    def weights_for_sampling(self) -> AbstractContextManager[Any]:
        """The context in which each rank may sample as it likes, on sharded weights too; collective there."""
        if hasattr(self.sampler, "follow") and not is_exact(self.sampler):  # an error of one rank is one of all
            return as_one("sample")
        if not runs_in_step(self.model):
            return nullcontext()
        in_layers = self.args.gathers_layers
        if not self._said_gathering and self.is_world_process_zero():
            say_gathering(self.model, in_layers=in_layers)
        self._said_gathering = True
        models = self.sampled_models()
        if in_layers:
            return in_step(*models)
        together = ExitStack()
        for model in models:
            together.enter_context(gathered(model))
        return together

    def sampled_models(self) -> list[nn.Module]:
        """The models that make completions."""
        return [self.model]

    def _ends(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        return end_tokens(self.model, self.tokenizer, self.sampling_params(0).stop_token_ids)

    def make_reference(self, ref_model: nn.Module | str | None) -> Reference:
        """The model given, the policy without its new adapter, or a frozen copy; it moves where the config says so."""
        config, given = self.args, None
        if ref_model is not None:
            keywords = config.loading_keywords() if isinstance(ref_model, str) else config.model_init_kwargs
            given = load_model(ref_model, AutoModelForCausalLM, keywords, frozen=True, like=dtype_of(self.model))
            if given is not self.model:  # else `Reference` says what is wrong with that
                given = prepare_frozen(self.accelerator, given)
        share = not shards_weights(self.accelerator)
        reference = Reference(self.model, given, autocast=self.accelerator.autocast, share=share)
        reference.prepare(self.accelerator)
        if config.moves_reference:
            if reference.frozen is None:
                raise ValueError("sync_ref_model=True: the policy without its adapter cannot move; give a ref_model")
            self.add_callback(SyncReference(reference, config.ref_model_mixup_alpha, config.ref_model_sync_steps))
        return reference

    # -- the verbs of an algorithm ---------------------------------------------------------------

    @abstractmethod
    def experience(
        self, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[Experience, dict[str, list[float]]]:
        """What to learn from a rollout, and columns about it (a number per completion) for the rollout's file.

        rewards: without functions where the algorithm needs none. rows: of the data set, one for each group.
        """

    @abstractmethod
    def policy_objective(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        """The loss of a micro-batch, summed over the rows that are computed; the base divides by the count of all."""

    @staticmethod
    def old_logprobs(batch: PolicyBatch, logprobs_BT: Tensor) -> Tensor:
        """The log-probabilities under the policy that sampled; `logprobs_BT` of this pass where it is that policy."""
        return logprobs_BT.detach() if batch.own_pass else batch.old_logprobs_BT

    def zero_advantage_means_zero_gradient(self) -> bool:
        """Whether no term of the objective reaches a completion whose advantages are 0; it is then not computed.

        An entropy bonus or a KL term in the loss does reach it.
        """
        return False

    def rows_with_gradient(self, rows: Experience) -> Tensor:
        """Which rows of a micro-batch are computed; the others only count in the divisor. [B]"""
        learned_BT = rows.mask_BT > 0
        balanced = bool(self.balance_weight)  # by every completion
        if not balanced and self.zero_advantage_means_zero_gradient() and rows.advantages_BT is not None:
            learned_BT = learned_BT & (rows.advantages_BT != 0)
        return learned_BT.any(1)

    # -- rollouts --------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        return self.rollouts

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        self.args.ignore_data_skip = self.args.in_training = True  # the loader knows its place, `Trainer` skips nothing
        self._replaced, self._lost, self._first_step = True, None, -1
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._rest()
            return result
        finally:
            if self.ahead is not None:
                self.ahead.let_go(self.rollouts.state, self.state.global_step)
            self.args.ignore_data_skip = self.args.in_training = self.is_in_train = False
            close_objects(self.environment)

    def sampling_params(self, seed: Seed, say_kept: bool = False) -> SamplingParams:
        config = self.args
        further: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in (config.generation_kwargs or {}).items()}
        return SamplingParams(
            max_new_tokens=config.max_completion_length,
            temperature=config.temperature,
            top_k=config.top_k or 0,
            top_p=config.top_p,
            min_p=config.min_p or 0.0,
            repetition_penalty=config.repetition_penalty,
            say_kept=say_kept,
            seed=seed,
            **further,
        )

    def _make_experience(self, state: RolloutState) -> Experience:
        self.model.eval()  # `Trainer` switches back before each micro-batch
        position = state.position
        with torch.no_grad():
            try:
                rows, rollout, rewards = self._collect(state)
                experience, learned = self.experience(rollout, rewards, rows)
            except EngineError:
                if self.ahead is None:
                    state.position = position  # whoever resumes draws the same prompts
                raise
        self.record_tokens(sum(map(len, rollout.prompts)) + sum(map(sum, rollout.masks)))
        group = self.args.num_generations
        if rewards.logs.metrics:
            check_new_names(name for name in rewards.logs.metrics if not name.startswith("judge/"))
        rollout_report.record(self.record, self.record_extreme, rollout, rewards, group, self.collector.gather)
        prompts, step = self.collector.prompt_texts(rows, group), self.state.global_step + 1
        table = rollout_report.table_of(step, rollout, prompts, rewards, learned, self._reads_pictures)
        if self.args.save_rollouts and len(rollout):
            self._write(state.rollouts, "rollouts", table)
        if self.args.log_completions and self.is_world_process_zero():
            rollout_report.print_table(table, self.args.num_completions_to_print, self.args.log_unique_prompts)
        return self._own_share(experience)

    def _collect(self, state: RolloutState) -> Collected:
        """The rollout that is due, with its rewards."""
        if self.ahead is None:
            self._is_stale = False
            self.follow()
            return self.collector.collect(state, self.state)
        due = self.ahead.due(state, self.state)
        assert due.collected is not None
        self._is_stale = due.version < self.state.global_step
        if self._is_stale:
            self._ratio_is_one_at = None
        step, version = self.state.global_step + self._moved, due.version + self._moved
        ages = rollout_report.ages_of(due.collected[1], version, step, spans=self.ahead.keeps)
        rollout_report.record_ahead(self.record, self.record_extreme, ages, self.ahead.spent())
        return due.collected

    rows_together = 1
    """rows of an experience, one behind the other, that a micro-batch must hold together"""

    def _deals(self, shape: RolloutShape) -> bool:
        """Whether groups lie across ranks: one rank draws and judges a group, and several learn from it."""
        rows = shape.per_device_train_batch_size if self.rows_together > 1 else self.args.rows_of_step(shape)
        return rows % shape.num_generations > 0

    def _own_share(self, experience: Experience) -> Experience:
        """What this rank learns from."""
        shape, world = self.rollouts.shape, self.args.world_size
        if not self._deals(shape):
            return experience
        of_step = min(self.args.gradient_accumulation_steps, shape.steps_per_generation)
        whole = Experience.below(self.collector.gather([experience]))
        return whole.dealt(self.args.process_index, world, shape.steps_per_generation, of_step, self.rows_together)

    _misses_scores = False
    """whether a completion may go without a score, or has gone so"""

    def _read(self, mode: str) -> dict[str, float]:
        found = super()._read(mode)
        panel = None if self.rewards is None else self.rewards.panel
        timed = panel is not None and any(seconds is not None for seconds in panel.timeouts)
        self._misses_scores = self._misses_scores or timed or bool(found.get("unscored_ratio"))
        if not self._misses_scores:
            found.pop("unscored_ratio", None)
        return found

    def _write_unscored(self, number: int, rollout: Rollout, prompts: list[Any]) -> None:
        nothing = Rewards.none(len(rollout))
        step = self.state.global_step + 1
        table = rollout_report.table_of(step, rollout, prompts, nothing, {}, self._reads_pictures)
        self._write(number, "unscored", table)

    def _write(self, number: int, folder: str, table: rollout_report.Columns) -> None:
        place = Path(str(self.args.output_dir)) / folder
        if self.args.world_size > 1:
            place = place / f"rank-{self.args.process_index}"
        rollout_report.write_parquet(place, number, table)

    # -- what models say of completions -----------------------------------------------------------

    def logprobs_of(self, rollout: Rollout) -> list[list[float]]:
        """Log-probabilities of the completions under the policy, at the sampling temperature."""
        logprobs_BT = self.scored(self.model, Experience.of(rollout)).logprobs_BT
        return [row[: len(ids)] for row, ids in zip(logprobs_BT.tolist(), rollout.completions, strict=True)]

    def scored(self, model: nn.Module, rows: Experience, *, entropy: bool = False) -> Scores:
        """`score` of all tokens of the completions, without gradient, in the micro-batches of training, on the CPU."""

        def ask(packed: PackedBatch) -> list[Tensor]:
            scores = score(model, packed, temperature=self.args.temperature, entropy=entropy)
            return [scores.logprobs_BT] if scores.entropy_BT is None else [scores.logprobs_BT, scores.entropy_BT]

        size = self.args.per_device_train_batch_size
        runs = (range(start, min(start + size, len(rows))) for start in range(0, len(rows), size))
        together = in_step(model) if runs_in_step(model) else nullcontext()
        with rows_padded(self.pads_rows), together:
            columns = in_pieces(rows, runs, ask, self.args.device, masked=False) if len(rows) else []
        if not len(rows):
            return Scores(torch.zeros(0, 0), torch.zeros(0, 0) if entropy else None)
        return Scores(*(column.cpu() for column in columns))

    # -- the loop's side -------------------------------------------------------------------------

    def least_rows(self) -> int:
        """Rows of a micro-batch to compute at least: many processes must all run the model."""
        return self.rows_together * int(self.args.world_size > 1)

    def largest_load(self) -> Load | None:
        prompts = lengths_of(self.train_dataset)
        if prompts is None:
            return None
        config, shape = self.args, self.rollouts.shape
        prompt, rows = int(prompts.max()), shape.per_device_train_batch_size
        answer = int(config.max_completion_length)
        groups = -(-rows // shape.num_generations)
        tokens, one = groups * prompt + rows * answer, prompt + min(rows, shape.num_generations) * answer
        if self.pads_rows:
            tokens = rows * (prompt + answer)
        budget = unasked_budget(config.device, config.world_size, mostly_scored=True) if self.may_cut() else None
        tokens = tokens if budget is None else min(tokens, max(budget, one))
        most = config.sampling_max_rows or MOST_ROWS
        if isinstance(self.sampler, LocalSampler) and config.sampling_max_rows is None:
            most = self.sampler.max_rows or MOST_ROWS
        return Load(tokens, one, rows * answer, min(most, shape.rows), answer + -(-prompt // shape.num_generations))

    def may_cut(self) -> bool:
        alone = self.args.world_size == 1 and not self.is_deepspeed_enabled
        return alone and not self.pads_rows and not self.balance_weight

    def take_rows(self, most: int | None) -> None:
        sampler = self.sampler
        if self.args.sampling_max_rows is None and isinstance(sampler, LocalSampler) and not sampler.captured:
            sampler.max_rows = most or MOST_ROWS

    def _in_passes(self, rows: Experience) -> dict[str, Any]:
        """A micro-batch; a single process on the CPU takes it in several forward passes."""
        budget = self._planned_tokens or unasked_budget(self.args.device, self.args.world_size, mostly_scored=True)
        if budget is None or self.pads_rows or self.balance_weight or self.is_deepspeed_enabled:
            return self._collate(rows)
        return collated(self._collate, rows.cut(budget, whole_groups=True))

    def _collate(self, rows: Experience) -> dict[str, PolicyBatch]:
        count = counted(rows.mask_BT, self.aggregation, self.args.max_completion_length)
        computed = self.rows_with_gradient(rows).nonzero().flatten()
        kept = rows.select(computed if len(computed) else range(min(self.least_rows(), len(rows))))
        return Batch(policy=replace(kept.batch(count), only_runs=not len(computed)))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Tensor]:
        # Sampler and trainer are one model, so the first update on a fresh rollout starts at ratio 1.
        fresh = self._before_first_update and self.rollouts.is_used_up
        self._ratio_is_one_at = self.state.global_step if fresh and self.starts_at_ratio_one() else None
        self._before_first_update = False
        self._steps_begun += 1
        started = time.perf_counter()
        if self._first_step < 0:
            self._first_step = int(self.state.global_step)
        try:
            batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        except EngineError as error:
            if self.state.global_step == self._first_step:
                raise  # nothing was learned that a checkpoint could keep
            self._end_without_engine(error)
            return [], torch.zeros((), device=device)
        self._sampled_apart = self.engine_samples or self._is_stale
        for piece in pieces_of(batches):
            piece["policy"] = piece["policy"].to(device)
        self.record("step_time", time.perf_counter() - started, 1.0)
        return batches, count

    def starts_at_ratio_one(self) -> bool:
        """Whether the first update on a rollout must start at the policy that the old log-probabilities are of."""
        return bool(self.args.disable_dropout) and self.rollout_func is None

    def _end_without_engine(self, error: EngineError) -> None:
        """End the run with a checkpoint: nobody samples any more. `check_end` says why."""
        self._lost = error
        self.end_now(saves=True)

    def check_end(self) -> None:
        if self._lost is None:
            return
        error, self._lost = self._lost, None
        step = self.state.global_step
        kept = f"checkpoint-{step} is saved: go on with train(resume_from_checkpoint=True)"
        if not self.keeps_checkpoints:
            kept = "save_strategy='no' keeps no checkpoint"
        raise EngineError(f"step {step + 1}: {error}; {kept}") from error

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        started = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        self.record("step_time", time.perf_counter() - started, 0.0)  # of the step that has been counted
        return loss

    def tokens(self, batch: dict[str, PolicyBatch]) -> int:
        return 0  # a rollout counts them, however often it is learned

    def count(self, batch: dict[str, PolicyBatch]) -> Tensor:
        return batch["policy"].counted

    def objective(self, model: nn.Module, batch: dict[str, PolicyBatch]) -> LossSum:
        policy = batch["policy"]
        if not policy.packed.rows:
            return LossSum(self.nothing(model), policy.counted)
        loss = self.policy_objective(model, policy)
        if self._ratio_is_one_at == self.state.global_step and model.training:
            means = means_of(loss.metrics)
            if self._sampled_apart:  # the sampler's own numbers may differ
                means = {name: value for name, value in means.items() if not name.startswith("sampling/")}
            check_first_ratio(means, self._precision)
        return LossSum(loss.total, policy.counted, {} if policy.only_runs else loss.metrics)

    def _precision(self) -> str:
        with self.accelerator.autocast():
            return precision_of(self.model)

    def nothing(self, model: nn.Module) -> Tensor:
        """A zero that every trained parameter takes part in, for a micro-batch without a row to compute. []"""
        zero = torch.zeros((), device=self.args.device)
        return sum((p.flatten()[:1].sum() * 0.0 for p in model.parameters() if p.requires_grad), zero)

    def frozen_models(self) -> list[nn.Module]:
        panel = None if self.rewards is None else self.rewards.panel
        judges = [] if panel is None else [each.model for each in panel.functions if isinstance(each, RewardModel)]
        return [*([] if self.reference is None else self.reference.kept), *judges]

    def extra_state(self) -> dict[str, Any]:
        """Collective: every rank's half-used rollout, and those that wait."""
        waiting: dict[str, Any] = {}
        if self.ahead is not None:
            self._rest()
            waiting = {"waiting": self.ahead.plain_state()}
        mine, of_step = [{**self.rollouts.plain_state(), **waiting}], self._division().of_step
        ranks = gather_object(mine) if self.args.world_size > 1 else mine
        state: dict[str, Any] = {"rollouts": ranks, "of_step": of_step}
        if self._is_stale:  # what is left of the rollout at hand is weighed as its first part was
            state["is_stale"] = True
        if self.args.moves_reference and self.reference is not None and self.reference.frozen is not None:
            state["reference"] = self.reference.state()
        return state

    def load_extra_state(self, state: dict[str, Any]) -> None:
        ranks, rank = [dict(one) for one in state["rollouts"]], self.args.process_index
        self._is_stale = bool(state.get("is_stale"))
        waiting, position = [one.pop("waiting", []) for one in ranks], ranks[0]["position"]
        before = waiting[0][0]["start"] if waiting[0] else position
        ranks = [{**one, "position": before} for one in ranks]  # as if nothing had been drawn ahead
        own = ranks[rank] if len(ranks) == self.args.world_size else self._divided_anew(ranks, state.get("of_step", 0))
        kept = own["position"] == before and self._takes(ranks[0]["shape"], waiting)
        self.rollouts.restore({**own, "position": position} if kept else own)
        if self.ahead is not None:
            self.ahead.restore_of(waiting if kept else [[]])
        if waiting[0] and not kept and self.is_world_process_zero():
            logger.warning(
                "the %d rollouts that %s had drawn ahead are dropped, as this run has %s, max_staleness=%d or other "
                "batches: their prompts are drawn again, by the weights of now", len(waiting[0]),
                processes_text(len(ranks)), processes_text(self.args.world_size), self.args.max_staleness,
            )  # fmt: skip
        if "reference" in state and self.reference is not None:
            self.reference.load(state["reference"])

    def _takes(self, made_with: Mapping[str, Any], waiting: Sequence[Sequence[Mapping[str, Any]]]) -> bool:
        """Whether this run can learn from what waits in a checkpoint. Collective."""
        same = made_with["num_generations"] == self.args.num_generations
        return same and self.ahead is not None and self.ahead.takes(waiting)

    def _division(self) -> Division:
        shape = self.rollouts.shape
        of_step = min(self.args.gradient_accumulation_steps, shape.steps_per_generation)
        return Division(shape, of_step, self.args.world_size)

    def _divided_anew(self, ranks: Sequence[dict[str, Any]], of_step: int) -> dict[str, Any]:
        """What this rank goes on with of a checkpoint by another number of ranks; one line says what became of it."""
        shape = RolloutShape(**ranks[0]["shape"])
        made = Division(shape, of_step, len(ranks))
        knows = self.args.refill_rounds() == 1
        own, said = divided_anew(ranks, made, self._division(), self.args.process_index, knows)
        if said and self.is_world_process_zero():
            logger.warning("the half-used rollout of %s %s", processes_text(len(ranks)), said)
        return own

    # -- evaluation ------------------------------------------------------------------------------

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._replaced = self._replaced or not self.is_in_train
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if not self.is_in_train:
                close_objects(self.environment)

    def predictions(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[LossSum, None, None]:
        """An evaluation batch is sampled and rewarded; see `evaluated` for its loss."""
        rows = [] if self.only_repeats else inputs["rows"]
        group = self.args.num_generations_eval or self.args.num_generations
        nothing = LossSum(torch.zeros((), device=self.args.device), 0.0)
        if self._lost is not None and self.is_in_train:  # the engine is waited for once, not for each batch
            return nothing, None, None
        try:
            self.follow()
            rollout = self.collector.draw(rows, group, self.collector.seed(-1))  # draws depend on the prompt too
            self.ask_of_evaluation(rollout)
        except EngineError as error:
            if not self.is_in_train:
                raise
            self._end_without_engine(error)
            return nothing, None, None
        rows = with_own_prompts(rows, rollout)
        rewards = self.collector.judge(rollout, rows, group, self.state)

        if rewards.logs.metrics:
            check_new_names(rewards.logs.metrics)
        add, add_extreme = partial(self.record, mode="eval"), partial(self.record_extreme, mode="eval")
        rollout_report.record(add, add_extreme, rollout, rewards, group, self.collector.gather)
        with in_step(model, *self.frozen_models()) if runs_in_step(model) else nullcontext():
            return self.evaluated(model, rollout, rewards, rows) if rows else nothing, None, None

    def ask_of_evaluation(self, rollout: Rollout) -> None:
        """Ask others what the loss of an evaluation batch needs. Ranks without rows are here too."""

    def evaluated(
        self, model: nn.Module, rollout: Rollout, rewards: Rewards, rows: Sequence[Mapping[str, Any]]
    ) -> LossSum:
        """The loss of an evaluation batch: minus its mean reward."""
        total_B = rewards.total_B()
        return LossSum(-total_B.nansum(), (~total_B.isnan()).sum())
