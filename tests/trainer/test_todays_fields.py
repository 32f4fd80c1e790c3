"""Names and fields of today's scripts: each works, says in one line what it does here, or raises what to do instead."""

import importlib
import warnings

import pytest

import trl

WORKS, LINE = "works", "a line"
NAMES = {
    "trl": """ModelConfig ScriptArguments TrlParser DatasetMixtureConfig get_dataset get_peft_config
        get_quantization_config init_zero_verbose LogCompletionsCallback RichProgressCallback SyncRefModelCallback
        BEMACallback clone_chat_template get_training_chat_template""",
    "trl.rewards": "get_cosine_scaled_reward get_repetition_penalty_reward",
    "trl.models": "unwrap_model_for_generation",
    "trl.trainer": "SFTConfig DPOConfig GRPOConfig GRPOTrainer KTOConfig KTOTrainer RLOOConfig RLOOTrainer",
    "trl.trainer.utils": "pad entropy_from_logits selective_log_softmax flush_left nanstd split_tensor_dict",
}
"""what works"""
RAISES = [
    "WeaveCallback", "add_response_schema", "supports_tool_calling", "prepare_multimodal_messages",
    "prepare_multimodal_messages_vllm", "patch_chunked_lm_head",
]  # fmt: skip
"""an ImportError with what to use instead"""

VLLM = {
    "vllm_mode": "server", "vllm_gpu_memory_utilization": 0.5, "vllm_server_host": "a", "vllm_server_port": 1,
    "vllm_server_base_url": "http://a", "vllm_server_timeout": 1.0, "vllm_enable_sleep_mode": True,
    "vllm_tensor_parallel_size": 2, "vllm_max_model_length": 5, "vllm_model_impl": "transformers",
    "vllm_group_port": 1, "vllm_structured_outputs_regex": "a",
}  # fmt: skip
SAMPLER = {"cache_implementation": "static", "ds3_gather_for_generation": False, "log_multimodal": False}
LINES = {
    "SFTConfig": {"activation_offloading": True, "pad_to_multiple_of": 8, "use_mps_device": True},
    "DPOConfig": {"activation_offloading": True, "pad_to_multiple_of": 8, "padding_value": 0,
                  "is_encoder_decoder": False, "use_logits_to_keep": True},
    "KTOConfig": {"activation_offloading": True, "padding_value": 0, "is_encoder_decoder": False},
    "RewardConfig": {"activation_offloading": True, "pad_to_multiple_of": 8},
    "GRPOConfig": {**VLLM, **SAMPLER, "cast_lm_head_to_fp32": True, "use_transformers_paged": True,
                   "log_completions_hub_repo": "x", "transformers_continuous_batching_config": {},
                   "vllm_importance_sampling_correction": False, "vllm_importance_sampling_mode": "token_mask",
                   "vllm_importance_sampling_cap": 2.5, "vllm_importance_sampling_clip_min": 0.1},
    "RLOOConfig": {**VLLM, **SAMPLER},
    "DistillationConfig": {**VLLM, "log_completions_steps": 5},
    "OnlineDPOConfig": {"cache_implementation": "static", "vllm_mode": "server", "per_device_train_batch_size": 1},
    "CPOConfig": {"padding_value": 0, "is_encoder_decoder": False},
    "ORPOConfig": {"padding_value": 0, "is_encoder_decoder": False},
}  # fmt: skip
WORKING = {
    "SFTConfig": {"trust_remote_code": True, "router_aux_loss_coef": 0.001, "loss_type": "chunked_nll",
                  "max_seq_length": 64, "warmup_ratio": 0.1, "group_by_length": True, "logging_dir": "x",
                  "overwrite_output_dir": True, "save_safetensors": True, "no_cuda": True},
    "DPOConfig": {"loss_type": "sigmoid_norm", "label_pad_token_id": -100, "max_target_length": 5},
    "KTOConfig": {"train_sampling_strategy": "sequential", "label_pad_token_id": -100},
    "GRPOConfig": {"use_bias_correction_kl": False, "disable_dropout": False},
    "RLOOConfig": {"rloo_k": 4, "kl_coef": 0.1, "num_ppo_epochs": 2},
    "DistillationConfig": {"teacher_model_revision": "main", "top_p": 0.95},
    "GKDConfig": {"max_new_tokens": 5},
    "OnlineDPOConfig": {"max_new_tokens": 5, "max_length": 512, "missing_eos_penalty": 1.0, "reward_model_path": "x"},
    "CPOConfig": {"loss_type": "simpo"},
    "PPOConfig": {"num_ppo_epochs": 1, "kl_coef": 0.1, "total_episodes": 4, "response_length": 5,
                  "num_mini_batches": 1, "stop_token_id": 3, "stop_token": "eos", "missing_eos_penalty": 1.0,
                  "reward_model_path": "a", "sft_model_path": "b"},
}  # fmt: skip
ERRORS = {
    "GRPOConfig": {f"vespo_{name}": (1.5, "loss_type='vespo'") for name in ("k_pos", "lambda_pos", "k_neg")},
    "GKDConfig": {"seq_kd": (True, "lmbda=0")},
    "CPOConfig": {"simpo_gamma": (0.3, "loss_type='simpo'"), "alpha": (0.5, "loss_type='simpo'")},
}  # fmt: skip
FIELDS = [
    *((name, field, value, LINE) for name, given in LINES.items() for field, value in given.items()),
    *((name, field, value, WORKS) for name, given in WORKING.items() for field, value in given.items()),
    *((name, field, *pair) for name, given in ERRORS.items() for field, pair in given.items()),
]


@pytest.mark.parametrize("module", NAMES)
def test_names_that_work(module):
    held = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(held, name)] == []


@pytest.mark.parametrize("name", RAISES)
def test_names_that_say_what_to_use(name):
    with pytest.raises(ImportError, match=f"^{name} is not in this package: "):
        exec(f"from trl import {name}")


@pytest.mark.parametrize(("name", "field", "value", "outcome"), FIELDS)
def test_a_field(name, field, value, outcome, tmp_path, caplog):
    given = {"output_dir": str(tmp_path), field: value, **({} if name == "PPOConfig" else {"report_to": "none"})}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if outcome not in (WORKS, LINE):
            with pytest.raises(ValueError, match=f"^{field}=") as error:
                getattr(trl, name)(**given)
            assert outcome in str(error.value)
            return
        getattr(trl, name)(**given)
    said = [line for line in [*caplog.messages, *(str(each.message) for each in caught)] if f"{field}=" in line]
    assert len(said) == (outcome == LINE), said


def test_how_a_default_differs_stands_in_the_pages():
    """Defaults of release 1.16 that are others here."""
    from pathlib import Path

    pages = Path(__file__).parents[2] / "docs" / "deviations"
    text = (pages / "trainers.md").read_text() + (pages / "on_policy.md").read_text()
    for name in ("gradient_checkpointing", "padding_free", "pad_to_multiple_of", "train_sampling_strategy",
                 "max_length", "disable_dropout", "remove_unused_columns", "use_bias_correction_kl"):  # fmt: skip
        assert f"`{name}" in text or f".{name}`" in text, name
