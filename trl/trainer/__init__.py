"""Trainers: an algorithm each, on one seam to `transformers.Trainer` and one rollout loader."""

from trl.import_utils import is_diffusers_available, lazy_names
from trl.legacy import absent

_names = {
    "trl.legacy.collators": ["DataCollatorForCompletionOnlyLM"],
    "trl.legacy.constant_length": ["ConstantLengthDataset"],
    "trl.models.prepare": ["disable_dropout_in_model", "peft_module_casting_to_bf16"],
    "trl.scripts.model_config": ["ModelConfig", "get_kbit_device_map", "get_peft_config", "get_quantization_config"],
    "trl.trainer.base": ["BaseTrainer"],
    "trl.trainer.callbacks": [
        "BEMACallback", "LogCompletionsCallback", "RichProgressCallback", "SyncRefModelCallback",
    ],
    "trl.trainer.ddpo_config": ["DDPOConfig"],
    "trl.trainer.distillation_trainer": ["DistillationConfig", "DistillationTrainer", "GKDConfig", "GKDTrainer"],
    "trl.trainer.dpo_trainer": ["CPOConfig", "CPOTrainer", "DPOConfig", "DPOTrainer", "ORPOConfig", "ORPOTrainer"],
    "trl.trainer.grpo_trainer": ["GRPOConfig", "GRPOTrainer"],
    "trl.trainer.iterative_sft_trainer": ["IterativeSFTConfig", "IterativeSFTTrainer"],
    "trl.trainer.kto_trainer": ["BCOConfig", "BCOTrainer", "KTOConfig", "KTOTrainer"],
    "trl.trainer.online_dpo_trainer": ["OnlineDPOConfig", "OnlineDPOTrainer"],
    "trl.trainer.ppo_trainer": ["PPOConfig", "PPOTrainer", "PPOv2Config", "PPOv2Trainer"],
    "trl.trainer.prm_trainer": ["PRMConfig", "PRMTrainer"],
    "trl.trainer.reward_trainer": ["RewardConfig", "RewardTrainer", "compute_accuracy"],
    "trl.trainer.rloo_trainer": ["RLOOConfig", "RLOOTrainer"],
    "trl.trainer.run_record": ["RunFolderCallback"],
    "trl.trainer.sft_trainer": ["SFTConfig", "SFTTrainer"],
    "trl.trainer.statistics": ["AdaptiveKLController", "FixedKLController", "RunningMoments"],
}  # fmt: skip
if is_diffusers_available():
    _names["trl.trainer.ddpo_trainer"] = ["DDPOTrainer"]

__getattr__, __dir__, __all__ = lazy_names(__name__, _names, absent.refuse)
