"""Every field of the on-policy configs has an effect or raises, as `test_config_fields` has it for the offline ones."""

from dataclasses import replace

import pytest
import torch
from conformity import CASES, build, causal_lm, weights
from test_config_fields import HERE, own_fields
from tokenizers_for_tests import word_tokenizer

import trl
from trl.trainer.distillation_trainer import SUPERVISED
from trl.trainer.rollout_trainer import COLOCATED, ENGINE, SERVER
from trl.trainer.settings import CORRECTION

SHORT = {"generation_kwargs": {"stop_token_ids": list(range(30, 70))}}
"""completions of different lengths"""
MOVED = {"num_iterations": 3, "learning_rate": 0.05, "max_steps": 3}
"""the ratio leaves 1 within the run"""
ADAPTIVE = {"entropy_coef": 0.1, "use_adaptive_entropy": True, "entropy_target": 10.0}

CHANGED = {
    # (config, field): (case of the conformity suite, settings of both runs, settings that change the second)
    ("RolloutConfig", "learning_rate"): ("grpo", {}, {"learning_rate": 1e-3}),
    ("RolloutConfig", "num_generations"): ("grpo", {}, {"num_generations": 2}),
    ("RolloutConfig", "num_generations_eval"): ("grpo", {}, {"num_generations_eval": 2}),
    ("RolloutConfig", "max_prompt_length"): ("grpo", {}, {"max_prompt_length": 2}),
    ("RolloutConfig", "max_completion_length"): ("grpo", {}, {"max_completion_length": 4}),
    ("RolloutConfig", "steps_per_generation"): ("grpo", {}, {"steps_per_generation": 2}),
    ("RolloutConfig", "generation_batch_size"): ("grpo", {}, {"generation_batch_size": 8}),
    ("RolloutConfig", "num_iterations"): ("grpo", {}, {"num_iterations": 2}),
    ("RolloutConfig", "shuffle_dataset"): ("grpo", {}, {"shuffle_dataset": False}),
    ("RolloutConfig", "temperature"): ("grpo", {}, {"temperature": 0.5}),
    ("RolloutConfig", "top_p"): ("grpo", {}, {"top_p": 0.1}),
    ("RolloutConfig", "top_k"): ("grpo", {}, {"top_k": 3}),
    ("RolloutConfig", "min_p"): ("grpo", {}, {"min_p": 0.9}),
    ("RolloutConfig", "repetition_penalty"): ("grpo", {}, {"repetition_penalty": 9.0}),
    ("RolloutConfig", "generation_kwargs"): ("grpo", {}, SHORT),
    ("RewardedConfig", "reward_weights"): ("rloo", {}, {"reward_weights": [1.0, 0.0]}),
    ("RewardedConfig", "overlong_cache"): ("grpo", SHORT, {"overlong_cache": 4}),
    ("OnPolicyConfig", "beta"): ("grpo", {}, {"beta": 0.5}),
    ("OnPolicyConfig", "mask_truncated_completions"): ("grpo", SHORT, {"mask_truncated_completions": True}),
    ("OnPolicyConfig", "sync_ref_model"): (
        "grpo", {"beta": 0.5, "max_steps": 3}, {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ),
    ("OnPolicyConfig", "ref_model_mixup_alpha"): (
        "grpo", {"beta": 0.5, "max_steps": 3, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"ref_model_mixup_alpha": 0.1},
    ),
    ("OnPolicyConfig", "ref_model_sync_steps"): (
        "grpo", {"beta": 0.5, "max_steps": 3, "sync_ref_model": True, "ref_model_sync_steps": 2},
        {"ref_model_sync_steps": 1},
    ),
    ("GRPOConfig", "loss_type"): ("grpo", SHORT, {"loss_type": "dr_grpo"}),
    ("GRPOConfig", "epsilon"): ("grpo", MOVED, {"epsilon": 0.001}),
    ("GRPOConfig", "epsilon_high"): ("grpo", MOVED, {"epsilon_high": 0.001}),
    ("GRPOConfig", "delta"): ("grpo", {**MOVED, "epsilon_high": 0.001}, {"delta": 1.002}),
    ("GRPOConfig", "importance_sampling_level"): ("grpo", MOVED, {"importance_sampling_level": "sequence"}),
    ("GRPOConfig", "scale_rewards"): ("grpo", {}, {"scale_rewards": "none"}),
    ("GRPOConfig", "advantage"): ("grpo", {"generation_batch_size": 8}, {"advantage": "batch"}),
    ("GRPOConfig", "multi_objective_aggregation"): (
        "grpo-cispo", {}, {"multi_objective_aggregation": "sum_then_normalize"},
    ),
    ("GRPOConfig", "kl_estimator"): ("grpo", {**MOVED, "beta": 0.5}, {"kl_estimator": "k2"}),
    ("GRPOConfig", "kl_placement"): ("grpo", {**MOVED, "beta": 0.5, "num_iterations": 1}, {"kl_placement": "reward"}),
    ("GRPOConfig", "use_bias_correction_kl"): ("grpo", {**MOVED, "beta": 0.5}, {"use_bias_correction_kl": False}),
    ("GRPOConfig", "sapo_temperature_neg"): ("grpo", {**MOVED, "loss_type": "sapo"}, {"sapo_temperature_neg": 5.0}),
    ("GRPOConfig", "sapo_temperature_pos"): ("grpo", {**MOVED, "loss_type": "sapo"}, {"sapo_temperature_pos": 5.0}),
    ("GRPOConfig", "vespo_k_pos"): ("grpo", {**MOVED, "loss_type": "vespo"}, {"vespo_k_pos": 5.0}),
    ("GRPOConfig", "vespo_lambda_pos"): ("grpo", {**MOVED, "loss_type": "vespo"}, {"vespo_lambda_pos": 9.0}),
    ("GRPOConfig", "vespo_k_neg"): ("grpo", {**MOVED, "loss_type": "vespo"}, {"vespo_k_neg": 9.0}),
    ("GRPOConfig", "vespo_lambda_neg"): ("grpo", {**MOVED, "loss_type": "vespo"}, {"vespo_lambda_neg": 9.0}),
    ("GRPOConfig", "top_entropy_quantile"): ("grpo", {}, {"top_entropy_quantile": 0.5}),
    ("GRPOConfig", "entropy_coef"): ("grpo", {}, {"entropy_coef": 0.5}),
    ("GRPOConfig", "use_adaptive_entropy"): ("grpo", {"entropy_coef": 0.1}, {"use_adaptive_entropy": True}),
    ("GRPOConfig", "entropy_target"): ("grpo", ADAPTIVE, {"entropy_target": 0.2}),
    ("GRPOConfig", "entropy_coef_delta"): ("grpo", ADAPTIVE, {"entropy_coef_delta": 0.3}),
    ("GRPOConfig", "entropy_coef_min"): (
        "grpo", {**ADAPTIVE, "entropy_target": 4.595, "learning_rate": 0.05, "max_steps": 3}, {"entropy_coef_min": 0.1},
    ),
    ("GRPOConfig", "entropy_coef_max"): ("grpo", ADAPTIVE, {"entropy_coef_max": 0.1}),
    ("GRPOConfig", "off_policy_mask_threshold"): ("grpo", MOVED, {"off_policy_mask_threshold": 1e-6}),
    ("RLOOConfig", "num_generations"): ("rloo", {}, {"num_generations": 4}),
    ("RLOOConfig", "beta"): ("rloo", {}, {"beta": 0.9}),
    ("RLOOConfig", "epsilon"): ("rloo", MOVED, {"epsilon": 0.001}),
    ("RLOOConfig", "epsilon_high"): ("rloo", MOVED, {"epsilon_high": 0.001}),
    ("RLOOConfig", "normalize_advantages"): ("rloo", {}, {"normalize_advantages": False}),
    ("RLOOConfig", "reward_clip_range"): ("rloo", {}, {"reward_clip_range": (-0.5, 0.5)}),
    ("OnlineDPOConfig", "num_generations"): ("online-dpo", {}, {"num_generations": 4}),
    ("OnlineDPOConfig", "loss_type"): ("online-dpo", {}, {"loss_type": "hinge"}),
    ("OnlineDPOConfig", "beta"): ("online-dpo", {}, {"beta": 0.9}),
    ("RAFTConfig", "learning_rate"): ("raft", {}, {"learning_rate": 1e-3}),
    ("RAFTConfig", "keep_best"): ("raft", {}, {"keep_best": 1}),
    ("RAFTConfig", "min_reward"): ("raft", {}, {"min_reward": 0.5}),
    ("DistillationConfig", "num_generations"): ("distillation", {}, {"num_generations": 2}),
    ("DistillationConfig", "beta"): ("distillation", {}, {"beta": 0.1}),
    ("DistillationConfig", "lmbda"): ("gkd", {}, {"lmbda": 0.0}),
    ("GKDConfig", "max_length"): ("gkd", {"max_completion_length": 4}, {"max_length": 6}),
    ("GKDConfig", "temperature"): ("gkd", {"lmbda": 1.0}, {"temperature": 0.2}),
    ("GKDConfig", "beta"): ("gkd", {}, {"beta": 0.1}),
    ("GKDConfig", "lmbda"): ("gkd", {}, {"lmbda": 1.0}),
    ("GKDConfig", "max_completion_length"): ("gkd", {"lmbda": 1.0}, {"max_completion_length": 3}),
}  # fmt: skip
SHOWN = {
    # field: the test that shows its effect, whatever the trainer
    "model_init_kwargs": ("test_on_policy_fields", "test_model_by_name"),
    "activation_offloading": ("test_kept_activations", "test_a_run_learns_the_same"),
    "memory_plan": ("test_memory_plan", "test_layers_are_computed_again_where_nothing_was_said_of_it"),
    "on_non_finite": ("test_guard", "test_a_step_that_is_not_finite_is_left_out"),
    "max_non_finite_skips": ("test_guard", "test_no_more_than_so_many_steps_are_left_out"),
    "overwrite_output_dir": ("test_run_folder", "test_another_runs_checkpoints"),
    "dataset_num_proc": ("test_on_policy_fields", "test_how_prompts_are_tokenised_is_handed_on"),
    "chat_template_kwargs": ("test_on_policy_fields", "test_how_prompts_are_tokenised_is_handed_on"),
    "evaluation_strategy": ("test_reward_trainer", "test_older_spelling_of_the_evaluation_strategy"),
    "remove_unused_columns": ("test_conformity", "test_a_wrong_value_is_named"),
    "past_index": ("test_inherited_fields", "test_what_cannot_be_honoured_raises"),
    "router_aux_loss_coef": ("test_router", "test_trainers_add_the_balance"),
    "trust_remote_code": ("test_config_fields", "test_code_of_a_model_runs_only_where_it_is_trusted"),
    "bf16": ("test_config_fields", "test_precision_follows_the_device"),
    "logging_steps": ("test_config_fields", "test_frequent_logs"),
    "padding_free": ("test_conformity", "test_packed_equals_padded"),
    "pad_token": ("test_on_policy_fields", "test_the_pad_token_of_a_config_helps_the_tokenizer_that_lacks_one"),
    "disable_dropout": ("test_grpo", "test_dropout_is_off_unless_it_is_wanted"),
    "max_tool_calling_iterations": ("test_environment_rollouts", "test_tools_as_a_factory_reward_by_themselves"),
    "turn_level_credit": ("test_environment_rollouts", "test_credit_by_turns_in_training"),
    "compile_layers": ("test_inherited_fields", "test_compiled_layers_train_alike"),
    "max_staleness": ("test_staleness", "test_rollout_n_is_sampled_by_the_weights_of_rollout_n_minus_k"),
    "sync_in_flight": ("test_staleness", "test_in_flight_over_a_sync_nobody_waits"),
    "teacher_model_server_url": ("test_served_teachers", "test_all_log_probabilities_make_it_the_teacher_itself"),
    "teacher_top_logprobs": ("test_served_teachers", "test_the_best_tokens_and_the_rest_as_one"),
    "check_rewards": ("test_reward_check", "test_a_run_with_a_check_is_the_run_without"),
    "sampling_max_rows": ("test_on_policy_fields", "test_rows_that_are_sampled_at_a_time"),
    "gather": ("test_sharded", "test_two_ranks_train_as_one_process"),
    "ds3_gather_for_generation": ("test_zero", "test_sharded_by_zero_learns_the_same"),
    "save_rollouts": ("test_on_policy_fields", "test_rollouts_are_saved_unless_that_is_not_wanted"),
    "log_completions": ("test_on_policy_fields", "test_what_is_printed"),
    "num_completions_to_print": ("test_on_policy_fields", "test_what_is_printed"),
    "log_unique_prompts": ("test_on_policy_fields", "test_what_is_printed"),
    "use_vllm": ("test_vllm_trainers", "test_a_trainer_samples_by_a_server"),
    **dict.fromkeys(SERVER, ("test_vllm_trainers", "test_settings_of_a_server_reach_it")),
    **dict.fromkeys(COLOCATED, ("test_vllm_trainers", "test_settings_of_an_engine_in_this_process_reach_it")),
    **dict.fromkeys(ENGINE, ("test_vllm_trainers", "test_settings_of_a_server_reach_it")),
    "staleness_correction": ("test_engine_mismatch", "test_a_stale_rollout_of_the_local_sampler"),
    "rollout_logprobs": ("test_engine_mismatch", "test_a_rollout_func_says_whose_log_probabilities_it_gives"),
    "keep_sampling_mask": ("test_engine_mismatch", "test_what_was_left_to_choose_from_is_what_is_normalised_over"),
    "routing_replay": ("test_engine_mismatch", "test_a_mixtures_experts_are_those_of_the_engine"),
    **dict.fromkeys(CORRECTION, ("test_engine_mismatch", "test_bounds_of_the_weight")),
    "reward_timeout": ("test_grpo", "test_one_that_hangs_leaves_the_judgement_to_the_others"),
    "dynamic_sampling": ("test_grpo", "test_dynamic_sampling_fills_the_rollout"),
    "dynamic_sampling_max_rounds": ("test_grpo", "test_dynamic_sampling_stops_at_its_cap"),
    "teacher_model_name_or_path": ("test_on_policy_fields", "test_a_teacher_by_name"),
    "teacher_model_revision": ("test_settings", "test_a_teacher_by_two_equal_names_and_a_revision"),
    "num_mini_batches": ("test_rloo_earlier", "test_fields_become_todays"),
    "total_episodes": ("test_rloo_earlier", "test_fields_become_todays"),
    "stop_token": ("test_rloo_earlier", "test_wrong_values_are_named"),
    "stop_token_id": ("test_rloo_earlier", "test_a_run_by_the_earlier_names"),
    "normalize_reward": ("test_rloo_earlier", "test_rewards_are_normalised_over_the_batch"),
    "token_level_kl": ("test_rloo_earlier", "test_wrong_values_are_named"),
    "sft_model_path": ("test_rloo_earlier", "test_models_by_the_paths_of_the_config"),
    "seq_kd": ("test_teachers", "test_the_teachers_own_completions_are_learned"),
    "judge": ("test_online_dpo", "test_a_judge_by_its_name_in_a_module"),
    "truncation_mode": ("test_todays_fields", "test_lengths_of_gkd"),
    "completion_only_loss": ("test_todays_fields", "test_a_field"),
    "eos_token": ("test_todays_fields", "test_tokens_and_template_of_gkd"),
    "chat_template_path": ("test_todays_fields", "test_tokens_and_template_of_gkd"),
    **dict.fromkeys(SUPERVISED, ("test_todays_fields", "test_a_field")),
    "max_length": ("test_settings", "test_lengths_of_online_dpo"),
    "missing_eos_penalty": ("test_online_dpo", "test_a_completion_without_end_may_lose_its_pair"),
    "reward_model_path": ("test_online_dpo", "test_a_reward_model_by_its_folder_is_the_object"),
    "teacher_model_init_kwargs": ("test_on_policy_fields", "test_a_teacher_by_name"),
}
CONFIGS = {
    "GRPOConfig": ("OnPolicyConfig", "RewardedConfig", "RolloutConfig"),
    "RLOOConfig": ("OnPolicyConfig", "RewardedConfig", "RolloutConfig"),
    "OnlineDPOConfig": ("RewardedConfig", "RolloutConfig"),
    "RAFTConfig": ("RewardedConfig", "RolloutConfig"),
    "DistillationConfig": ("RolloutConfig",),
    "GKDConfig": ("DistillationConfig", "RolloutConfig"),
}
"""config: those whose fields go the same way in its trainer"""


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_in_a_table(config):
    kin = (config, *CONFIGS[config])
    missing = [n for n in own_fields(config) if n not in SHOWN and not any((one, n) in CHANGED for one in kin)]
    assert not missing


def outcome(case, folder, settings):
    """What a short run logs and what comes of it; without what counts seconds."""
    trainer = build(case, folder, **settings)
    trainer.train()
    trainer.evaluate()
    timed = ("runtime", "per_second", "time", "timed_out")
    logs = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]
    return logs, weights(trainer)


