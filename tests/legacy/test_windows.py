"""Names and modules of other releases: windows on what is here, and errors that say what to use for what is not."""

import importlib
import re
import subprocess
import sys

import pytest

import trl
from trl.legacy import absent

WINDOWS = {
    "trl.chat_template_utils": "SIMPLE_CHAT_TEMPLATE clone_chat_template get_training_chat_template setup_chat_format",
    "trl.data_utils": """apply_chat_template extract_prompt is_conversational is_conversational_from_value
        maybe_apply_chat_template maybe_convert_to_chatml maybe_extract_prompt maybe_unpair_preference_dataset
        pack_dataset unpair_preference_dataset""",
    "trl.experimental.bco": "BCOConfig BCOTrainer",
    "trl.experimental.cpo": "CPOConfig CPOTrainer",
    "trl.experimental.distillation": "DistillationConfig DistillationTrainer",
    "trl.experimental.gkd": "GKDConfig GKDTrainer",
    "trl.experimental.gspo_token": "GRPOTrainer",
    "trl.experimental.kto": "KTOConfig KTOTrainer",
    "trl.experimental.online_dpo": "OnlineDPOConfig OnlineDPOTrainer",
    "trl.experimental.orpo": "ORPOConfig ORPOTrainer",
    "trl.experimental.ppo": """AutoModelForCausalLMWithValueHead AutoModelForSeq2SeqLMWithValueHead PPOConfig PPOTrainer
        PreTrainedModelWrapper create_reference_model""",
    "trl.experimental.prm": "PRMConfig PRMTrainer",
    "trl.extras": "BestOfNSampler",
    "trl.import_utils": "is_deepspeed_available is_liger_kernel_available is_vllm_available",
    "trl.models": "clone_chat_template create_reference_model setup_chat_format unwrap_model_for_generation",
    "trl.models.utils": """ChatMlSpecialTokens clone_chat_template create_reference_model disable_dropout_in_model
        setup_chat_format unwrap_model_for_generation""",
    "trl.rewards": "get_cosine_scaled_reward get_repetition_penalty_reward get_soft_overlong_punishment",
    "trl.trainer": """BCOConfig BCOTrainer BEMACallback CPOConfig CPOTrainer DPOConfig DPOTrainer DistillationConfig
        DistillationTrainer GKDConfig GKDTrainer GRPOConfig GRPOTrainer KTOConfig KTOTrainer LogCompletionsCallback
        ModelConfig ORPOConfig ORPOTrainer OnlineDPOConfig OnlineDPOTrainer PRMConfig PRMTrainer RLOOConfig RLOOTrainer
        RichProgressCallback SFTConfig SyncRefModelCallback get_peft_config get_quantization_config""",
    "trl.trainer.base_config": "_BaseConfig",
    "trl.trainer.base_trainer": "BaseTrainer _BaseTrainer",
    "trl.trainer.bco_config": "BCOConfig",
    "trl.trainer.bco_trainer": "BCOTrainer",
    "trl.trainer.callbacks": "BEMACallback LogCompletionsCallback RichProgressCallback SyncRefModelCallback",
    "trl.trainer.cpo_config": "CPOConfig",
    "trl.trainer.cpo_trainer": "CPOTrainer",
    "trl.trainer.gkd_config": "GKDConfig",
    "trl.trainer.gkd_trainer": "GKDTrainer",
    "trl.trainer.online_dpo_config": "OnlineDPOConfig",
    "trl.trainer.orpo_config": "ORPOConfig",
    "trl.trainer.orpo_trainer": "ORPOTrainer",
    "trl.trainer.model_config": "ModelConfig",
    "trl.trainer.rloo_config": "RLOOConfig",
    "trl.trainer.utils": """SIMPLE_CHAT_TEMPLATE entropy_from_logits flush_left nanmax nanmin nanstd pad
        selective_log_softmax split_tensor_dict""",
}


@pytest.mark.parametrize("module", WINDOWS)
def test_names_of_a_window(module):
    loaded = importlib.import_module(module)
    assert [name for name in WINDOWS[module].split() if not hasattr(loaded, name)] == []


def test_a_window_shows_the_same_objects():
    import trl.data_utils
    from trl.experimental import ppo
    from trl.experimental.bco import BCOTrainer
    from trl.experimental.cpo import CPOTrainer

    assert CPOTrainer is trl.CPOTrainer
    assert BCOTrainer is trl.BCOTrainer
    assert issubclass(BCOTrainer, trl.KTOTrainer)
    assert ppo.PPOTrainer is trl.experimental.ppo.PPOTrainer is trl.PPOTrainer
    assert trl.data_utils.pack_dataset is trl.pack_dataset


@pytest.mark.parametrize("name", absent.NAMES)
def test_a_name_that_is_not_here(name):
    for home in ("trl", "trl.trainer", "trl.trainer.utils", "trl.experimental.ppo", "trl.models.utils"):
        with pytest.raises(ImportError) as error:
            exec(f"from {home} import {name}")
        assert str(error.value) == f"{name} is not in this package: {absent.NAMES[name]}"


@pytest.mark.parametrize("module", absent.MODULES)
def test_a_module_that_is_not_here(module):
    above, _, leaf = module.rpartition(".")
    for line in (f"import {module}", f"from {module} import Anything", f"from {above} import {leaf}"):
        with pytest.raises(ImportError) as error:
            exec(line)
        assert str(error.value) == f"{module} is not in this package: {absent.MODULES[module]}"


def test_each_way_out_is_one_line_about_names_that_exist():
    for _, _, way in absent.ABSENT:
        assert "\n" not in way
        assert way.split()[0] in ("use", "give", "leave", "merge", "log")
        for word in re.findall(r"\b[A-Z]\w*(?:Trainer|Callback|Config)\b", way):
            assert hasattr(trl, word), word


def test_an_unknown_name_and_module_are_plain_errors():
    with pytest.raises(ImportError, match="cannot import name 'Anything'"):
        exec("from trl.experimental.ppo import Anything")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'trl\.experimental\.anything'"):
        importlib.import_module("trl.experimental.anything")
    with pytest.raises(AttributeError, match="it is a folder of windows"):
        trl.experimental.anything  # noqa: B018


def test_diffusers_is_named_where_it_is_missing():
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "for home in ('trl', 'trl.trainer'):\n"
        "    try: exec(f'from {home} import DDPOTrainer')\n"
        "    except ImportError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["DDPOTrainer needs diffusers: pip install diffusers"] * 2
