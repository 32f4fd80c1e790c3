from dataclasses import dataclass

import pytest

from trl.trainer.base import BaseTrainer, trl_sanitze_kwargs_for_tagging


@dataclass
class Config:
    learning_rate: float = 1e-5


@pytest.mark.parametrize("method", ["step", "loss", "compute_rewards", "_save_pretrained"])
def test_the_base_defines_nothing(method):
    trainer = BaseTrainer(Config())
    with pytest.raises(NotImplementedError, match="Not implemented"):
        getattr(trainer, method)("argument")


def test_save_pretrained_does_not_write_the_trainers_config_as_the_models(tmp_path):
    class Trainer(BaseTrainer):
        def _save_pretrained(self, save_directory):
            (save_directory / "adapter_model.safetensors").touch()

    Trainer(config=Config()).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("tag_names", "kwargs", "tagged"),
    [
        (["trl", "dpo"], {"tags": "x"}, {"tags": ["trl", "dpo", "x"]}),
        ("trl", {"tags": ["x"]}, {"tags": ["x", "trl"]}),
        (["trl", "sft"], {"private": True}, {"private": True, "tags": ["trl", "sft"]}),
        (["trl"], None, None),
    ],
)
def test_tags(tag_names, kwargs, tagged):
    assert trl_sanitze_kwargs_for_tagging(tag_names, kwargs) == tagged


def test_tags_leave_their_arguments_alone():
    names, kwargs = ["trl", "dpo"], {"tags": ["x"]}
    trl_sanitze_kwargs_for_tagging(names, {"tags": "x"})
    trl_sanitze_kwargs_for_tagging(names, kwargs)
    assert (names, kwargs) == (["trl", "dpo"], {"tags": ["x"]})
