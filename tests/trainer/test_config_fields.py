"""Every field of our own has an effect or raises: a changed value changes what is trained, or another test shows it."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from conformity import build, history
from transformers import TrainingArguments

import trl
from trl.trainer.settings import NO_EFFECT, TRANSLATED

HERE = Path(__file__).parent

CHANGED = {
    # field: (case of the conformity suite, settings that change it beside others that it needs)
    ("SFTConfig", "dataset_text_field"): ("sft", {"dataset_text_field": "other"}),
    ("SFTConfig", "max_length"): ("sft", {"max_length": 4}),
    ("SFTConfig", "truncation_mode"): ("sft", {"max_length": 4, "truncation_mode": "keep_end"}),
    ("SFTConfig", "loss_type"): ("sft", {"loss_type": "dft"}),
    ("SFTConfig", "packing"): ("sft", {"packing": True, "max_length": 12}),
    ("SFTConfig", "packing_strategy"): ("sft-packing", {"packing_strategy": "wrapped"}),
    ("SFTConfig", "eval_packing"): ("sft-packing", {"eval_packing": True}),
    ("SFTConfig", "shuffle_dataset"): ("sft", {"shuffle_dataset": True}),
    ("SFTConfig", "dataset_kwargs"): ("sft", {"dataset_kwargs": {"append_concat_token": False}}),
    ("SFTConfig", "num_of_sequences"): (
        "sft-packing", {"packing_strategy": "constant_length", "num_of_sequences": 2, "chars_per_token": 1.0},
    ),
    ("SFTConfig", "chars_per_token"): (
        "sft-packing", {"packing_strategy": "constant_length", "num_of_sequences": 2, "chars_per_token": 1.0},
    ),
    ("SFTConfig", "learning_rate"): ("sft", {"learning_rate": 1e-3}),
    ("RewardConfig", "max_length"): ("reward", {"max_length": 4}),
    ("RewardConfig", "center_rewards_coefficient"): ("reward", {"center_rewards_coefficient": 0.5}),
    ("PRMConfig", "max_length"): ("prm", {"max_length": 5}),
    ("PRMConfig", "max_prompt_length"): ("prm", {"max_prompt_length": 2}),
    ("PRMConfig", "max_completion_length"): ("prm", {"max_completion_length": 2}),
    ("PRMConfig", "step_separator"): ("prm", {"step_separator": " . "}),
    ("PRMConfig", "train_on_last_step_only"): ("prm", {"train_on_last_step_only": True}),
    ("DPOConfig", "beta"): ("dpo-ipo", {"beta": 0.7}),
    ("DPOConfig", "max_length"): ("dpo-sigmoid", {"max_length": 4}),
    ("DPOConfig", "max_prompt_length"): ("dpo-sigmoid", {"max_prompt_length": 2}),
    ("DPOConfig", "max_completion_length"): ("dpo-sigmoid", {"max_completion_length": 2}),
    ("DPOConfig", "truncation_mode"): ("dpo-sigmoid", {"max_prompt_length": 2, "truncation_mode": "keep_end"}),
    ("DPOConfig", "label_smoothing"): ("dpo-sigmoid", {"label_smoothing": 0.2}),
    ("DPOConfig", "loss_type"): ("dpo-sigmoid", {"loss_type": "hinge"}),
    ("DPOConfig", "loss_weights"): ("dpo-sigmoid", {"loss_type": ["sigmoid"], "loss_weights": [0.5]}),
    ("DPOConfig", "reference_free"): ("dpo-sigmoid", {"reference_free": True}),
    ("DPOConfig", "f_divergence_type"): ("dpo-sigmoid", {"f_divergence_type": "js_divergence"}),
    ("DPOConfig", "f_alpha_divergence_coef"): (
        "dpo-sigmoid", {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9},
    ),
    ("DPOConfig", "ld_alpha"): ("dpo-sigmoid", {"ld_alpha": 0.2}),
    ("DPOConfig", "use_weighting"): ("dpo-sigmoid", {"use_weighting": True}),
    ("DPOConfig", "discopop_tau"): ("dpo-sigmoid", {"loss_type": "discopop", "discopop_tau": 0.5}),
    ("DPOConfig", "ipo_average_log_prob"): ("dpo-ipo", {"ipo_average_log_prob": True}),
    ("DPOConfig", "rpo_alpha"): ("dpo-sigmoid", {"rpo_alpha": 0.3}),
    ("DPOConfig", "sync_ref_model"): ("dpo-sigmoid", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    ("DPOConfig", "ref_model_mixup_alpha"): (
        "dpo-sigmoid", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.1},
    ),
    ("DPOConfig", "ref_model_sync_steps"): ("dpo-sigmoid", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    ("ORPOConfig", "beta"): ("orpo", {"beta": 0.7}),
    ("CPOConfig", "loss_type"): ("cpo", {"loss_type": "hinge"}),
    ("CPOConfig", "cpo_alpha"): ("cpo", {"cpo_alpha": 0.2}),
    ("CPOConfig", "simpo_gamma"): ("cpo", {"loss_type": "simpo", "simpo_gamma": 0.1}),
    ("CPOConfig", "alpha"): ("cpo", {"loss_type": "simpo", "alpha": 0.5}),
    ("CPOConfig", "label_smoothing"): ("cpo", {"label_smoothing": 0.2}),
    ("SimPOConfig", "beta"): ("simpo", {"beta": 1.0}),
    ("SimPOConfig", "gamma"): ("simpo", {"gamma": 1.0}),
    ("SimPOConfig", "alpha"): ("simpo", {"alpha": 0.5}),
    ("SimPOConfig", "label_smoothing"): ("simpo", {"label_smoothing": 0.2}),
    ("KTOConfig", "beta"): ("kto", {"beta": 0.7}),
    ("KTOConfig", "loss_type"): ("kto", {"loss_type": "apo_zero_unpaired"}),
    ("KTOConfig", "desirable_weight"): ("kto", {"desirable_weight": 0.5}),
    ("KTOConfig", "undesirable_weight"): ("kto", {"undesirable_weight": 0.5}),
    ("KTOConfig", "max_length"): ("kto", {"max_length": 4}),
    ("KTOConfig", "max_prompt_length"): ("kto", {"max_prompt_length": 2}),
    ("KTOConfig", "max_completion_length"): ("kto", {"max_completion_length": 2}),
    ("KTOConfig", "truncation_mode"): ("kto", {"max_prompt_length": 2, "truncation_mode": "keep_end"}),
    ("KTOConfig", "sync_ref_model"): ("kto", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    ("KTOConfig", "ref_model_mixup_alpha"): (
        "kto", {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.1},
    ),
    ("KTOConfig", "ref_model_sync_steps"): ("kto", {"sync_ref_model": True, "ref_model_sync_steps": 1}),
}  # fmt: skip

SHOWN = {
    # field: the test that shows its effect, whatever the trainer
    "model_init_kwargs": ("test_sft_trainer", "test_model_by_name_with_its_own_tokenizer"),
    "evaluation_strategy": ("test_reward_trainer", "test_older_spelling_of_the_evaluation_strategy"),
    "remove_unused_columns": ("test_reward_trainer", "test_words_and_warnings_of_older_releases"),
    "past_index": ("test_inherited_fields", "test_what_cannot_be_honoured_raises"),
    "router_aux_loss_coef": ("test_router", "test_trainers_add_the_balance"),
    "trust_remote_code": ("test_config_fields", "test_code_of_a_model_runs_only_where_it_is_trusted"),
    "padding_free": ("test_conformity", "test_packed_equals_padded"),
    "context_parallel_size": ("test_context_parallel", "test_ranks_that_share_rows_learn_the_same"),
    "max_tokens_per_microbatch": ("test_token_budget", "test_a_budget_changes_nothing_but_the_passes"),
    "eos_token": ("test_sft_trainer", "test_eos_pad_and_template_of_the_config"),
    "pad_token": ("test_sft_trainer", "test_eos_pad_and_template_of_the_config"),
    "chat_template_path": ("test_sft_trainer", "test_eos_pad_and_template_of_the_config"),
    "completion_only_loss": ("test_sft_trainer", "test_prompts_are_learned_only_when_asked_for"),
    "assistant_only_loss": ("test_sft_trainer", "test_assistant_turns_with_their_end"),
    "learn_tool_results": (
        "test_sft_trainer",
        "test_tool_results_inside_a_completion_are_learned_only_when_asked_for",
    ),
    "precompute_ref_log_probs": ("test_dpo_trainer", "test_precomputed_equals_live"),
    "precompute_ref_batch_size": ("test_dpo_trainer", "test_precomputed_equals_live"),
    "ref_model_init_kwargs": ("test_dpo_trainer", "test_a_reference_of_its_own_by_object_or_name"),
    "generate_during_eval": ("test_dpo_eval_samples", "test_samples_of_an_evaluation"),
    "model_adapter_name": ("test_todays_fields", "test_adapters_of_one_model_by_name"),
    "ref_adapter_name": ("test_todays_fields", "test_adapters_of_one_model_by_name"),
    "tools": ("test_todays_fields", "test_a_field"),
    "disable_dropout": ("test_dpo_trainer", "test_pad_token_and_dropout"),
    "activation_offloading": ("test_kept_activations", "test_a_run_learns_the_same"),
    "trace_steps": ("test_trace", "test_a_traced_run_is_the_run"),
    "compile_layers": ("test_inherited_fields", "test_compiled_layers_train_alike"),
    "memory_plan": ("test_memory_plan", "test_layers_are_computed_again_where_nothing_was_said_of_it"),
    "on_non_finite": ("test_guard", "test_a_step_that_is_not_finite_is_left_out"),
    "max_non_finite_skips": ("test_guard", "test_no_more_than_so_many_steps_are_left_out"),
    "overwrite_output_dir": ("test_run_folder", "test_another_runs_checkpoints"),
    "dataset_num_proc": ("test_config_fields", "test_how_rows_are_tokenised_is_handed_on"),
    "dataset_batch_size": ("test_config_fields", "test_how_rows_are_tokenised_is_handed_on"),
    "bf16": ("test_config_fields", "test_precision_follows_the_device"),
    "logging_steps": ("test_config_fields", "test_frequent_logs"),
    "learning_rate": ("test_config_fields", "test_a_changed_field_changes_the_training"),
}
SHARED_WITH = {"ORPOConfig": "DPOConfig", "CPOConfig": "DPOConfig", "SimPOConfig": "DPOConfig"}
"""configs whose lengths and losses go the same way through `PairTrainer`"""
CONFIGS = ("SFTConfig", "RewardConfig", "PRMConfig", "DPOConfig", "ORPOConfig", "CPOConfig", "SimPOConfig", "KTOConfig")
NEEDS = {
    ("DPOConfig", "sync_ref_model"): {"max_steps": 3},
    ("KTOConfig", "sync_ref_model"): {"max_steps": 3},
    ("SFTConfig", "truncation_mode"): {"max_length": 4},
    ("SFTConfig", "packing_strategy"): {},
    ("DPOConfig", "truncation_mode"): {"max_prompt_length": 2},
    ("KTOConfig", "truncation_mode"): {"max_prompt_length": 2},
    ("DPOConfig", "f_alpha_divergence_coef"): {"f_divergence_type": "alpha_divergence"},
    ("DPOConfig", "discopop_tau"): {"loss_type": "discopop"},
    ("CPOConfig", "simpo_gamma"): {"loss_type": "simpo"},
    ("CPOConfig", "alpha"): {"loss_type": "simpo"},
    ("DPOConfig", "ref_model_mixup_alpha"): {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ("DPOConfig", "ref_model_sync_steps"): {"sync_ref_model": True, "ref_model_sync_steps": 2},
    ("KTOConfig", "ref_model_mixup_alpha"): {"sync_ref_model": True, "ref_model_sync_steps": 1},
    ("KTOConfig", "ref_model_sync_steps"): {"sync_ref_model": True, "ref_model_sync_steps": 2},
    ("SFTConfig", "num_of_sequences"): {"packing_strategy": "constant_length", "chars_per_token": 1.0},
    ("SFTConfig", "chars_per_token"): {"packing_strategy": "constant_length", "num_of_sequences": 2},
}
"""what stands beside the field in both runs"""


def own_fields(config):
    inherited = {entry.name: entry for entry in fields(TrainingArguments)}
    for entry in fields(getattr(trl, config)):
        if entry.name in NO_EFFECT or entry.name in TRANSLATED:
            continue  # `test_settings` goes through these
        if entry.name not in inherited or entry.default != inherited[entry.name].default:
            yield entry.name


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_in_a_table(config):
    missing = [
        name
        for name in own_fields(config)
        if (config, name) not in CHANGED and (SHARED_WITH.get(config), name) not in CHANGED and name not in SHOWN
    ]
    assert not missing


_unchanged = {}


def outcome(case, tmp_path, **settings):
    """What a short run learns from and what comes of it."""
    trainer = build(case, tmp_path, **{"max_steps": 3 if settings.get("sync_ref_model") else 1, **settings})
    trainer.train()
    metrics = trainer.evaluate()
    return (
        [dict(row) for row in trainer.train_dataset],
        history(trainer, "loss"),
        history(trainer, "grad_norm"),
        [dict(row) for row in trainer.eval_dataset],
        metrics["eval_loss"],
    )


@pytest.mark.filterwarnings("ignore:You passed `packing=True`:UserWarning")
@pytest.mark.parametrize(("config", "field"), CHANGED)
def test_a_changed_field_changes_the_training(config, field, tmp_path, monkeypatch):
    case, settings = CHANGED[config, field]
    if field == "dataset_text_field":
        import conformity

        rows = conformity.texts()
        rows = rows.add_column("other", rows["text"][::-1])
        monkeypatch.setitem(conformity.CASES, "sft", replace(conformity.CASES["sft"], rows=lambda: rows))
    base = NEEDS.get((config, field), {})
    key = (case, repr(base))
    if key not in _unchanged:
        _unchanged[key] = outcome(case, tmp_path, **base)
    assert outcome(case, tmp_path, **settings) != _unchanged[key]


@pytest.mark.parametrize(("file", "test"), sorted(set(SHOWN.values())))
def test_the_tests_named_here_exist(file, test):
    assert f"def {test}(" in (HERE / f"{file}.py").read_text()


def test_how_rows_are_tokenised_is_handed_on(tmp_path, monkeypatch):
    seen = {}

    def spy(dataset, job, **how):
        seen.update(how)
        return dataset, None

    monkeypatch.setattr("trl.trainer.sft_trainer.tokenize", spy)
    build("sft", tmp_path, dataset_num_proc=2, dataset_batch_size=3)
    assert (seen["num_proc"], seen["batch_size"]) == (2, 3)


def test_precision_follows_the_device(tmp_path):
    assert trl.SFTConfig(output_dir=str(tmp_path)).bf16 is False  # no GPU here
    config = trl.SFTConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True)
    assert (config.bf16, config.use_cpu) == (True, True)  # as asked, without a word


def test_frequent_logs(tmp_path):
    assert trl.SFTConfig(output_dir=str(tmp_path)).logging_steps == 10
    trainer = build("sft", tmp_path, max_steps=4, logging_steps=2)
    trainer.train()
    assert len(history(trainer, "loss")) == 2


@pytest.fixture
def model_with_code(tmp_path, monkeypatch):
    """A folder whose model brings a class of its own along."""
    import json

    from conformity import causal_lm
    from tokenizers_for_tests import word_tokenizer

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    folder = tmp_path / "model"
    causal_lm().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    lines = ["from transformers import LlamaForCausalLM", "", "", "class Brought(LlamaForCausalLM):", "    pass", ""]
    (folder / "brought.py").write_text("\n".join(lines))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "brought.Brought"}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.filterwarnings("ignore:You passed a model_id:UserWarning")
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_code_of_a_model_runs_only_where_it_is_trusted(name, trusted, model_with_code, tmp_path):
    from datasets import Dataset

    row = {"SFT": {"text": "a b"}, "DPO": {"prompt": "a ", "chosen": "b", "rejected": "c"}, "GRPO": {"prompt": "a"}}
    args = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path / "out"), trust_remote_code=trusted, report_to="none", max_steps=1
    )
    more = {"reward_funcs": "repetition"} if name == "GRPO" else {}
    rows = Dataset.from_list([row[name]] * 8)
    trainer = getattr(trl, f"{name}Trainer")(model_with_code, args=args, train_dataset=rows, **more)
    assert type(trainer.model).__name__ == ("Brought" if trusted else "LlamaForCausalLM")


@pytest.mark.filterwarnings("ignore:You passed a model_id:UserWarning")
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO"])
def test_quantisation_is_told_to_the_loader(name, model_with_code, tmp_path, monkeypatch):
    from conformity import causal_lm, reward_model
    from datasets import Dataset
    from tokenizers_for_tests import word_tokenizer

    told = []

    def load(source, auto_class, keywords, **how):
        told.append((source, keywords.get("quantization_config")))
        raise InterruptedError

    for module in ("preparation", "rollout_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.load_model", load)
    rows = Dataset.from_list([{"prompt": "a ", "chosen": "b", "rejected": "c", "completion": "b", "label": True}] * 8)
    args = getattr(trl, f"{name}Config")(output_dir=str(tmp_path / "out"), report_to="none", max_steps=1)
    more = {"reward_funcs": "repetition"} if name in ("GRPO", "RLOO") else {}
    trainer = getattr(trl, f"{name}Trainer")
    with pytest.raises(InterruptedError):
        trainer(model_with_code, args=args, train_dataset=rows, quantization_config={"load_in_4bit": True}, **more)
    assert told == [(model_with_code, {"load_in_4bit": True})]
    monkeypatch.undo()
    loaded = reward_model() if name == "Reward" else causal_lm()
    with pytest.raises(ValueError, match="quantization_config: says how a model is loaded"):
        trainer(
            loaded, args=args, train_dataset=rows, processing_class=word_tokenizer(),
            quantization_config={"load_in_4bit": True}, **more,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "setting", "value", "read"),
    [
        ("GRPOConfig", "beta", "1e-3", 1e-3),
        ("GRPOConfig", "num_generations", "4", 4),
        ("GRPOConfig", "max_completion_length", 4.0, 4),
        ("GKDConfig", "lmbda", "0.5", 0.5),
        ("DPOConfig", "max_length", "12", 12),
        ("PPOConfig", "init_kl_coef", "2e-1", 0.2),
    ],
)
def test_numbers_written_as_text_are_read(name, setting, value, read, tmp_path):
    """As a YAML file gives `1e-3`, or an environment variable."""
    folder = {} if name == "PPOConfig" else {"output_dir": str(tmp_path), "report_to": "none"}
    made = getattr(getattr(trl, name)(**folder, **{setting: value}), setting)
    assert (made, type(made)) == (read, type(read))


@pytest.mark.parametrize(
    ("name", "setting", "value", "what"),
    [
        ("GRPOConfig", "beta", [0.1], r"beta=\[0.1\]: give a number$"),
        ("GRPOConfig", "num_generations", 2.5, "num_generations=2.5: give a whole number"),
        ("GRPOConfig", "max_completion_length", None, "max_completion_length=None: give a whole number$"),
        ("GRPOConfig", "epsilon_high", "high", "epsilon_high='high': give a number, or None$"),
        ("GRPOConfig", "reward_weights", 1.0, "reward_weights=1.0: give a list of numbers"),
        ("OnlineDPOConfig", "missing_eos_penalty", [1], "missing_eos_penalty="),
        ("GKDConfig", "temperature", None, "temperature=None: give a number"),
        ("PPOConfig", "cliprange", None, "cliprange=None: give a number"),
    ],
)
def test_what_is_no_number_is_named(name, setting, value, what, tmp_path):
    folder = {} if name == "PPOConfig" else {"output_dir": str(tmp_path), "report_to": "none"}
    with pytest.raises(ValueError, match=f"^{what}"):
        getattr(trl, name)(**folder, **{setting: value})


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        (trl.PPOConfig, "max_staleness", "GRPO, RLOO, online DPO and distillation draw rollouts ahead, this trainer"),
        (trl.PPOConfig, "routing_replay", "GRPO and RLOO send tokens to the experts that an engine took, this trainer"),
        (trl.DistillationConfig, "keep_sampling_mask", "GRPO and RLOO learn tokens as chosen from the words"),
        (trl.PPOConfig, "mini_batch_sise", "did you mean 'mini_batch_size'?"),
        (trl.SFTConfig, "number_of_cats", "leave it out"),
    ],
)
def test_a_field_that_is_not_there_has_a_way_out(config, name, said):
    with pytest.raises(TypeError) as caught:
        config(**{name: 1})
    start = f"{config.__name__}.__init__() got an unexpected keyword argument {name!r}: "
    assert str(caught.value).startswith(start + said)


def test_a_users_config_takes_what_its_own_constructor_takes(tmp_path):
    class Own(trl.SFTConfig):
        def __init__(self, *given, cats=0, **named):
            super().__init__(*given, **named)
            self.cats = cats

    assert Own(output_dir=str(tmp_path), cats=3, report_to="none").cats == 3
