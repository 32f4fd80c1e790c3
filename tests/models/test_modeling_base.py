"""The wrapper's arguments, errors and reward adapter; reference copies that share layers."""

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import CAUSAL, lora, tiny_model
from torch.testing import assert_close

from trl.models import modeling_base
from trl.models.modeling_base import LAYER_PATTERNS, PreTrainedModelWrapper, create_reference_model
from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
load = AutoModelForCausalLMWithValueHead.from_pretrained


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def reward_adapter(tmp_path):
    """The adapter of a reward model, as a reward trainer saves it; its head's weights."""
    config = t.LlamaConfig(**CAUSAL["llama"].to_dict() | {"num_labels": 1})
    model = get_peft_model(t.LlamaForSequenceClassification(config), lora(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "reward")
    return str(tmp_path / "reward"), load_file(tmp_path / "reward" / "adapter_model.safetensors")


def test_class_attributes():
    assert PreTrainedModelWrapper.transformers_parent_class is None
    assert PreTrainedModelWrapper.supported_args is None
    assert PreTrainedModelWrapper.supported_modules == ("v_head",)
    assert PreTrainedModelWrapper.supported_rm_modules == ("score",)
    names = [each.__name__ for each in PreTrainedModelWrapper.supported_pretrained_model_architectures]
    assert names == ["PreTrainedModel", "PeftModelForCausalLM", "PeftModelForSeq2SeqLM"]


def test_abstract_methods():
    wrapper = PreTrainedModelWrapper(tiny_model("llama"))
    for name in ("push_to_hub", "state_dict", "post_init"):
        with pytest.raises(NotImplementedError):
            getattr(wrapper, name)()


def test_what_the_wrapper_stores():
    inner = tiny_model("llama")
    model = load(inner)
    assert model.pretrained_model is inner
    assert model.config is inner.config
    assert model.prepare_inputs_for_generation == inner.prepare_inputs_for_generation
    assert model.gradient_checkpointing_enable == inner.gradient_checkpointing_enable
    assert (model.is_loaded_in_8bit, model.is_loaded_in_4bit) == (False, False)
    assert (model.is_peft_model, model.current_device, model.is_sequential_parallel) == (False, "cpu", False)
    assert (model.supports_rm_adapter, model.rm_adapter_name, model.policy_adapter_name) == (False, None, "default")


def test_split_kwargs():
    kwargs = {"v_head_init_strategy": "normal", "device_map": "auto", "use_gradient_checkpointing": True}
    assert AutoModelForCausalLMWithValueHead._split_kwargs(kwargs) == (
        {"v_head_init_strategy": "normal"},
        {"device_map": "auto"},
        {"use_gradient_checkpointing": True},
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"reward_adapter": 3},
            "The `reward_adapter` argument should be a string representing the name of local path or the Hub id to "
            "the Reward Modeling adapter.",
        ),
        ({"peft_config": {"r": 2}}, "The `peft_config` argument should be an instance of `peft.PeftConfig` class."),
        ({"reward_adapter": "folder"}, "reward_adapter can only be used with a PeftModel. "),
        (
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            "PromptLearningConfig is not supported for PPO training.",
        ),
    ],
)
def test_wrong_adapter_arguments(kwargs, message):
    with pytest.raises(ValueError) as error:
        load(tiny_model("llama"), **kwargs)
    assert str(error.value) == message


def test_first_argument_of_another_type():
    with pytest.raises(ValueError, match=r"should be a string or a PreTrainedModel, but is <class 'int'>"):
        load(3)


@pytest.mark.parametrize("kwargs", [{"device_map": "auto"}, {"dtype": torch.bfloat16}])
def test_loading_keywords_of_a_loaded_model_are_refused(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))} say how to load a model"):
        load(tiny_model("llama"), **kwargs)


def test_kbit_keywords_of_a_plain_model_are_refused():
    for peft_config in (None, lora()):
        with pytest.raises(ValueError, match="use_gradient_checkpointing"):
            load(tiny_model("llama"), peft_config=peft_config, use_gradient_checkpointing=True)


