"""Names and fields of today's scripts: each works, says in one line what it does here, or raises what to do instead."""

import importlib
import inspect
import re
import warnings
from pathlib import Path

import conformity
import pytest
import torch
from conformity import build, causal_lm, history, pairs, prompts, tokenizer
from tokenizers_for_tests import word_tokenizer

import trl

WORKS, LINE = "works", "a line"
NAMES = {
    "trl": """ModelConfig ScriptArguments TrlParser DatasetMixtureConfig get_dataset get_peft_config
        get_quantization_config init_zero_verbose LogCompletionsCallback RichProgressCallback SyncRefModelCallback
        BEMACallback clone_chat_template get_training_chat_template""",
    "trl.rewards": "get_cosine_scaled_reward get_repetition_penalty_reward",
    "trl.models": "unwrap_model_for_generation",
    "trl.trainer": """SFTConfig DPOConfig GRPOConfig GRPOTrainer KTOConfig KTOTrainer RLOOConfig RLOOTrainer
        LogCompletionsCallback RichProgressCallback SyncRefModelCallback BEMACallback get_peft_config
        get_quantization_config""",
    "trl.trainer.utils": """pad entropy_from_logits selective_log_softmax flush_left nanstd split_tensor_dict
        SIMPLE_CHAT_TEMPLATE get_peft_config get_quantization_config get_kbit_device_map""",
    "trl.import_utils": "is_vllm_available is_deepspeed_available is_liger_kernel_available",
    "trl.scripts": "ScriptArguments TrlParser init_zero_verbose get_dataset DatasetMixtureConfig",
    "trl.scripts.utils": "ScriptArguments TrlParser get_dataset DatasetMixtureConfig",
    "trl.commands.cli_utils": "SFTScriptArguments DPOScriptArguments TrlParser init_zero_verbose",
    "trl.data_utils": "apply_chat_template is_conversational maybe_apply_chat_template pack_dataset extract_prompt",
    "trl.chat_template_utils": "clone_chat_template get_training_chat_template",
    "trl.models.utils": "unwrap_model_for_generation setup_chat_format",
    "trl.trainer.callbacks": "LogCompletionsCallback",
    "trl.trainer.model_config": "ModelConfig",
    "trl.trainer.base_config": "_BaseConfig",
    "trl.trainer.base_trainer": "_BaseTrainer",
    "trl.trainer.rloo_config": "RLOOConfig",
    "trl.experimental.cpo": "CPOConfig CPOTrainer",
    "trl.experimental.orpo": "ORPOConfig ORPOTrainer",
    "trl.experimental.gkd": "GKDConfig GKDTrainer",
    "trl.experimental.online_dpo": "OnlineDPOConfig OnlineDPOTrainer",
    "trl.experimental.distillation": "DistillationConfig DistillationTrainer",
    "trl.experimental.prm": "PRMConfig PRMTrainer",
    "trl.experimental.ppo": "PPOConfig PPOTrainer",
    **dict.fromkeys((f"trl.scripts.{name}" for name in ("sft", "dpo", "reward", "kto", "grpo", "rloo")), ""),
}
"""what works"""
RAISES = {
    "trl": """WeaveCallback add_response_schema supports_tool_calling prepare_multimodal_messages
        prepare_multimodal_messages_vllm""",
    "trl.models": "get_act_offloading_ctx_manager prepare_deepspeed prepare_fsdp",
    "trl.trainer": "WeaveCallback ensure_master_addr_port patch_chunked_lm_head",
    "trl.trainer.utils": """RepeatSampler shuffle_sequence_dict generate_model_card print_prompt_completions_sample
        compute_flops_per_token compute_mfu adjusted_mfu hash_module use_adapter get_callable_name
        repeat_iterable_dataset""",
    "trl.trainer.sft_trainer": "DataCollatorForLanguageModeling dft_loss",
    "trl.trainer.dpo_trainer": "DataCollatorForPreference",
    "trl.trainer.reward_trainer": "DataCollatorForPreference",
    "trl.trainer.kto_trainer": "DataCollatorForUnpairedPreference",
}
"""an ImportError with what to use instead"""

