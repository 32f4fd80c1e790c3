"""Model wrappers, and everything that runs a model forward."""

import importlib

from trl.import_utils import is_diffusers_available, lazy_names

_names = {
    "trl.models.chat_setup": [
        "SIMPLE_CHAT_TEMPLATE", "clone_chat_template", "setup_chat_format", "unwrap_model_for_generation",
    ],
    "trl.models.modeling_base": ["PreTrainedModelWrapper", "create_reference_model"],
    "trl.models.modeling_value_head": [
        "SUPPORTED_ARCHITECTURES", "AutoModelForCausalLMWithValueHead", "AutoModelForSeq2SeqLMWithValueHead",
    ],
}  # fmt: skip
if is_diffusers_available():
    _names["trl.models.modeling_sd_base"] = [
        "DDPOPipelineOutput", "DDPOSchedulerOutput", "DDPOStableDiffusionPipeline",
        "DefaultDDPOStableDiffusionPipeline",
    ]  # fmt: skip


def _refuse(name: str) -> None:  # `legacy` lies above this room, so it is read when asked for
    importlib.import_module("trl.legacy.absent").refuse(name)


__getattr__, __dir__, __all__ = lazy_names(__name__, _names, _refuse)