_unchanged = {}


@pytest.mark.parametrize(("config", "field"), CHANGED)
def test_a_changed_field_changes_the_training(config, field, tmp_path):
    case, base, change = CHANGED[config, field]
    key = (case, repr(base))
    if key not in _unchanged:
        _unchanged[key] = outcome(case, tmp_path, base)
    logs, trained = outcome(case, tmp_path, {**base, **change})
    same = all(torch.equal(value, trained[name]) for name, value in _unchanged[key][1].items())
    assert not same or logs != _unchanged[key][0]


def test_the_same_run_twice_is_no_change(tmp_path):
    """What the test above rests on."""
    first, second = outcome("grpo", tmp_path, {}), outcome("grpo", tmp_path, {})
    assert first[0] == second[0]
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())


@pytest.mark.parametrize(("file", "test"), sorted(set(SHOWN.values())))
def test_the_tests_named_here_exist(file, test):
    assert f"def {test}(" in (HERE / f"{file}.py").read_text()


@pytest.mark.filterwarnings("ignore:[0-9,]+ trained weights are stored in bfloat16")
def test_model_by_name(tmp_path, monkeypatch):
    causal_lm().save_pretrained(tmp_path / "model")
    monkeypatch.setitem(CASES, "grpo", replace(CASES["grpo"], model=lambda: str(tmp_path / "model")))
    trainer = build("grpo", tmp_path, model_init_kwargs={"dtype": "bfloat16"})
    assert trainer.model.dtype == torch.bfloat16