VLLM = {
    "vllm_mode": "server", "vllm_gpu_memory_utilization": 0.5, "vllm_server_host": "a", "vllm_server_port": 1,
    "vllm_server_base_url": "http://a", "vllm_server_timeout": 1.0, "vllm_enable_sleep_mode": True,
    "vllm_tensor_parallel_size": 2, "vllm_max_model_length": 5, "vllm_model_impl": "transformers",
    "vllm_group_port": 1, "vllm_structured_outputs_regex": "a",
}  # fmt: skip
SAMPLER = {"cache_implementation": "static", "log_multimodal": False}
LINES = {
    "SFTConfig": {"activation_offloading": True, "pad_to_multiple_of": 8, "use_mps_device": True},
    "DPOConfig": {"activation_offloading": True, "pad_to_multiple_of": 8, "padding_value": 0,
                  "is_encoder_decoder": False, "use_logits_to_keep": True},
    "KTOConfig": {"activation_offloading": True, "padding_value": 0, "is_encoder_decoder": False},
    "RewardConfig": {"activation_offloading": True, "pad_to_multiple_of": 8},
    "GRPOConfig": {**VLLM, **SAMPLER, "cast_lm_head_to_fp32": True, "use_transformers_paged": True,
                   "log_completions_hub_repo": "x", "transformers_continuous_batching_config": {}},
    "RLOOConfig": {**VLLM, **SAMPLER},
    "DistillationConfig": {**VLLM, **SAMPLER, "log_completions_steps": 5, "seq_kd": True,
                           "vllm_importance_sampling_correction": False, "vllm_importance_sampling_cap": 2.5},
    "GKDConfig": {"packing": True, "eval_packing": True, "packing_strategy": "wrapped", "loss_type": "nll",
                  "dataset_text_field": "other", "dataset_kwargs": {"skip_prepare_dataset": True},
                  "assistant_only_loss": True, "dataset_batch_size": 7, "activation_offloading": True},
    "OnlineDPOConfig": {**VLLM, **SAMPLER, "gpu_memory_utilization": 0.5, "use_transformers_paged": True,
                        "use_transformers_continuous_batching": True, "per_device_train_batch_size": 1,
                        "beta": [0.1, 0.2, 0.3, 0.4]},
    "CPOConfig": {"padding_value": 0, "is_encoder_decoder": False},
    "ORPOConfig": {"padding_value": 0, "is_encoder_decoder": False},
}  # fmt: skip
TEACHERS = {
    "teacher_model_name_or_path": "a", "teacher_model_revision": "main", "teacher_model_init_kwargs": {"revision": "a"},
    "disable_dropout": False, "beta": 0.2, "lmbda": 0.25, "model_init_kwargs": {"dtype": "bfloat16"},
}  # fmt: skip
SAMPLING = {
    "temperature": 0.7, "top_p": 0.95, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    "generation_kwargs": {"min_new_tokens": 2},
}  # fmt: skip
WORKING = {
    "SFTConfig": {"trust_remote_code": True, "router_aux_loss_coef": 0.001, "loss_type": "chunked_nll",
                  "max_seq_length": 64, "warmup_ratio": 0.1, "group_by_length": True, "logging_dir": "x",
                  "overwrite_output_dir": True, "save_safetensors": True, "no_cuda": True},
    "DPOConfig": {"loss_type": "sigmoid_norm", "label_pad_token_id": -100, "max_target_length": 5},
    "KTOConfig": {"train_sampling_strategy": "sequential", "label_pad_token_id": -100},
    "GRPOConfig": {"use_bias_correction_kl": False, "disable_dropout": False, "ds3_gather_for_generation": False,
                   "vllm_importance_sampling_correction": False, "vllm_importance_sampling_mode": "token_mask",
                   "vllm_importance_sampling_clip_max": 2.5, "vllm_importance_sampling_clip_min": 0.1},
    "RLOOConfig": {"rloo_k": 4, "kl_coef": 0.1, "num_ppo_epochs": 2},
    "DistillationConfig": {**TEACHERS, **SAMPLING, "max_completion_length": 5, "shuffle_dataset": False,
                           "max_prompt_length": 9, "num_generations": 2},
    "GKDConfig": {**TEACHERS, **SAMPLING, "seq_kd": True, "max_new_tokens": 5, "dataset_num_proc": 2,
                  "padding_free": False, "pad_token": "a", "max_length": 512, "max_seq_length": 512,
                  "truncation_mode": "keep_start", "completion_only_loss": True, "eos_token": "d",
                  "chat_template_path": "a.jinja"},
    "OnlineDPOConfig": {**SAMPLING, "beta": [0.1, 0.2], "max_new_tokens": 5, "max_length": 512, "loss_type": "ipo",
                        "missing_eos_penalty": 1.0, "reward_model_path": "owner/model", "judge": "module:name",
                        "reward_weights": [1.0, 0.5], "dataset_num_proc": 2, "disable_dropout": False,
                        "model_init_kwargs": {"dtype": "bfloat16"}},
    "CPOConfig": {"loss_type": "simpo"},
    "PPOConfig": {"num_ppo_epochs": 1, "kl_coef": 0.1, "total_episodes": 4, "response_length": 5,
                  "num_mini_batches": 1, "stop_token_id": 3, "stop_token": "eos", "missing_eos_penalty": 1.0,
                  "reward_model_path": "a", "sft_model_path": "b"},
}  # fmt: skip
ERRORS = {
    "GRPOConfig": {f"vespo_{name}": (1.5, "loss_type='vespo'") for name in ("k_pos", "lambda_pos", "k_neg")},
    "DistillationConfig": {"beta": (2.0, "[0, 1]"), "lmbda": (-0.5, "a share in [0, 1]"),
                           "teacher_model_init_kwargs": ("{", "")},
    "GKDConfig": {"completion_only_loss": (False, "leave it out"),
                  "max_length": (100, "give more than max_completion_length=128"),},
    "DPOConfig": {"tools": ([print], "column `tools`")},
    "KTOConfig": {"generate_during_eval": (True, "LogCompletionsCallback")},
    "OnlineDPOConfig": {"beta": ([], "one for each epoch"), "judge": ("pair_rm", "an object as the trainer's `judge`"),
                        "loss_type": ("x", "choose one of"),
                        "missing_eos_penalty": (-1.0, "a number >= 0"),
                        "max_length": (64, "give more than max_completion_length=64")},
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


@pytest.mark.parametrize(("module", "name"), [(m, name) for m, names in RAISES.items() for name in names.split()])
def test_names_that_say_what_to_use(module, name):
    with pytest.raises(ImportError, match=f"^{name} is not in this package: "):
        exec(f"from {module} import {name}")


@pytest.mark.parametrize("module", ["trl.models.activation_offloading", "trl.extras.profiling", "trl.skills"])
def test_modules_that_say_what_to_use(module):
    with pytest.raises(ImportError, match=f"^{re.escape(module)} is not in this package: "):
        importlib.import_module(module)


def test_another_name_of_a_trainers_module_is_a_plain_error():
    with pytest.raises(ImportError, match=r"cannot import name 'Anything' from 'trl\.trainer\.sft_trainer'"):
        exec("from trl.trainer.sft_trainer import Anything")


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
    pages = Path(__file__).parents[2] / "docs" / "deviations"
    text = (pages / "trainers.md").read_text() + (pages / "on_policy.md").read_text()
    for name in ("gradient_checkpointing", "padding_free", "pad_to_multiple_of", "train_sampling_strategy",
                 "max_length", "disable_dropout", "remove_unused_columns", "use_bias_correction_kl"):  # fmt: skip
        assert f"`{name}" in text or f".{name}`" in text, name


# --- what the fields do -----------------------------------------------------------------------------------------------


def test_lengths_of_gkd(tmp_path):
    made = trl.GKDConfig(output_dir=str(tmp_path), max_length=512, max_new_tokens=100, report_to="none")
    assert (made.max_prompt_length, made.max_completion_length) == (412, 100)
    named = trl.GKDConfig(output_dir=str(tmp_path), max_seq_length=300, max_prompt_length=50, report_to="none")
    assert (named.max_length, named.max_seq_length, named.max_prompt_length) == (300, None, 50)
    with pytest.raises(ValueError, match=r"^truncation_mode='keep_start': a prompt that is too long loses"):
        trl.GKDConfig(output_dir=str(tmp_path), max_length=300, truncation_mode="keep_start", report_to="none")


def test_tokens_and_template_of_gkd(tmp_path, monkeypatch):
    monkeypatch.setattr(conformity, "tokenizer", word_tokenizer)  # a trainer gives the tokenizer its own tokens
    (tmp_path / "a.jinja").write_text("{{ messages[0].content }}")
    trainer = build("gkd", tmp_path, eos_token="d", chat_template_path=str(tmp_path / "a.jinja"))
    assert trainer.processing_class.eos_token == "d"
    assert trainer.processing_class.chat_template == "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("beta", "scales"),
    [([0.1], [0.1, 0.1, 0.1]), ([0.5, 0.2], [0.5, 0.2, 0.2]), (0.3, [0.3, 0.3, 0.3]), ("[0.4, 0.2]", [0.4, 0.2, 0.2])],
)
def test_the_scale_of_online_dpo_by_epoch(beta, scales, tmp_path):
    made = trl.OnlineDPOConfig(output_dir=str(tmp_path), beta=beta, report_to="none")
    assert [made.beta_at(epoch) for epoch in (0.9, 1.0, 7.5)] == scales
    assert made.beta_at(None) == scales[0]


