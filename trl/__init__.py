"""Post-training of language models, whole on one machine. Names are imported when first read (PEP 562)."""

from trl.import_utils import is_diffusers_available, lazy_names
from trl.legacy import absent, paths

__version__ = "1!1.1.0"

_names = {
    "trl.core": ["set_seed"],
    "trl.legacy.collators": ["DataCollatorForCompletionOnlyLM"],
    "trl.data.formats": [
        "apply_chat_template", "extract_prompt", "is_conversational", "is_conversational_from_value",
        "maybe_apply_chat_template", "maybe_convert_to_chatml", "maybe_extract_prompt",
        "maybe_unpair_preference_dataset", "unpair_preference_dataset",
    ],
    "trl.data.packed_dataset": ["pack_dataset"],
    "trl.environment.base_environment": ["TextEnvironment", "TextHistory"],
    "trl.extras.best_of_n_sampler": ["BestOfNSampler"],
    "trl.import_utils": [
        "is_diffusers_available", "is_npu_available", "is_peft_available", "is_wandb_available", "is_xpu_available",
    ],
    "trl.models.chat_setup": ["clone_chat_template", "get_training_chat_template", "setup_chat_format"],
    "trl.models.modeling_base": ["PreTrainedModelWrapper", "create_reference_model"],
    "trl.models.modeling_value_head": ["AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead"],
    "trl.scripts.data_config": ["DatasetMixtureConfig", "ScriptArguments", "get_dataset"],
    "trl.scripts.model_config": ["ModelConfig", "get_kbit_device_map", "get_peft_config", "get_quantization_config"],
    "trl.scripts.parser": ["TrlParser", "init_zero_verbose"],
    "trl.trainer.callbacks": [
        "BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback",
    ],
    "trl.trainer.ddpo_config": ["DDPOConfig"],
    "trl.trainer.dpo_trainer": [
        "CPOConfig", "CPOTrainer", "DPOConfig", "DPOTrainer", "ORPOConfig", "ORPOTrainer", "SimPOConfig",
        "SimPOTrainer",
    ],
    "trl.trainer.distillation_trainer": ["DistillationConfig", "DistillationTrainer", "GKDConfig", "GKDTrainer"],
    "trl.trainer.grpo_trainer": ["GRPOConfig", "GRPOTrainer"],
    "trl.trainer.iterative_sft_trainer": ["IterativeSFTConfig", "IterativeSFTTrainer"],
    "trl.trainer.kto_trainer": ["BCOConfig", "BCOTrainer", "KTOConfig", "KTOTrainer"],
    "trl.trainer.online_dpo_trainer": ["OnlineDPOConfig", "OnlineDPOTrainer"],
    "trl.trainer.ppo_trainer": ["PPOConfig", "PPOTrainer", "PPOv2Config", "PPOv2Trainer"],
    "trl.trainer.prm_trainer": ["PRMConfig", "PRMTrainer"],
    "trl.trainer.raft_trainer": ["RAFTConfig", "RAFTTrainer"],
    "trl.trainer.reward_trainer": ["RewardConfig", "RewardTrainer"],
    "trl.trainer.rloo_trainer": ["RLOOConfig", "RLOOTrainer"],
    "trl.trainer.run_record": ["RunFolderCallback"],
    "trl.trainer.sft_trainer": ["SFTConfig", "SFTTrainer"],
}  # fmt: skip
if is_diffusers_available():
    _names |= {
        "trl.models.modeling_sd_base": [
            "DDPOPipelineOutput", "DDPOSchedulerOutput", "DDPOStableDiffusionPipeline",
            "DefaultDDPOStableDiffusionPipeline",
        ],
        "trl.trainer.ddpo_trainer": ["DDPOTrainer"],
    }  # fmt: skip

paths.open_windows(__path__[0])
__getattr__, __dir__, __all__ = lazy_names(__name__, _names, absent.refuse)
__all__ += ["__version__"]