def test_a_quantised_model_is_prepared_for_its_adapter():
    inner = tiny_model("llama").to(torch.bfloat16)
    inner.is_loaded_in_8bit = True
    model = load(inner, peft_config=lora(), use_gradient_checkpointing=True)
    assert model.is_loaded_in_8bit
    assert inner.model.layers[0].gradient_checkpointing
    assert inner.model.norm.weight.dtype == torch.float32


@pytest.mark.slow
def test_import_and_forward_where_peft_is_missing():
    code = (
        "import sys; sys.modules['peft'] = None; sys.path.insert(0, 'tests')\n"
        "import torch; from tiny_models import tiny_model\n"
        "from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead as Model\n"
        "from trl.models.reference import Reference\n"
        "model = Model.from_pretrained(tiny_model('llama'))\n"
        "assert [c.__name__ for c in Model.supported_pretrained_model_architectures] == ['PreTrainedModel']\n"
        "with Reference(model).model() as reference: reference(torch.tensor([[5, 6]]))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_unknown_argument_of_the_constructor():
    with pytest.raises(TypeError, match="does not know the arguments summary_dropout"):
        AutoModelForCausalLMWithValueHead(tiny_model("llama"), summary_dropout=0.1)


def test_without_peft_an_adapter_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        load(tiny_model("llama"), peft_config=object())
    load(tiny_model("llama"))(IDS)


def test_adapter_of_the_folder_wins_over_a_new_one(base, tmp_path, caplog):
    load(base, peft_config=lora()).save_pretrained(tmp_path / "adapter")
    model = load(str(tmp_path / "adapter"), peft_config=lora(r=1))
    assert model.pretrained_model.peft_config["default"].r == 2
    assert "`peft_config` is ignored" in caplog.text


def test_peft_model_is_wrapped_as_it_is():
    inner = get_peft_model(tiny_model("llama"), lora())
    model = load(inner)
    assert model.is_peft_model
    assert model.pretrained_model is inner


def test_head_of_a_model_object_is_taken_over():
    inner = tiny_model("llama")
    inner.v_head = load(tiny_model("llama")).v_head
    assert_close(load(inner).v_head.summary.weight, inner.v_head.summary.weight)


def test_dtype_in_both_spellings(base):
    for name in ("dtype", "torch_dtype"):
        model = load(base, **{name: "bfloat16"})
        assert model.pretrained_model.dtype == torch.bfloat16
        assert model.v_head.summary.weight.dtype == torch.float32


def test_eight_bits_go_to_the_current_device_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr("trl.models.prepare.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr("trl.models.prepare.BitsAndBytesConfig", lambda **bits: SimpleNamespace(**bits))
    kwargs = AutoModelForCausalLMWithValueHead._with_device_map({"load_in_8bit": True})
    assert kwargs["quantization_config"].load_in_8bit
    assert kwargs["device_map"] == {"": "cpu"}
    assert "The `device_map` argument is not provided" in caplog.text


def test_eight_bits_without_bitsandbytes(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("trl.models.prepare.is_gpu_available", lambda: True)
    with pytest.raises(ImportError, match="`load_in_8bit` needs bitsandbytes: pip install bitsandbytes"):
        load(base, load_in_8bit=True)


def test_reward_adapter_scores_like_the_reward_model(base, reward_adapter):
    folder, weights = reward_adapter
    model = load(base, peft_config=lora(), reward_adapter=folder)
    assert (model.supports_rm_adapter, model.rm_adapter_name) == (True, "reward_adapter")
    assert not any(parameter.requires_grad for parameter in model.score.parameters())
    assert model.pretrained_model.training
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = model.eval()(IDS)[0]

    scores = model.compute_reward_score(IDS, attention_mask=torch.ones_like(IDS))
    plain = t.AutoModelForCausalLM.from_pretrained(base)
    from peft import PeftModel

    as_reward_model = PeftModel.from_pretrained(plain, folder).eval()
    hidden = as_reward_model(IDS, output_hidden_states=True).hidden_states[-1]
    assert scores.shape == (2, 4, 1)
    assert_close(scores, hidden @ weights["base_model.model.score.weight"].T)

    assert not scores.requires_grad
    assert model.pretrained_model.active_adapter == "default"
    assert not model.pretrained_model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    assert_close(model(IDS)[0], before)


def test_reward_score_returns_to_the_adapter_that_is_named(base, reward_adapter):
    model = load(base, peft_config=lora(), reward_adapter=reward_adapter[0], reward_adapter_name="judge")
    model.pretrained_model.add_adapter("second", lora())
    model.compute_reward_score(IDS, ppo_adapter_name="second")
    assert model.pretrained_model.active_adapter == "second"


def test_reward_score_needs_a_reward_adapter():
    with pytest.raises(ValueError, match="This model does not support reward modeling adapter"):
        load(tiny_model("llama")).compute_reward_score(IDS)


def test_reward_adapter_without_weights_or_without_a_head(base, tmp_path):
    inner = get_peft_model(tiny_model("llama"), lora())
    inner.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="holds no head"):
        load(base, peft_config=lora(), reward_adapter=str(tmp_path / "headless"))
    with pytest.raises(ValueError, match="Could not find adapter model in the Hub, make sure you have the correct"):
        modeling_base.reward_head_weights(str(tmp_path), ("score",))


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_reference_is_a_frozen_copy_in_eval_mode(name):
    model = tiny_model(name).train()
    reference = create_reference_model(model)
    assert not reference.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for ours, theirs in zip(reference.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_shared_layers_are_the_same_tensors():
    """26 of 66 tensors of a five-layer GPT-2 with a value head stand before layer 2."""
    model = load(tiny_model("gpt2", n_layer=5))
    reference = create_reference_model(model, num_shared_layers=2)
    ours, theirs = dict(reference.named_parameters()), dict(model.named_parameters())
    assert len(theirs) == 66
    shared = [name for name in theirs if ours[name] is theirs[name]]
    assert len(shared) == 26
    assert [name for name, parameter in theirs.items() if not parameter.requires_grad] == shared
    assert not any(parameter.requires_grad for parameter in ours.values())
    assert all("wte" in name or "wpe" in name or ".h.0." in name or ".h.1." in name for name in shared)


def test_reference_of_a_wrapper_is_whole():
    model = load(tiny_model("llama"))
    reference = create_reference_model(model, num_shared_layers=1)
    assert reference.prepare_inputs_for_generation.__self__ is reference.pretrained_model
    assert_close(reference(IDS), model.eval()(IDS))
    assert torch.equal(reference.generate(IDS, max_new_tokens=2), model.generate(IDS, max_new_tokens=2))


def test_training_moves_only_what_is_not_shared():
    model = tiny_model("llama")
    reference = create_reference_model(model, num_shared_layers=1)
    before = deepcopy(reference.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    for name, tensor in reference.state_dict().items():
        assert torch.equal(tensor, before[name])
    moved = [name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])]
    assert moved
    assert all(".layers.1." in name or "norm" in name or "lm_head" in name for name in moved)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_known_layer_patterns(name):
    assert len(LAYER_PATTERNS) == 4
    model = tiny_model(name)
    create_reference_model(model, num_shared_layers=1)
    frozen = [parameter.requires_grad for parameter in model.parameters()].count(False)
    assert 0 < frozen < len(list(model.parameters()))


def test_pattern_of_the_user_and_patterns_that_fit_nothing(caplog):
    model = tiny_model("t5")
    create_reference_model(model, num_shared_layers=1, pattern="decoder.block.{layer}")
    assert not model.encoder.block[1].layer[0].SelfAttention.q.weight.requires_grad
    assert model.decoder.block[1].layer[0].SelfAttention.q.weight.requires_grad
    with pytest.raises(ValueError, match="Layer pattern could not be matched"):
        create_reference_model(tiny_model("t5"), num_shared_layers=1)
    typo = tiny_model("llama")
    reference = create_reference_model(typo, num_shared_layers=1, pattern="model.layer.{layer}")
    assert "Pattern passed or found, but no layers matched in the model. Check for a typo." in caplog.text
    assert all(parameter.requires_grad for parameter in typo.parameters())
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    with pytest.raises(ValueError, match="pass `num_shared_layers` with it"):
        create_reference_model(typo, pattern="model.layers.{layer}")
