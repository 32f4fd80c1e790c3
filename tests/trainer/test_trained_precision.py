"""What the trainers do with a checkpoint in half precision, with adapters that have learned, and with their heads."""

import logging
from dataclasses import replace

import conformity
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from conformity import CASES, build, causal_lm, history
from peft.tuners.lora import LoraLayer
from ppo_cases import batch, causal, lora

import trl
from trl.models.peft_support import base_is_start

NAMES = ["sft", "reward", "dpo-sigmoid", "kto", "prm", "orpo", "grpo", "online-dpo", "distillation", "rloo", "raft"]
pytestmark = pytest.mark.filterwarnings(
    "ignore:You passed a model_id",
    "ignore:No dataset is provided",
    "ignore:.past_key_values. is deprecated:FutureWarning",
    "ignore:Position ids are not supported",
)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Checkpoints in bfloat16 by kind of model: trainers get them by name."""
    folders = {}
    for make in (causal_lm, conformity.reward_model, conformity.step_model):
        folder = tmp_path_factory.mktemp(make.__name__)
        make().to(torch.bfloat16).save_pretrained(folder)
        folders[make] = str(folder)
    return folders


def named(case, half, folder, monkeypatch, **settings):
    own = replace(CASES[case], model=lambda: half[CASES[case].model])
    monkeypatch.setitem(CASES, "named", own)
    return build("named", folder, **settings)


def dtypes(model):
    found = {True: set(), False: set()}
    for weight in model.parameters():
        found[weight.requires_grad].add(str(weight.dtype).removeprefix("torch."))
    return found[True], found[False]


# -- by name ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NAMES)
def test_every_trainer_trains_float32(case, half, tmp_path, monkeypatch):
    assert dtypes(named(case, half, tmp_path, monkeypatch).model) == ({"float32"}, set())
    adapted = named(case, half, tmp_path, monkeypatch, lora=True).model
    assert dtypes(adapted) == ({"float32"}, {"bfloat16"})
    with pytest.warns(UserWarning, match="trained weights are stored in bfloat16: a step of learning_rate=0.01 moves"):
        asked = named(case, half, tmp_path, monkeypatch, model_init_kwargs={"dtype": "bfloat16"})
    assert dtypes(asked.model) == ({"bfloat16"}, set())


def test_nearly_all_weights_move_at_the_default_rate(half, tmp_path, monkeypatch, caplog):
    trainer = named("sft", half, tmp_path, monkeypatch, learning_rate=2e-5, max_steps=6)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    with caplog.at_level(logging.WARNING, logger="trl.models.precision"):
        trainer.train()
        trainer.train()
    inner = [name for name in before if "layers" in name]  # embeddings of words that no row has do not move
    moved = sum(int((trainer.model.get_parameter(name) != before[name]).sum()) for name in inner)
    assert moved / sum(before[name].numel() for name in inner) > 0.95
    size = f"{4e-6 * sum(weight.numel() for weight in before.values()):.1f} MB"
    assert size == "0.1 MB"
    (line,) = [message for message in caplog.messages if message.startswith("memory: ")]
    assert line.startswith(f"memory: trained weights {size} float32, gradients {size}, optimizer ")


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("case", ["dpo-sigmoid", "kto", "rloo"])
def test_a_reference_by_name_starts_equal(case, adapter, half, tmp_path, monkeypatch):
    own = replace(CASES[case], arguments=lambda: {**CASES[case].arguments(), "ref_model": half[causal_lm]})
    monkeypatch.setitem(CASES, "referred", own)
    trainer = named("referred", half, tmp_path, monkeypatch, lora=adapter, max_steps=1)
    assert dtypes(trainer.reference.frozen)[1] == {"bfloat16" if adapter else "float32"}
    trainer.train()
    if case == "dpo-sigmoid":
        assert history(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)
    assert history(trainer, "kl")[0] == 0 if case != "dpo-sigmoid" else True


def test_teachers_and_reward_models_follow_the_policy(half, tmp_path, monkeypatch):
    judge, teacher = half[conformity.reward_model], half[causal_lm]
    arguments = {"grpo": {"reward_funcs": judge}, "distillation": {"teacher_model": teacher}}
    for case, given in arguments.items():
        monkeypatch.setitem(CASES, "followed", replace(CASES[case], arguments=lambda given=given: dict(given)))
        if case == "grpo":
            given["reward_processing_classes"] = conformity.tokenizer()
        for adapter, dtype in ((False, "float32"), (True, "bfloat16")):
            trainer = named("followed", half, tmp_path, monkeypatch, lora=adapter)
            (other,) = trainer.frozen_models()
            assert dtypes(other) == (set(), {dtype})


def test_the_command_asks_for_no_dtype_unless_told():
    from trl.scripts.model_config import loading_keywords

    assert loading_keywords(trl.ModelConfig()) == {}
    assert loading_keywords(trl.ModelConfig(dtype="bfloat16")) == {"dtype": "bfloat16"}


# -- the reference of an adapter that has learned ---------------------------------------------


def trained_adapter(seed=4, **changes):
    fields = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    torch.manual_seed(seed)
    return peft.get_peft_model(causal_lm(), peft.LoraConfig(**fields | changes))


def prefix():
    model = peft.get_peft_model(causal_lm(), peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    return model


@pytest.mark.parametrize(
    "make",
    [trained_adapter, lambda: trained_adapter(use_dora=True), lambda: trained_adapter(bias="all"),
     lambda: trained_adapter(modules_to_save=["lm_head"]), prefix],
    ids=["lora", "dora", "bias", "head", "prefix"],
)  # fmt: skip
def test_dpo_starts_at_ln_2_from_a_trained_adapter(make, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "adapted", replace(CASES["dpo-sigmoid"], model=make))
    trainer = build("adapted", tmp_path, max_steps=2)
    frozen = trainer.reference.frozen
    shared = {id(weight) for weight in trainer.model.parameters() if not weight.requires_grad}
    assert {id(weight) for weight in frozen.parameters()} >= shared
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[0] == pytest.approx(0.693147, abs=1e-6)
    assert losses[1] != pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("case", ["kto", "rloo", "grpo"])
def test_others_start_at_kl_0_from_a_trained_adapter(case, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "adapted", replace(CASES[case], model=trained_adapter))
    trainer = build("adapted", tmp_path, max_steps=1, beta=0.1)
    trainer.train()
    assert history(trainer, "kl")[0] == pytest.approx(0, abs=1e-7)


def test_ppo_starts_at_kl_0_from_a_trained_adapter(tiny_tokenizer):
    model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(trained_adapter())
    config = trl.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-2)
    trainer = trl.PPOTrainer(config, model, tokenizer=tiny_tokenizer)
    assert trainer.step(*batch())["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert abs(trainer.step(*batch())["objective/kl"]) > 1e-6


def test_precomputed_numbers_are_those_of_the_trained_adapter(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "adapted", replace(CASES["dpo-sigmoid"], model=trained_adapter))
    trainer = build("adapted", tmp_path, max_steps=1, precompute_ref_log_probs=True)
    trainer.train()
    assert trainer.ref_model is None
    assert history(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-6)


def test_what_a_new_adapter_starts_from(tmp_path):
    """The base, unless making the adapter has changed the base."""
    assert build("dpo-sigmoid", tmp_path, lora=True).reference.adapter_off
    assert base_is_start(trained_adapter(init_lora_weights=True))
    assert not base_is_start(trained_adapter())
    assert not base_is_start(trained_adapter(init_lora_weights=True, use_dora=True))  # of a stranger's making
    from trl.models.prepare import wrap_peft

    for changes, starts in (({"init_lora_weights": False}, True), ({"init_lora_weights": "pissa"}, False)):
        model = wrap_peft(causal_lm(), peft.LoraConfig(r=2, target_modules=["q_proj"], **changes))
        assert base_is_start(model) == starts
        with torch.no_grad():  # as an optimizer does
            next(weight for weight in model.parameters() if weight.requires_grad).add_(1.0)
        assert not base_is_start(model)


def test_a_resumed_run_measures_from_the_adapter_as_given(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "adapted", replace(CASES["dpo-sigmoid"], model=trained_adapter))
    whole = build("adapted", tmp_path / "a", max_steps=3, save_strategy="steps", save_steps=2)
    whole.train()
    again = build("adapted", tmp_path / "b", max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert history(again, "loss")[-1] == history(whole, "loss")[-1]
    for name, weight in conformity.weights(whole).items():
        assert torch.equal(weight, conformity.weights(again)[name])


def test_the_copy_can_follow_and_is_saved_without_its_base(tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "adapted", replace(CASES["dpo-sigmoid"], model=trained_adapter))
    trainer = build("adapted", tmp_path, max_steps=1, sync_ref_model=True, ref_model_sync_steps=1)
    before = {name: value.clone() for name, value in trainer.reference.state().items()}
    assert before
    assert all("lora" in name for name in before)
    trainer.train()
    after = trainer.reference.state()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    trainer.reference.load(before)
    assert all(torch.equal(trainer.reference.state()[name], value) for name, value in before.items())


# -- heads of reward models -------------------------------------------------------------------


@pytest.mark.parametrize("task", [None, "CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize("case", ["reward", "prm"])
def test_the_head_of_a_classifier_is_trained_and_saved(case, task, tmp_path, monkeypatch, caplog):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
    own = replace(CASES[case], arguments=lambda: {**CASES[case].arguments(), "peft_config": config})
    monkeypatch.setitem(CASES, "headed", own)
    trainer = build("headed", tmp_path, learning_rate=0.1)
    right = CASES[case].task_type
    said = [message for message in caplog.messages if message.startswith("task_type=")]
    assert len(said) == (task != right)
    assert all(f"gets task_type='{right}', and the head (score) is trained and saved" in message for message in said)
    assert (config.task_type, config.modules_to_save) == (task, None)  # the user's own stays
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    base = CASES[case].model()
    start = base.score.weight.detach().clone()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded.eval()(ids).logits, trainer.model.eval()(ids).logits)
    assert not torch.equal(loaded.base_model.model.score.weight, start)


def test_all_new_layers_of_an_encoder_s_head(tmp_path, monkeypatch):
    sizes = {"vocab_size": 100, "dim": 8, "n_layers": 1, "n_heads": 1, "hidden_dim": 8, "num_labels": 1}

    def encoder():
        return t.DistilBertForSequenceClassification(t.DistilBertConfig(**sizes, pad_token_id=0))

    config = peft.LoraConfig(r=2, target_modules="all-linear")
    own = replace(CASES["reward"], model=encoder, arguments=lambda: {"peft_config": config})
    monkeypatch.setitem(CASES, "headed", own)
    trainer = build("headed", tmp_path)
    names = [name for name, weight in trainer.model.named_parameters() if weight.requires_grad and "lora" not in name]
    assert len(names) == 4
    assert all("classifier" in name for name in names)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = peft.PeftModel.from_pretrained(encoder(), tmp_path / "saved").eval()
    ids = torch.tensor([[5, 6, 7]])
    head = loaded.base_model.model.classifier
    assert torch.equal(head.weight, trainer.model.base_model.model.classifier.weight)
    assert loaded(ids).logits.shape == (1, 1)


def test_what_cannot_train_a_head_and_what_leaves_it(tmp_path, monkeypatch):
    class Bare(t.LlamaForSequenceClassification):
        base_model_prefix = ""

    def make():
        return Bare(conformity.config(num_labels=1))

    arguments = {"peft_config": peft.LoraConfig(target_modules=["q_proj"])}
    monkeypatch.setitem(CASES, "headless", replace(CASES["reward"], model=make, arguments=lambda: dict(arguments)))
    with pytest.raises(ValueError, match=r"task_type=None: the head of Bare cannot be trained .*task_type='SEQ_CLS'"):
        build("headless", tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    given = replace(CASES["reward"], model=lambda: peft.get_peft_model(conformity.reward_model(), config))
    monkeypatch.setitem(CASES, "frozen head", given)
    with pytest.warns(UserWarning, match=r"leaves the head \(score\) as it is, and is saved without it: .*SEQ_CLS"):
        build("frozen head", tmp_path)


# -- nothing to train -------------------------------------------------------------------------


@pytest.mark.parametrize("case", NAMES)
def test_a_frozen_adapter_is_refused_by_every_trainer(case, tmp_path, monkeypatch):
    def frozen():
        model = CASES[case].model()
        peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "a")
        return peft.PeftModel.from_pretrained(CASES[case].model(), tmp_path / "a")

    monkeypatch.setitem(CASES, "frozen", replace(CASES[case], model=frozen))
    if CASES[case].task_type != "CAUSAL_LM":
        monkeypatch.setattr("trl.trainer.preparation.warn_of_frozen_head", lambda model: None)
    with pytest.raises(ValueError, match=r"has no trainable weight: .*is_trainable=True"):
        build("frozen", tmp_path)


def test_ppo_refuses_it_too(tiny_tokenizer):
    config = trl.PPOConfig(batch_size=4, mini_batch_size=2)
    model = causal(peft_config=lora())
    model.pretrained_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"has no trainable weight: .*is_trainable=True"):
        trl.PPOTrainer(config, model, tokenizer=tiny_tokenizer)


# -- virtual tokens ---------------------------------------------------------------------------

PROMPTS = {
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "encoder": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", PROMPTS)
def test_virtual_tokens_are_trained_by_grpo(kind, bf16, tmp_path, monkeypatch):
    arguments = CASES["grpo"].arguments
    own = replace(CASES["grpo"], arguments=lambda: {**arguments(), "peft_config": PROMPTS[kind]()})
    monkeypatch.setitem(CASES, "prompted", own)
    trainer = build("prompted", tmp_path, max_steps=1, bf16=bf16, use_cpu=True)
    before = [weight.detach().clone() for weight in trainer.model.parameters() if weight.requires_grad]
    trainer.train()
    assert history(trainer, "ratio")[0] == pytest.approx(1, abs=1e-2 if bf16 else 1e-5)
    after = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", PROMPTS)
def test_ppo_says_at_once_that_it_trains_none(kind, tiny_tokenizer):
    adapted = peft.get_peft_model(causal().pretrained_model, PROMPTS[kind]())
    told = r"PromptLearningConfig is not supported for PPO training\."
    with pytest.raises(ValueError, match=told):
        trl.AutoModelForCausalLMWithValueHead.from_pretrained(adapted)
    model = causal()
    model.pretrained_model = adapted
    with pytest.raises(ValueError, match=f"{told} .*such as LoRA"):
        trl.PPOTrainer(trl.PPOConfig(batch_size=4), model, tokenizer=tiny_tokenizer)


# -- rounded products -------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [10, 7])
@pytest.mark.parametrize("case", ["grpo", "rloo"])
def test_a_device_that_rounds_its_products_samples_locally_and_starts(case, bits, tmp_path, monkeypatch):
    """Whether a switch says it or not; a policy that moved all the same is found out."""
    plain, mask = F.linear, -(1 << (23 - bits))

    def linear(x, weight, bias=None):
        if x.dtype == torch.float32 and torch.backends.mkldnn.matmul.fp32_precision != "ieee":
            x, weight = ((each.contiguous().view(torch.int32) & mask).view(torch.float32) for each in (x, weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", linear)
    trainer = build(case, tmp_path, max_steps=1)
    assert type(trainer.sampler).__name__ == "LocalSampler"
    trainer.train()
    assert abs(history(trainer, "approx_kl")[0]) < 1e-2

    class Meddler(t.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.get_output_embeddings().weight.mul_(9)

    arguments = CASES[case].arguments
    own = replace(CASES[case], arguments=lambda: {**arguments(), "callbacks": [Meddler()]})
    monkeypatch.setitem(CASES, "meddled", own)
    with pytest.raises(RuntimeError, match="at the first update the ratio is"):
        build("meddled", tmp_path, max_steps=1).train()


def test_lora_layers_stay_as_they_are():
    """A guard of these tests: the adapters that they train are LoRA's."""
    assert any(isinstance(module, LoraLayer) for module in trained_adapter().modules())