def test_a_teacher_by_name(tmp_path, monkeypatch):
    causal_lm(seed=7).save_pretrained(tmp_path / "teacher")
    monkeypatch.setitem(CASES, "distillation", replace(CASES["distillation"], arguments=dict))
    named = {"teacher_model_name_or_path": str(tmp_path / "teacher")}
    trainer = build("distillation", tmp_path, teacher_model_init_kwargs={"dtype": "bfloat16"}, **named)
    assert trainer.teacher.dtype == torch.bfloat16


def test_how_prompts_are_tokenised_is_handed_on(tmp_path, monkeypatch):
    seen = []

    def spy(dataset, job, **how):
        seen.append((job.template_kwargs, how["num_proc"]))
        return dataset, None

    monkeypatch.setattr("trl.trainer.rollout_trainer.tokenize", spy)
    build("grpo", tmp_path, dataset_num_proc=2, chat_template_kwargs={"thinking": False})
    assert seen == [({"thinking": False}, 2)] * 2


def test_the_pad_token_of_a_config_helps_the_tokenizer_that_lacks_one(tmp_path):
    bare = word_tokenizer()
    bare.pad_token = bare.eos_token = None
    arguments = {**CASES["grpo"].arguments(), "train_dataset": CASES["grpo"].rows(), "processing_class": bare}
    config = trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", pad_token="mat")
    trainer = trl.GRPOTrainer(model=causal_lm(), args=config, **arguments)
    assert trainer.processing_class.pad_token == "mat"


