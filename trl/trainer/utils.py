"""Names that scripts import from here since release 0.7.7; their code is in other modules."""

from trl.core import entropy_from_logits
from trl.import_utils import lazy_names
from trl.legacy import absent
from trl.legacy.collators import (
    DataCollatorForCompletionOnlyLM,
    DPODataCollatorWithPadding,
    RewardDataCollatorWithPadding,
    pad_to_length,
)
from trl.legacy.constant_length import ConstantLengthDataset
from trl.legacy.tensors import (
    flush_left,
    nanmax,
    nanmin,
    nanstd,
    pad,
    selective_log_softmax,
    split_tensor_dict,
)
from trl.models.chat_setup import SIMPLE_CHAT_TEMPLATE
from trl.models.prepare import disable_dropout_in_model, neftune_post_forward_hook, peft_module_casting_to_bf16
from trl.trainer.base import trl_sanitze_kwargs_for_tagging
from trl.trainer.reward_trainer import compute_accuracy
from trl.trainer.statistics import (
    AdaptiveKLController,
    FixedKLController,
    PerPromptStatTracker,
    RunningMoments,
    exact_div,
    get_global_statistics,
)

__all__ = [
    "SIMPLE_CHAT_TEMPLATE",
    "AdaptiveKLController",
    "ConstantLengthDataset",
    "DPODataCollatorWithPadding",
    "DataCollatorForCompletionOnlyLM",
    "FixedKLController",
    "PerPromptStatTracker",
    "RewardDataCollatorWithPadding",
    "RunningMoments",
    "compute_accuracy",
    "disable_dropout_in_model",
    "entropy_from_logits",
    "exact_div",
    "flush_left",
    "get_global_statistics",
    "nanmax",
    "nanmin",
    "nanstd",
    "neftune_post_forward_hook",
    "pad",
    "pad_to_length",
    "peft_module_casting_to_bf16",
    "selective_log_softmax",
    "split_tensor_dict",
    "trl_sanitze_kwargs_for_tagging",
]

# scripts of today import these from here; the room `scripts` lies above this one, so they are read when asked for
_of_scripts = ["ModelConfig", "get_kbit_device_map", "get_peft_config", "get_quantization_config"]
__getattr__ = lazy_names(__name__, {"trl.scripts.model_config": _of_scripts}, absent.refuse)[0]
