"""Scripts: the settings that a script or the `trl` command reads, and the training jobs behind the command."""

from trl.import_utils import lazy_names

_names = {
    "trl.scripts.data_config": [
        "DatasetMixtureConfig", "DPOScriptArguments", "GRPOScriptArguments", "RLOOScriptArguments",
        "SFTScriptArguments", "ScriptArguments", "get_dataset",
    ],
    "trl.scripts.model_config": ["ModelConfig", "get_kbit_device_map", "get_peft_config", "get_quantization_config"],
    "trl.scripts.parser": ["TrlParser", "init_zero_verbose"],
}  # fmt: skip

__getattr__, __dir__, __all__ = lazy_names(__name__, _names)