def test_rollouts_are_saved_unless_that_is_not_wanted(tmp_path):
    for wanted in (True, False):
        build("grpo", tmp_path / str(wanted), save_rollouts=wanted, max_steps=1).train()
        assert any((tmp_path / str(wanted)).rglob("*.parquet")) is wanted


def test_what_is_printed(tmp_path, capsys):
    shown = []
    for settings in ({}, {"num_completions_to_print": 1}, {"log_unique_prompts": True}):
        build("grpo", tmp_path, log_completions=True, max_steps=1, steps_per_generation=2, **settings).train()
        shown.append(capsys.readouterr().out)
    build("grpo", tmp_path, max_steps=1, steps_per_generation=2).train()
    assert all("early_letters" in text for text in shown)
    assert "step 1" not in capsys.readouterr().out
    assert len({len(text.splitlines()) for text in shown}) == 3


def test_rows_that_are_sampled_at_a_time(tmp_path):
    """The passes of a rollout have so many rows at most; what is drawn is the same."""
    drawn = []
    for most in (None, 3):
        trainer = build("grpo", tmp_path, sampling_max_rows=most, max_steps=1)
        tokens: list[int] = []
        trainer.model.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output, seen=tokens: seen.append(inputs[0].numel())
        )
        rows = [{"prompt": "a b c", "prompt_ids": [5, 6, 7]}] * 2
        rollout = trainer.source.draw(rows, 4, 0)
        drawn.append((rollout.completions, max(tokens[1:])))
    assert drawn[0][0] == drawn[1][0]
    assert drawn[1][1] <= 4 < drawn[0][1] == 8