def test_the_scale_of_the_epoch_is_learned_with(tmp_path):
    def losses(beta):
        trainer = build("online-dpo", tmp_path, beta=beta, num_train_epochs=2, max_steps=-1)
        trainer.train()
        return history(trainer, "epoch"), history(trainer, "loss")

    epochs, changed = losses([0.1, 3.0])
    _, constant = losses(0.1)
    first = sum(epoch < 1 for epoch in epochs)
    assert changed[:first] == constant[:first]
    assert changed[first:] != constant[first:]


def with_adapters():
    """A policy with the adapters `learned`, which is active, and `kept`; both have weights of their own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(causal_lm(), lora, adapter_name="learned")
    model.add_adapter("kept", lora)
    return model


def weights_of(model, name):
    return {key: value.detach().clone() for key, value in model.named_parameters() if f".{name}." in key}


def trained(trainer, config, folder, model, rows, **given):
    ref_model = given.pop("ref_model", None)
    args = config(output_dir=str(folder), max_steps=2, logging_steps=1, learning_rate=1e-2, report_to="none",
                  save_strategy="no", per_device_train_batch_size=2, seed=3, **given)  # fmt: skip
    made = trainer(model, ref_model, args=args, train_dataset=rows, processing_class=tokenizer())
    made.train()
    return made


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_adapters_of_one_model_by_name(kind, tmp_path):
    trainer, config, rows = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config"), pairs()
    model, apart = with_adapters(), with_adapters()
    before = {name: weights_of(model, name) for name in ("learned", "kept")}
    apart.set_adapter("kept")
    named = trained(trainer, config, tmp_path, model, rows, model_adapter_name="learned", ref_adapter_name="kept")
    assert any((value != before["learned"][key]).any() for key, value in weights_of(model, "learned").items())
    assert all((value == before["kept"][key]).all() for key, value in weights_of(model, "kept").items())
    assert named.ref_model.base_model.model.lm_head.weight is model.base_model.model.lm_head.weight
    assert model.active_adapter == "learned"
    given = trained(trainer, config, tmp_path, with_adapters(), rows, ref_model=apart)
    assert history(named, "loss") == pytest.approx(history(given, "loss"), abs=1e-6)
    other = trained(trainer, config, tmp_path, with_adapters(), rows)
    assert history(named, "loss") != pytest.approx(history(other, "loss"), abs=1e-6)


def test_sharded_weights_are_not_shared(monkeypatch):
    from trl.models import reference

    model = with_adapters()
    assert reference.copy_with_adapter(model, "kept").base_model.model.lm_head.weight is model.lm_head.weight
    monkeypatch.setattr(reference, "is_fsdp_enabled", lambda: True)
    copy = reference.copy_with_adapter(model, "kept")
    assert copy.lm_head.weight is not model.lm_head.weight
    assert (copy.active_adapter, model.active_adapter, list(copy.peft_config)) == ("kept", "learned", ["kept"])


def test_the_adapter_to_train_is_made_active(tmp_path):
    model = with_adapters()
    before = weights_of(model, "learned")
    trained(trl.DPOTrainer, trl.DPOConfig, tmp_path, model, pairs(), model_adapter_name="kept")
    assert model.active_adapter == "kept"
    assert all((value == before[key]).all() for key, value in weights_of(model, "learned").items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"model_adapter_name": "a"},
            r"^model_adapter_name='a': the model has no such adapter \(it has learned, kept\)",
        ),
        ({"ref_adapter_name": "learned"}, "^ref_adapter_name='learned': it is the adapter that is trained"),
        ({"ref_adapter_name": "kept", "sync_ref_model": True}, "^ref_adapter_name='kept': an adapter that is the"),
        ({"ref_adapter_name": "kept", "ref_model": "x"}, "^ref_adapter_name='kept': the reference is given as ref_mod"),
    ],
)
def test_a_wrong_adapter_is_named(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trained(trl.DPOTrainer, trl.DPOConfig, tmp_path, with_adapters(), pairs(), **given)


def test_an_adapter_of_a_model_without_any_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^model_adapter_name='a': the model has no such adapter \(it has none\)"):
        trained(trl.DPOTrainer, trl.DPOConfig, tmp_path, causal_lm(), pairs(), model_adapter_name="a")


# --- arguments of trainers, and the faults of real scripts ------------------------------------------------------------


ARGUMENTS = {
    "SFTTrainer": "compute_loss_func quantization_config processing_class peft_config formatting_func",
    "DPOTrainer": "quantization_config processing_class",
    "KTOTrainer": "quantization_config peft_config",
    "GRPOTrainer": "quantization_config environment_factory rollout_func tools",
    "RLOOTrainer": "quantization_config",
    "OnlineDPOTrainer": "ref_model reward_model reward_funcs judge reward_processing_class peft_config",
    "GKDTrainer": "teacher_model processing_class peft_config quantization_config",
    "PPOTrainer": """args processing_class model ref_model reward_model value_model train_dataset eval_dataset
        peft_config""",
}
FAULTS = {
    1: "trainer/test_overrides.py test_an_override_is_called_and_super_gives_the_same_numbers",
    2: "scripts/test_configs_parse.py test_parsing_equals_constructing",
    3: "scripts/test_configs_parse.py test_parsing_equals_constructing",
    4: "scripts/test_configs_parse.py test_the_columns_option_of_todays_documentation",
    5: "trainer/test_ppo_forms.py test_which_form_a_config_has",
    6: "trainer/test_settings.py test_a_teacher_by_two_equal_names_and_a_revision",
    7: "trainer/test_sft_trainer.py test_older_packing_of_conversations",
    8: "trainer/test_settings.py test_the_template_of_a_folder",
    9: "trainer/test_overrides.py test_a_packed_batch_says_how_to_get_rows",
    10: "trainer/test_settings.py test_a_collator_without_labels_is_named",
    11: "trainer/test_settings.py test_lengths_of_online_dpo",
    12: "trainer/test_trained_precision.py test_the_head_of_a_classifier_is_trained_and_saved",
    13: "trainer/test_bad_input.py test_max_length_beyond_the_model",
    14: "trainer/test_todays_fields.py test_pages_name_modules_that_exist",
    15: "trainer/test_attributes.py test_what_a_callback_sets_counts_from_the_next_step_on",
    16: "trainer/test_attributes.py test_a_batch_shows_its_rows",
}
"""number of a fault -> the test that holds it"""
CONTRACTS = {
    "log_extra, log_metric": "rewards/test_panel.py",
    "prompts of an IterableDataset": "trainer/test_rollout_cases.py test_a_stream_of_prompts_is_read_over_and_over",
    "rollout_func of today": "trainer/test_rollout_cases.py test_rollout_functions_of_today",
    "environments": "trainer/test_rollout_cases.py test_environments_reach_the_functions",
    "compute_loss_func": "trainer/test_overrides.py test_compute_loss_func",
    "quantization_config": "trainer/test_config_fields.py test_quantisation_is_told_to_the_loader",
}
"""what trainers are given -> the test that holds it"""


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_of_a_trainer(name):
    known = {key for one in getattr(trl, name).__mro__ for key in inspect.signature(one.__init__).parameters}
    assert set(ARGUMENTS[name].split()) <= known


@pytest.mark.parametrize(("factory", "kind"), [([dict], "list"), ("a.B", "str"), (3, "int")])
def test_a_factory_that_makes_nothing_is_named(factory, kind):
    with pytest.raises(ValueError, match=f"^environment_factory: a {kind} makes no environment; give a class or"):
        trl.RLOOTrainer(causal_lm(), "repetition", train_dataset=prompts(), environment_factory=factory,
                        processing_class=tokenizer())  # fmt: skip


@pytest.mark.parametrize("place", sorted({*FAULTS.values(), *CONTRACTS.values()}))
def test_a_fault_has_its_test(place):
    file, *names = place.split()
    text = (Path(__file__).parents[1] / file).read_text()
    assert all(f"def {name}" in text for name in names)


def test_pages_name_modules_that_exist():
    """A page that says where a name stands is right."""
    root = Path(__file__).parents[2]
    assert "`digits_pipeline()` of `examples/digits/digits_base.py`" in (root / "docs" / "ddpo.md").read_text()
    assert "\ndef digits_pipeline(" in (root / "examples" / "digits" / "digits_base.py").read_text()
