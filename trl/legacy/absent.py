"""What scripts import and this package lacks: each name and module raises an ImportError that says what to use.

`from trl import X` hands on an ImportError of a module's `__getattr__`; `hasattr(trl, "NashMDTrainer")` raises it too.
"""

from __future__ import annotations

ABSENT: tuple[tuple[str, str, str], ...] = (
    (
        "NashMDTrainer NashMDConfig GeometricMixtureWrapper",
        "experimental.nash_md trainer.nash_md_trainer trainer.nash_md_config",
        "use OnlineDPOTrainer, which learns from pairs that it samples, or GRPOTrainer with the same reward functions",
    ),
    (
        "XPOTrainer XPOConfig",
        "experimental.xpo trainer.xpo_trainer trainer.xpo_config",
        "use OnlineDPOTrainer, which is XPO without its exploration bonus, or GRPOTrainer",
    ),
    (
        "TPOTrainer TPOConfig",
        "experimental.tpo",
        "use DPOTrainer or SimPOTrainer on chosen and rejected, or CPOTrainer, which adds the likelihood of the chosen",
    ),
    (
        "SDFTTrainer SDFTConfig SDPOTrainer SDPOConfig SSDTrainer SSDConfig",
        "experimental.sdft experimental.sdpo experimental.ssd experimental.self_distillation",
        "use DistillationTrainer with the teacher that you want, which may be a copy of the model",
    ),
    (
        "GOLDTrainer GOLDConfig",
        "experimental.gold",
        "use DistillationTrainer or GKDTrainer with a teacher that has the student's tokenizer",
    ),
    (
        "MiniLLMTrainer MiniLLMConfig",
        "experimental.minillm",
        "use DistillationTrainer(args=DistillationConfig(beta=1.0)): the reverse KL on the student's own completions",
    ),
    (
        "A2POTrainer A2POConfig GFPOTrainer GFPOConfig DPPOTrainer DPPOConfig PAPOTrainer PAPOConfig "
        "GRPOWithReplayBufferTrainer GRPOWithReplayBufferConfig",
        "experimental.a2po experimental.gfpo experimental.dppo experimental.papo "
        "experimental.grpo_with_replay_buffer experimental.gmpo",
        "use GRPOTrainer; its `loss_type`, `importance_sampling_level`, `delta` and `off_policy_mask_threshold` are "
        "the relatives of GRPO that there are",
    ),
    (
        "AsyncGRPOTrainer AsyncGRPOConfig",
        "experimental.async_grpo",
        "use GRPOTrainer: it samples and learns in turns, on one engine",
    ),
    (
        "AllTrueJudge BaseJudge BaseBinaryJudge BasePairwiseJudge BaseRankJudge HfPairwiseJudge OpenAIPairwiseJudge "
        "PairRMJudge MockPairwiseJudge",
        "experimental.judges trainer.judges",
        "give OnlineDPOTrainer a `judge` of your own, a function (prompts, pairs) -> 0 or 1 for each pair",
    ),
    (
        "AlignPropTrainer AlignPropConfig",
        "trainer.alignprop_trainer trainer.alignprop_config",
        "use DDPOTrainer, which needs no gradient of the reward",
    ),
    (
        "",
        "experimental.openenv experimental.harbor experimental.nemo_gym",
        "use GRPOTrainer(environment_factory=...) with a class that has `reset` and tools, or `rollout_func`",
    ),
    (
        "WeaveCallback",
        "",
        "use LogCompletionsCallback, which logs completions without Weave",
    ),
    (
        "WinRateCallback",
        "experimental.winrate_callback",
        "log completions with LogCompletionsCallback and let a judge of your own compare them",
    ),
    (
        "MergeModelCallback MergeConfig",
        "experimental.merge_model_callback extras.mergekit_utils",
        "merge the checkpoints after training by mergekit's own command, or average weights with BEMACallback",
    ),
    (
        "BEMACallbackForRefModel",
        "experimental.bema_for_ref_model",
        "use SyncRefModelCallback or `sync_ref_model=True`, which move the reference towards the policy",
    ),
    (
        "add_response_schema add_response_template supports_tool_calling is_chat_template_prefix_preserving "
        "is_chat_template_stop_token_trained",
        "",
        "leave it out: the trainers read tool calls and turns in what the template prints, or raise where they cannot",
    ),
    (
        "prepare_multimodal_messages prepare_multimodal_messages_vllm",
        "",
        "leave it out: the trainers of language models take texts, not pictures",
    ),
    (
        "get_formatting_func_from_dataset conversations_formatting_function instructions_formatting_function",
        "extras.dataset_formatting",
        "leave it out: SFTTrainer reads `messages` and `prompt`/`completion` rows itself, or give it a formatting_func",
    ),
    (
        "VLLMClient",
        "extras.vllm_client",
        "use trl.generation.vllm.client.ServerEngine, or GRPOConfig(use_vllm=True, vllm_mode='server')",
    ),
    (
        "profiling_context profiling_decorator ProfilingContext",
        "extras.profiling",
        "use torch.profiler.record_function, a context and a decorator",
    ),
    (
        "get_act_offloading_ctx_manager OffloadActivations NoOpManager",
        "models.activation_offloading",
        "use torch.autograd.graph.save_on_cpu, or gradient_checkpointing=True in the config",
    ),
    (
        "prepare_deepspeed prepare_fsdp",
        "",
        "use `trainer.accelerator.prepare_model(model, evaluation_mode=True)`, which takes either",
    ),
    (
        "ensure_master_addr_port",
        "",
        "use `accelerate launch` or torchrun, which set MASTER_ADDR and MASTER_PORT",
    ),
    (
        "RepeatSampler repeat_iterable_dataset",
        "",
        "leave it out: the trainers draw each prompt once and sample `num_generations` completions of it",
    ),
    (
        "shuffle_sequence_dict",
        "",
        "use torch.randperm and the same order for each value of the dict; `split_tensor_dict` is here",
    ),
    (
        "generate_model_card",
        "",
        "use `create_model_card` of a trainer, which writes the card beside the model",
    ),
    (
        "print_prompt_completions_sample",
        "",
        "use `log_completions=True` in the config, or LogCompletionsCallback",
    ),
    (
        "compute_flops_per_token compute_mfu adjusted_mfu",
        "",
        "use `model.floating_point_ops(inputs)` of transformers, and the time of a step that the log has",
    ),
    (
        "hash_module",
        "",
        "use `hashlib.sha256` over the values of `model.state_dict()`",
    ),
    (
        "use_adapter",
        "",
        "use `model.set_adapter(name)` of PEFT, or `model_adapter_name` and `ref_adapter_name` of DPOConfig",
    ),
    (
        "get_callable_name",
        "",
        "use the function's `__name__`, by which the trainers log a reward",
    ),
    (
        "DataCollatorForLanguageModeling DataCollatorForPreference DataCollatorForUnpairedPreference",
        "",
        "leave it out: the trainers collate their rows themselves, and SFTTrainer takes a collator of transformers",
    ),
    (
        "dft_loss",
        "",
        "use SFTConfig(loss_type='dft')",
    ),
    (
        "",
        "skills",
        "leave it out: `trl --help` and the folder docs say what there is",
    ),
    (
        "patch_chunked_lm_head chunked_lm_head",
        "",
        "leave it out: the head is always computed in tiles, for the scored tokens only",
    ),
)
"""(names, modules below `trl`, what to use instead)"""

OF_DIFFUSERS = (
    "DDPOPipelineOutput", "DDPOSchedulerOutput", "DDPOStableDiffusionPipeline", "DDPOTrainer",
    "DefaultDDPOStableDiffusionPipeline",
)  # fmt: skip
"""names that are here where diffusers is installed"""

NAMES = {name: way for names, _, way in ABSENT for name in names.split()}
MODULES = {f"trl.{module}": way for _, modules, way in ABSENT for module in modules.split()}


def refusal(name: str, way: str) -> ImportError:
    """The error about a name or a module."""
    return ImportError(f"{name} is not in this package: {way}", name=name)


def refuse(name: str) -> None:
    """Raise the error of a name that the table has."""
    if name in NAMES:
        raise refusal(name, NAMES[name])
    if name in OF_DIFFUSERS:
        raise ImportError(f"{name} needs diffusers: pip install diffusers", name=name)
